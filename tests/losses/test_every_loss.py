"""What is asked of every loss alike; what each of them computes is tested by its own file."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from learnt_layers import pass_on, shake
from torch import Tensor, nn

import losses
from losses import (
    FGD,
    MGD,
    AttentionGuided,
    FGDGlobal,
    NonLocalRelation,
    attention_guided,
    attention_transfer,
    bounded_regression,
    box_mimic,
    cwd,
    dense_sigmoid,
    dist,
    distribution_focal_loss,
    dkd,
    fgd_attention,
    fgd_focal,
    focal_loss,
    foreground_mask,
    giou_loss,
    kd,
    localization_distillation,
    masked_mimic,
    pkd,
    plain_mimic,
    quality_focal_loss,
    query_distillation,
    roi_classification,
    roi_regression,
    score_weighted_mimic,
)
from losses.precision import at_least_float32

# what `losses` has besides losses
OTHERS = {
    "NonLocal", "adaptive_threshold", "align_statistics", "average_across_ranks", "ciou", "class_deltas", "fgd_masks",
    "foreground_mask", "fuse_levels", "giou", "iou", "pairwise_diou", "pairwise_iou", "valuable_region",
}  # fmt: skip

SIZE = (32, 32)  # pixels of every image
OBJECTS = torch.tensor([[2.0, 2, 20, 14], [0, 0, 9, 9]])
NOTHING, WHOLE = torch.zeros(0, 4), torch.tensor([[0.0, 0, *SIZE]])
MAP, ROWS = (3, 4, 5), (5, 4)  # of one image: channels, height and width; rows of logits, deltas or a box each
EDGES, QUERIES = (5, 4, 6), (5, 7)  # 6 bins for each edge; 3 class logits and a box each


def draw(item: tuple[int, ...], images: int, dtype: torch.dtype, boxes: bool = False) -> Tensor:
    """(images, *item); of boxes each row ends in one, cxcywh for queries and xyxy for others, within the image."""
    values = torch.randn(images, *item, dtype=torch.float64)
    if item[-1] == QUERIES[-1]:
        values[..., 3:] = torch.rand(images, *item[:-1], 4, dtype=torch.float64) * 0.4 + 0.1
    elif boxes:
        corner, size = 20 * torch.rand(2, images, *item[:-1], 2, dtype=torch.float64)
        values = torch.cat([corner, corner + size / 2 + 1], dim=-1)
    return values.to(dtype)


def on_objects(maps: Tensor, boxes: list[Tensor]) -> Tensor:
    """(B, H, W), all locations unlike, and 0 off objects."""
    height, width = maps.shape[2:]
    return torch.linspace(0.1, 1, height * width).view(height, width) * foreground_mask(boxes, SIZE, (height, width))


def with_objects(rows: Tensor, boxes: list[Tensor]) -> Tensor:
    """(B, N), all rows unlike, and 0 on images without objects."""
    ramp = torch.linspace(0.1, 1, rows.shape[1])
    return torch.stack([ramp * bool(len(x)) for x in boxes])


def labels(values: Tensor, boxes: list[Tensor]) -> Tensor:
    """(B * N,), the classes in turn on images with objects, the last class, the background, on others."""
    classes = torch.arange(values.shape[1]) % values.shape[2]
    return torch.cat([classes if len(x) else torch.full_like(classes, values.shape[2] - 1) for x in boxes])


def learnt(build: Callable[[int], nn.Module], prepare: Callable[[nn.Module], None] = shake) -> Callable:
    """The loss of a module, in the type that it computes in; batches do not enter its normalisation."""

    def loss(student: Tensor, teacher: Tensor, boxes: list[Tensor]) -> Tensor:
        torch.manual_seed(0)
        module = build(student.shape[1]).eval()
        prepare(module)
        module.to(torch.promote_types(student.dtype, torch.float32))
        return module(student, teacher, boxes, SIZE) if isinstance(module, FGD) else module(student, teacher)

    return loss


def probabilities(logits: Tensor) -> Tensor:
    return at_least_float32(logits).sigmoid()


def scores(logits: Tensor) -> Tensor:
    """How much of all images the teacher is sure of."""
    return probabilities(logits).amax(dim=1).sum()


def mean(one: Tensor, two: Tensor, *_: Tensor) -> Tensor:
    return (one + two) / 2


def total(one: Tensor, two: Tensor, *_: Tensor) -> Tensor:
    return one + two


def first(one: Tensor, two: Tensor, *_: Tensor) -> Tensor:
    assert two == 0
    return one


def norm(one: Tensor, two: Tensor, *_: Tensor) -> Tensor:
    return (one.square() + two.square()).sqrt()


def by_scores(select: Callable[[Tensor], Tensor]) -> Callable:
    """Each image counts as much as its teacher is sure of, but all together at least 1."""

    def combine(one: Tensor, two: Tensor, teacher: Tensor) -> Tensor:
        shares = [scores(select(x)).clamp(min=1) for x in (teacher[:1], teacher[1:], teacher)]
        return (one * shares[0] + two * shares[1]) / shares[2]

    return combine


@dataclass
class Case:
    """One loss, all its arguments but two made from these and from the images' boxes.

    Attributes:
        loss: of a student's and a teacher's tensor (B, *item) and of the boxes (N_i, 4) of each image.
        item: of one image.
        batch: what the loss of two images, the second without objects, is by those of each; None for losses whose
            statistics run over the batch.
        boxes: whether rows are boxes.
        alike: the loss that is 0 where student and teacher are alike; None where its own file tests the minimum.
        smooth: the loss whose gradient is that of its values.
    """

    loss: Callable[[Tensor, Tensor, list[Tensor]], Tensor]
    item: tuple[int, ...]
    batch: Callable[..., Tensor] | None
    boxes: bool = False
    alike: Callable | None = ...
    smooth: Callable | None = None

    def __post_init__(self):
        self.alike = self.loss if self.alike is ... else self.alike
        self.smooth = self.smooth or self.loss

    def draw(
        self, images: int, dtype: torch.dtype = torch.float32, item: tuple[int, ...] | None = None
    ) -> list[Tensor]:
        """A student's and a teacher's tensor."""
        return [draw(item or self.item, images, dtype, self.boxes) for _ in range(2)]


def queries(student: Tensor, teacher: Tensor, boxes: list[Tensor]) -> Tensor:
    return query_distillation(student[..., :-4], student[..., -4:], teacher[..., :-4], teacher[..., -4:])


def bins(student: Tensor, teacher: Tensor, boxes: list[Tensor]) -> Tensor:
    """Of the first edges; the target is where the teacher's distribution has its mean."""
    target = (at_least_float32(teacher[:, :, 0]).softmax(dim=-1) * torch.arange(6)).sum(dim=-1)
    return distribution_focal_loss(student[:, :, 0], target, with_objects(student, boxes))


def roi(loss: Callable) -> Callable:
    """Of the rows of all images, with weights."""
    return lambda s, t, boxes: loss(s.flatten(0, 1), t.flatten(0, 1), with_objects(s, boxes).flatten())


def whole_module(width: int) -> AttentionGuided:
    return AttentionGuided(width, width, 1.0, 1.0, 1.0)


# fmt: off
CASES = {
    "plain_mimic": Case(lambda s, t, boxes: plain_mimic(s, t), MAP, mean),
    "pkd": Case(lambda s, t, boxes: pkd(s, t), MAP, None),
    "score_weighted_mimic": Case(lambda s, t, boxes: score_weighted_mimic(s, t, on_objects(s, boxes)), MAP, first),
    "masked_mimic": Case(lambda s, t, boxes: masked_mimic(s, t, on_objects(s, boxes) > 0), MAP, first),
    "cwd": Case(lambda s, t, boxes: cwd(s, t), MAP, mean),
    "MGD": Case(learnt(lambda c: MGD(c, 0.0)), MAP, mean, alike=learnt(lambda c: MGD(c, 0.0), pass_on)),
    "fgd_focal": Case(lambda s, t, boxes: fgd_focal(s, t, on_objects(s, boxes)), MAP, mean),
    "FGDGlobal": Case(learnt(FGDGlobal), MAP, mean, alike=learnt(FGDGlobal, pass_on)),
    "FGD": Case(learnt(FGD), MAP, mean, alike=learnt(FGD, pass_on)),
    "attention_transfer": Case(lambda s, t, boxes: attention_transfer(s, t), MAP, mean),
    "fgd_attention": Case(lambda s, t, boxes: fgd_attention(s, t), MAP, mean),
    # the mask is a constant to the student, so it is made from the teacher here
    "attention_guided": Case(lambda s, t, boxes: attention_guided(t.roll(1, 1), s, t), MAP, norm),
    "NonLocalRelation": Case(learnt(lambda c: NonLocalRelation(c, c)), MAP, norm,
                             alike=learnt(lambda c: NonLocalRelation(c, c), pass_on)),
    # a sum of norms; without its masked part smooth, which `attention_guided` is
    "AttentionGuided": Case(learnt(whole_module), MAP, None, alike=learnt(whole_module, pass_on),
                            smooth=learnt(lambda c: AttentionGuided(c, c, 0.0, 1.0, 1.0))),
    "dense_sigmoid": Case(lambda s, t, boxes: dense_sigmoid([s], [t]), MAP, by_scores(lambda x: x)),
    "kd": Case(lambda s, t, boxes: kd(s, t, 2.0), ROWS, mean),
    "dkd": Case(lambda s, t, boxes: dkd(s.flatten(0, 1), t.flatten(0, 1), labels(s, boxes)), ROWS, mean),
    "dist": Case(lambda s, t, boxes: dist(s.flatten(0, 1), t.flatten(0, 1)), ROWS, None),
    "localization_distillation": Case(
        lambda s, t, boxes: localization_distillation(s, t, with_objects(s, boxes)), EDGES, first),
    "box_mimic giou": Case(lambda s, t, boxes: box_mimic(s, t, with_objects(s, boxes)), ROWS, first, boxes=True),
    "box_mimic smooth_l1": Case(
        lambda s, t, boxes: box_mimic(s, t, with_objects(s, boxes), "smooth_l1"), ROWS, first, boxes=True),
    "roi_classification": Case(roi(lambda s, t, weight: roi_classification(s, t)), ROWS, mean),
    "roi_regression": Case(roi(roi_regression), ROWS, first),
    "bounded_regression": Case(roi(lambda s, t, w: bounded_regression(s, t, torch.ones_like(s), w)), ROWS, first),
    "query_distillation": Case(queries, QUERIES, by_scores(lambda x: x[..., :-4].mT)),
    "quality_focal_loss": Case(lambda s, t, boxes: quality_focal_loss(s, probabilities(t)), ROWS, total),
    "focal_loss": Case(lambda s, t, boxes: focal_loss(s, probabilities(t), torch.full_like(s, 2)), ROWS, total),
    "distribution_focal_loss": Case(bins, EDGES, total, alike=None),
    "giou_loss": Case(lambda s, t, boxes: giou_loss(s, t, with_objects(s, boxes)), ROWS, total, boxes=True),
}
# fmt: on
of_every_loss = pytest.mark.parametrize("name", CASES)
of_every_map = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.item == MAP])
of_all_rows = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.item != MAP])


@pytest.fixture
def case(name):
    torch.manual_seed(0)
    return CASES[name]


def test_no_loss_is_left_out():
    assert {name.split()[0] for name in CASES} | OTHERS == set(losses.__all__)


@of_every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_only_the_student_learns_in_float32(case, dtype, autocast):
    student, teacher = (x.requires_grad_() for x in case.draw(2, dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = case.loss(student, teacher, [OBJECTS, NOTHING])
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    torch.testing.assert_close(loss, case.loss(student.float(), teacher.float(), [OBJECTS, NOTHING]))
    loss.backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.alike])
def test_zero_where_student_and_teacher_are_alike(case):
    teacher = case.draw(2)[1].abs()  # a layer that passes on what is not negative may be a ReLU
    student = teacher.clone().requires_grad_()
    loss = case.alike(student, teacher, [OBJECTS, NOTHING])
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=2e-5, rtol=0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.batch])
def test_a_batch_with_a_negative_is_made_of_its_images(case):
    student, teacher = case.draw(2)
    one = case.loss(student[:1], teacher[:1], [OBJECTS])
    two = case.loss(student[1:], teacher[1:], [NOTHING])
    expected = case.batch(one, two, teacher)
    torch.testing.assert_close(case.loss(student, teacher, [OBJECTS, NOTHING]), expected)


@of_every_loss
def test_no_boxes_at_all(case):
    student, teacher = case.draw(2)
    loss = case.loss(student.requires_grad_(), teacher, [NOTHING, NOTHING])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    if case.batch is first:
        assert loss == 0


@of_all_rows
def test_no_rows_are_zero_and_still_have_a_graph(case):
    student, teacher = case.draw(2, item=(0, *case.item[1:]))
    loss = case.loss(student.requires_grad_(), teacher, [OBJECTS, NOTHING])
    loss.backward()
    assert loss == 0 and student.grad.shape == student.shape


@of_every_map
def test_every_location_learns_from_one_box_over_all(case):
    student, teacher = case.draw(1)
    case.loss(student.requires_grad_(), teacher, [WHOLE]).backward()
    assert (student.grad.abs().sum(dim=1) > 0).all()


@of_all_rows
def test_a_single_row_is_finite(case):
    student, teacher = case.draw(1, item=(1, *case.item[1:]))
    loss = case.loss(student.requires_grad_(), teacher, [WHOLE])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "expected"), [("box_mimic giou", 0.75), ("giou_loss", 0.1 * 0.75), ("box_mimic smooth_l1", 7.75)]
)
def test_one_box_over_all_is_a_box_like_others(case, expected):
    # a quarter of it has IoU and GIoU 1/4, and two of four coordinates 16 too small; the one row weighs 0.1
    quarter = (WHOLE / 2)[None]
    torch.testing.assert_close(case.loss(quarter, WHOLE[None], [WHOLE]), torch.tensor(expected))


@of_every_map
@pytest.mark.parametrize("item", [(3, 1, 1), (3, 1, 4)])
@pytest.mark.parametrize("images", [1, 2])
def test_maps_of_one_pixel_or_row_are_finite(case, item, images):
    student, teacher = case.draw(images, item=item)
    loss = case.loss(student.requires_grad_(), teacher, [OBJECTS, NOTHING][:images])
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@of_every_map
def test_memory_format_does_not_matter(case):
    student, teacher = case.draw(2)
    other = [x.to(memory_format=torch.channels_last) for x in (student, teacher)]
    expected = case.loss(student, teacher, [OBJECTS, NOTHING])
    torch.testing.assert_close(case.loss(*other, [OBJECTS, NOTHING]), expected)


@of_every_loss
def test_the_gradient_is_that_of_finite_differences(case):
    item = (2, 2, 3) if case.item == MAP else (2, *case.item[1:])
    student, teacher = case.draw(2, torch.float64, item)
    boxes = [OBJECTS, NOTHING]
    assert case.smooth(student, teacher, boxes).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: case.smooth(x, teacher, boxes), student.requires_grad_())


@of_every_loss
def test_unlike_batches_are_named_not_broadcast(case):
    student, teacher = case.draw(2)
    with pytest.raises(ValueError, match=r"\(\d+, .*\(\d+, ") as error:
        case.loss(student, teacher[:1], [OBJECTS, NOTHING])
    assert "\n" not in str(error.value)


@of_every_map
@pytest.mark.parametrize("item", [(3, 3, 5), (3, 4, 4)])
def test_unlike_sizes_are_named(case, item):
    (student, _), (_, teacher) = case.draw(2), case.draw(2, item=item)
    shapes = rf"\(2, 3, 4, 5\) and (teacher )?\({', '.join(map(str, (2, *item)))}\)"
    with pytest.raises(ValueError, match=shapes):
        case.loss(student, teacher, [OBJECTS, NOTHING])


@of_every_map
def test_what_is_no_map_or_empty_is_refused(case):
    if case is CASES["dense_sigmoid"]:
        return  # no images are no error there: see its own file
    for shape in [(0, 3, 4, 5), (2, 3, 0, 5)]:
        with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
            case.loss(torch.zeros(shape), torch.zeros(shape), [OBJECTS, NOTHING])
