import math

import pytest
import torch

import students
from distill.distiller import Distiller, Lesson
from distill.measure import count_macs
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.terms import BoxMimicTerm, DenseSigmoidTerm, PseudoLabelTerm, RoiKDTerm, ScoreWeightedMimicTerm
from students import RoiOutput, RoiSamples, TwoStageDetector


@pytest.fixture
def build_two_stage():
    def build(seed=0, **changes):
        torch.manual_seed(seed)
        detector = students.build(
            "faster_rcnn", **{"class_names": ["a", "b"], "backbone": "resnet18", "channels": 32} | changes
        )
        detector.model.roi_heads.fg_bg_sampler.batch_size_per_image = 16
        detector.model.rpn._post_nms_top_n.update(training=20, testing=20)
        return detector

    return build


class Scripted(TwoStageDetector):
    """One class, and two boxes whose outputs are given: an object and background."""

    strides, feature_channels, output_layers, normalization = (8,), (4,), (), ((), ())
    recipe, class_names = {"name": "scripted"}, ["a"]

    def __init__(self, logits, deltas):
        super().__init__()
        self.logits, self.deltas = (torch.tensor(x, requires_grad=True) for x in (logits, deltas))

    def forward(self, images): ...
    def loss(self, output, targets): ...
    def candidates(self, output): ...
    def decode(self, output, image_sizes): ...

    def propose(self, output, image_sizes):
        return ["a proposal"]

    def sample(self, proposals, targets):
        assert proposals == ["a proposal"]
        return RoiSamples(["two boxes"], torch.tensor([0, 1]), torch.zeros(2, 4))

    def roi(self, features, boxes):
        assert boxes == ["two boxes"]
        return RoiOutput(self.logits, self.deltas)


def run(settings, student, teacher):
    output = students.TwoStageOutput((), (), (), ())
    return RoiKDTerm(student, teacher, **settings)(output, output, [{}], (64, 64))


# object: the student says 1/2, the teacher 3/4; background: they agree
STUDENT = [[0.0, 0.0], [1.0, 1.0]], [[1.0, 0, 0, 0], [9.0, 9, 9, 9]]
TEACHER = [[math.log(3), 0.0], [1.0, 1.0]], [[0.5, 0, 0, 0], [0.0, 0, 0, 0]]
KL = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"boxes": "none"}, KL / 2),
        ({}, KL / 2 + 0.5 * 1.0),  # the student is a whole unit off, the teacher half a one
        ({"margin": 0.8}, KL / 2),  # 1 - 1/4 is not more than that
        ({"boxes": "smooth_l1"}, KL / 2 + 0.5 * (0.5 * 0.5**2 / 4)),
        # of two classes the second part of DKD is nothing, and the first is KL
        ({"classes": "dkd", "boxes": "none", "alpha": 2.0}, 2 * KL / 2),
        # the student tells neither classes nor proposals apart, so nothing correlates: 1 for rows, 1 for columns
        ({"classes": "dist", "boxes": "none"}, 2.0),
        ({"class_weight": 0.0, "box_weight": 3.0}, 3.0),
    ],
)
def test_values(settings, value):
    student, teacher = Scripted(*STUDENT), Scripted(*TEACHER)
    loss = run(settings, student, teacher)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    assert teacher.logits.grad is None and teacher.deltas.grad is None
    assert student.logits.grad is not None
    if settings.get("boxes") != "none":
        assert not student.deltas.grad[1].any()  # background has no box


@pytest.mark.parametrize("classes", ["kl", "dkd"])
def test_classes_that_the_teacher_does_not_know_are_left_out(classes):
    # classes a and b, of which the teacher knows a; of a proposal on an a and one on a b the first counts, without b
    student = Scripted([[0.0, 5.0, 0.0], [1.0, 2.0, 3.0]], [[1.0, 0, 0, 0] * 2, [9.0, 9, 9, 9] * 2])
    teacher = Scripted([[math.log(3), -1e4, 0.0], [0.0, -1e4, 0.0]], [[0.5, 0, 0, 0] * 2, [0.0] * 8])
    student.class_names = teacher.class_names = ["a", "b"]
    teacher.unknown = (1,)
    loss = run({"classes": classes, "boxes": "smooth_l1"}, student, teacher)
    assert loss.item() == pytest.approx(KL + 0.5 * 0.5 * 0.5**2 / 4, rel=1e-5)
    loss.backward()
    assert not student.logits.grad[1].any() and not student.logits.grad[:, 1].any() and student.logits.grad[0, 0]


def test_one_softmax_learns_no_pseudo_labels_of_a_teacher_with_other_classes(build_two_stage, build_tiny):
    teacher = build_tiny()
    teacher.unknown = (1,)
    with pytest.raises(ValueError, match=r"pseudo_label would teach faster_rcnn resnet18, .* that b are background"):
        PseudoLabelTerm(build_two_stage(), teacher)
    PseudoLabelTerm(build_tiny(), teacher)


def test_relations_are_those_of_proposals_and_classes():
    # the teacher says (3/4, 1/4) and (1/2, 1/2); the student (1/2, 1/2) and (3/4, 1/4)
    student, teacher = Scripted(TEACHER[0][::-1], STUDENT[1]), Scripted(*TEACHER)
    # a row that is constant correlates with nothing, 1; both columns fall where the teacher's rise, 2
    loss = run({"classes": "dist", "boxes": "none"}, student, teacher)
    assert loss.item() == pytest.approx(1 + 2, rel=1e-5)


def test_nothing_to_learn_from_oneself(build_two_stage, images, targets):
    student = build_two_stage()
    output = student(images)
    for classes in ("kl", "dkd"):
        assert RoiKDTerm(student, student, classes=classes)(output, output, targets, (64, 64)).abs() < 1e-6


@pytest.mark.parametrize("objects", [2, 0])
def test_the_heads_look_at_their_own_features(build_two_stage, images, targets, objects):
    student, teacher = build_two_stage(), build_two_stage(seed=1, channels=64).eval().requires_grad_(False)
    targets = targets if objects else targets[1:] * 2
    unit = Distiller(student, {"roi": RoiKDTerm(student, teacher)})
    total, parts = unit(images, targets, {"teacher": Lesson(teacher(images), targets)})
    assert parts["roi"] > 0 and parts["roi"].dtype == torch.float32
    total.backward()
    assert [name for name, p in unit.named_parameters() if p.grad is None] == []


def test_pairs_that_cannot_feed_a_loss_are_refused(build_two_stage, build_tiny):
    dense, two_stage = build_tiny(), build_two_stage()
    with pytest.raises(
        ValueError, match="name: roi_kd needs two ROI heads; the teacher, test_resnet, has none; pseudo_"
    ):
        RoiKDTerm(two_stage, dense)
    with pytest.raises(ValueError, match="levels: a proposal belongs to no pair of levels"):
        RoiKDTerm(two_stage, two_stage, levels=["P3"])
    for term, name in ((DenseSigmoidTerm, "dense_sigmoid"), (BoxMimicTerm, "box_mimic")):
        with pytest.raises(
            ValueError, match=rf"name: {name} needs two dense heads, .*the student, faster_rcnn resnet18"
        ):
            term(two_stage, two_stage)


def test_pseudo_labels_go_both_ways(build_two_stage, build_tiny, images, targets):
    dense, two_stage = build_tiny(), build_two_stage()
    for student, teacher in ((dense, two_stage), (two_stage, dense)):
        with torch.no_grad():
            taught = teacher.eval()(images)
        term = PseudoLabelTerm(student, teacher, score_threshold=0.0)
        student.zero_grad()
        value = term(student.train()(images), taught, targets, (64, 64))
        value.backward()
        assert value > 0 and next(student.parameters()).grad.abs().sum() > 0


def test_a_two_stage_teacher_says_where_to_look_by_objectness(build_two_stage, build_tiny, images, targets):
    student, teacher = build_tiny(), build_two_stage(seed=1).eval().requires_grad_(False)
    taught = teacher(images)
    term = ScoreWeightedMimicTerm(student, teacher)
    assert term.level_names == ["P3", "P4", "P5"]
    assert term(student(images), taught, targets, (64, 64)) > 0


def test_a_two_stage_student_is_cut_with_its_roi_head(build_two_stage, images, targets):
    student, teacher = build_two_stage(), build_two_stage(seed=1).eval()
    unit = Distiller(student, {"roi": RoiKDTerm(student, teacher), "mimic": ScoreWeightedMimicTerm(student, teacher)})
    before = count_macs(student, (64, 64))
    pruner = Pruner((64, 64), target=0.5, epochs=[0])
    pruner.check(unit)
    plan = pruner.plan(unit, 0)
    kept = {name: cut.keep for cut in plan.cuts for name, dim in cut.slices if dim == 1}
    channels = kept["student.model.rpn.head.conv.0.0.weight"]
    assert 0 < len(channels) < 32
    # a channel of the pyramid takes its whole window of the first linear layer along
    window = tuple(channel * 49 + place for channel in channels for place in range(49))
    assert kept["student.model.roi_heads.box_head.fc6.weight"] == window
    cut_everywhere(plan, unit, None, torch.optim.SGD(unit.parameters(), lr=0.1))
    assert count_macs(student, (64, 64)) <= before / 2
    predictor = student.model.roi_heads.box_predictor
    assert predictor.cls_score.out_features == 3 and predictor.bbox_pred.out_features == 12
    with torch.no_grad():
        taught = teacher(images)
    unit(images, targets, {"teacher": Lesson(taught, targets)})[0].backward()
    assert [name for name, p in unit.named_parameters() if p.grad is None] == []
