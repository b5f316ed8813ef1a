import math

import pytest
import torch

from distill.combiner import Combiner
from distill.distiller import Distiller, Lesson
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.terms import (
    TERMS,
    AttentionTransferTerm,
    BoxMimicTerm,
    DenseSigmoidTerm,
    PKDTerm,
    PlainMimicTerm,
    PseudoLabelTerm,
    describe_pairs,
    match_levels,
)
from losses import attention_transfer, dense_sigmoid, fuse_levels, plain_mimic
from students import DenseOutput

FOR_DENSE_PAIRS = sorted(set(TERMS) - {"roi_kd"})  # which has tests of its own


def all_terms(student, teacher):
    return {
        "soft_label": DenseSigmoidTerm(student, teacher),
        "feature_mimic": PKDTerm(student, teacher),
        "fpn_attention": AttentionTransferTerm(student, teacher),
        "box": BoxMimicTerm(student, teacher),
    }


def weighted(*weights):
    return Combiner(dict(zip(("soft_label", "feature_mimic", "fpn_attention", "box"), weights)))


# each term with a kind of head that it works on, and those that look at heads with each kind
HEADED = [("ld", "gfl"), ("cross_kd", "gfl"), ("cross_kd", "retinanet")]
CASES = [
    *((name, "task_aligned") for name in FOR_DENSE_PAIRS if name != "ld"),
    *((name, head) for name in ("dense_sigmoid", "box_mimic", "pseudo_label") for head in ("gfl", "retinanet")),
    ("score_weighted_mimic", "retinanet"),
    *HEADED,
]


@pytest.fixture
def build_pair(build_tiny):
    """A student and a wider teacher, with heads of one kind."""

    def build(head="task_aligned"):
        teacher = build_tiny(seed=1, head=head, channels=24, backbone="test_efficientnet")
        return build_tiny(head=head), teacher.eval().requires_grad_(False)

    return build


@pytest.fixture
def pair(build_pair):
    return build_pair()


def test_levels_meet_at_equal_strides():
    assert match_levels((8, 16, 32), (8, 16, 32)) == [(0, 0), (1, 1), (2, 2)]
    assert match_levels((8, 16, 32), (4, 8, 16)) == [(0, 1), (1, 2)]
    assert match_levels((32, 64), (8, 16, 32)) == [(0, 2)]
    assert match_levels((32, 32, 64), (16, 32, 64)) == [(1, 1), (2, 2)]  # of two as coarse, the later one
    with pytest.raises(ValueError, match=r"strides \[8, 16\]\) and the teacher's \(\[32, 64\]\) have none in common;"):
        match_levels((8, 16), (32, 64))


def test_levels_of_unlike_strides_meet_within_a_factor_of_2():
    assert match_levels((8, 16, 32, 64), (8, 16, 32), interpolate=True) == [(0, 0), (1, 1), (2, 2), (3, 2)]
    assert match_levels((8, 16, 32, 64, 128), (16, 32), interpolate=True) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert match_levels((16,), (32, 8), interpolate=True) == [(0, 1)]  # of two equally near ones the finer
    assert match_levels((8, 16), (12.0, 24.0), interpolate=True) == [(0, 0), (1, 0)]  # 12/8 and 16/12 against 24/16
    assert match_levels((8, 16, 32, 64), (8, 16, 32), ["P6", "P3"], interpolate=True) == [(0, 0), (3, 2)]
    with pytest.raises(ValueError, match=r"have none in common and none within a factor of 2; change student.levels"):
        match_levels((4, 8), (32, 64), interpolate=True)
    message = "levels: P7 finds no partner; this loss needs a stride within a factor of 2, as have P5, P6"
    with pytest.raises(ValueError, match=f"^{message}$"):
        match_levels((32, 64, 128), (32,), ["P7"], interpolate=True)


def test_pairs_are_told_in_words():
    def describe(ours, theirs, levels=None, **more):
        return describe_pairs(match_levels(ours, theirs, levels, **more), ours, theirs, everything=levels is None)

    assert describe((8, 16, 32), (8, 16, 32)) == "P3-P5 by stride"
    assert describe((4, 8, 16), (8, 16, 32)) == "P3, P4 by stride; P2 without a partner"
    assert describe((8, 16, 32, 64), (4.0,), interpolate=True).endswith("interpolated; P4, P5, P6 without a partner")
    assert describe((8, 16, 32), (8, 16, 32), levels=["P3", "P5"]) == "P3, P5 by stride"
    found = describe((4, 8, 16, 32), (8, 16), interpolate=True)
    assert found == "P3, P4 by stride; P2 from the teacher's P3, interpolated; P5 from the teacher's P4, interpolated"
    assert describe((8,), (12.0,), interpolate=True) == "P3 from the teacher's stride 12, interpolated"


@torch.no_grad()
def test_each_term_is_its_loss_over_the_common_levels(build_tiny, images):
    student = build_tiny(levels=(3, 4, 5)).eval()
    teacher = build_tiny(seed=1, levels=(2, 3, 4), channels=24).eval()
    ours, theirs = student(images), teacher(images)
    soft = DenseSigmoidTerm(student, teacher, beta=2.0)
    mimic = PlainMimicTerm(student, teacher, levels=["P3", "P4"])
    attention = AttentionTransferTerm(student, teacher, levels=["P3", "P4"])
    pairs = [(0, 1), (1, 2)]
    assert torch.equal(
        soft(ours, theirs, [], (64, 64)),
        dense_sigmoid([ours.class_logits[i] for i, _ in pairs], [theirs.class_logits[j] for _, j in pairs], 2.0),
    )
    assert list(mimic.adapters) == mimic.level_names == ["P3", "P4"]
    adapted = [adapter(ours.features[i]) for adapter, (i, _) in zip(mimic.adapters.values(), pairs)]
    assert [x.shape[1] for x in adapted] == [24, 24]
    wanted = sum(plain_mimic(x, theirs.features[j]) for x, (_, j) in zip(adapted, pairs))
    assert torch.equal(mimic(ours, theirs, [], (64, 64)), wanted)
    assert torch.equal(
        attention(ours, theirs, [], (64, 64)),
        sum(attention_transfer(ours.features[i], theirs.features[j]) for i, j in pairs),
    )


def test_boxes_count_by_the_teachers_score(build_tiny):
    student = build_tiny(levels=(4, 5))
    maps = lambda *values: tuple(torch.tensor(v).reshape(1, -1, 1, 1) for v in values)  # noqa: E731
    # one location a level, two classes; scores 0.5 and 0.8, sigmoid(ln 4)
    ours = DenseOutput((), (), maps([1.0, 1, 1, 1], [2.0, 1, 1, 1]))
    theirs = DenseOutput((), maps([0.0, -9], [-9, math.log(4)]), maps([1.0, 1, 1, 1], [1.0, 1, 1, 1]))
    # the first boxes agree; the second are (-2, -1, 1, 1) and (-1, -1, 1, 1), areas 6 and 4: GIoU = IoU = 2/3
    term = BoxMimicTerm(student, student)
    torch.testing.assert_close(term(ours, theirs, [], (64, 64)), torch.tensor(0.8 * (1 / 3) / 1.3))
    # smooth-L1 of one coordinate that is off by 1: 0.5, over four coordinates
    term = BoxMimicTerm(student, student, kind="smooth_l1")
    torch.testing.assert_close(term(ours, theirs, [], (64, 64)), torch.tensor(0.8 * (0.5 / 4) / 1.3))


def test_weights_enter_the_sum_and_each_part_is_given(pair, images, targets):
    student, teacher = pair
    unit = Distiller(student, all_terms(student, teacher), weighted(1.0, 2.0, 100.0, 4.0)).eval()
    images = images.contiguous(memory_format=torch.channels_last)  # as the unit lays them out
    taught = teacher(images)
    total, parts = unit(images, targets, {"teacher": Lesson(taught, targets)})
    output = student(images)
    wanted = {
        "task": sum(student.loss(output, targets).values()),
        **{
            name: w * unit.terms[name](output, taught, targets, (64, 64))
            for name, w in zip(unit.terms, (1.0, 2.0, 100.0, 4.0))
        },
    }
    assert list(parts) == ["task", "soft_label", "feature_mimic", "fpn_attention", "box"]
    for name, value in parts.items():
        assert value.item() == pytest.approx(wanted[name].item(), rel=1e-5) and value.item() > 0
        assert not value.requires_grad
    assert total.item() == pytest.approx(sum(value.item() for value in parts.values()), rel=1e-6)


def test_every_parameter_of_the_unit_has_a_gradient(pair, images, targets):
    student, teacher = pair
    unit = Distiller(student, all_terms(student, teacher))
    unit(images, targets, {"teacher": Lesson(teacher(images), targets)})[0].backward()
    assert [name for name, p in unit.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())


def test_weights_of_zero_are_plain_training(pair, images, targets, build_tiny):
    student, teacher = pair
    plain = build_tiny()
    Distiller(plain)(images, targets)[0].backward()
    unit = Distiller(student, all_terms(student, teacher), weighted(0.0, 0.0, 0.0, 0.0))
    unit(images, targets, {"teacher": Lesson(teacher(images), targets)})[0].backward()
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_term_moves_the_student(pair, images, targets, build_tiny):
    student, teacher = pair
    plain = build_tiny()
    Distiller(plain)(images, targets)[0].backward()
    taught = Distiller(student, {"soft_label": DenseSigmoidTerm(student, teacher)})
    taught(images, targets, {"teacher": Lesson(teacher(images), targets)})[0].backward()
    assert not torch.equal(student.head.class_logits.weight.grad, plain.head.class_logits.weight.grad)


def test_a_student_is_at_zero_distance_from_itself(build_tiny, images):
    student = build_tiny().eval()
    output = student(images)
    assert AttentionTransferTerm(student, student)(output, output, [], (64, 64)) == 0
    assert DenseSigmoidTerm(student, student)(output, output, [], (64, 64)) == 0
    assert BoxMimicTerm(student, student)(output, output, [], (64, 64)).item() == pytest.approx(0, abs=1e-6)


def test_what_is_traced_and_what_keeps_its_width(pair, images):
    student, teacher = pair
    unit = Distiller(student, all_terms(student, teacher))
    shapes = [tuple(x.shape[1:]) for x in unit.traced_outputs(images)]
    sizes = [(8, 8), (4, 4), (2, 2)]
    assert shapes == [(channels, *size) for channels in (16, 2, 4, 24) for size in sizes]
    adapters = unit.terms["feature_mimic"].adapters
    assert unit.output_layers == (*student.output_layers, *adapters.values())
    assert len(adapters) == 3


def test_adapters_are_named_after_their_levels(build_tiny):
    term = PKDTerm(build_tiny(levels=(5, 6)), build_tiny(levels=(4, 5, 6)))
    assert list(term.adapters) == ["P5", "P6"]
    assert [int(name[1:]) for name in term.adapters] == [int(math.log2(s)) for s in (32, 64)]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_term_reaches_the_student_and_not_the_teacher(build_pair, images, targets, name, head):
    student, teacher = build_pair(head)
    any_term = TERMS[name](student, teacher)
    torch.nn.init.constant_(teacher.head.class_logits.bias, 1.0)  # sure enough of something to teach it
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    taught = teacher(images)
    output = student(images)
    loss = any_term.train()(output, taught, targets, (64, 64))
    assert loss.dtype == torch.float32 and loss.dim() == 0 and loss.isfinite()
    gradients = torch.autograd.grad(loss, output.features, allow_unused=True, retain_graph=True)
    assert sum(g.abs().sum() for g in gradients if g is not None) > 0
    loss.backward()
    assert [name for name, p in any_term.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in teacher.named_buffers())


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_term_bears_a_batch_without_objects(build_pair, images, name, head):
    student, teacher = build_pair(head)
    any_term = TERMS[name](student, teacher)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    loss = any_term(student(images), teacher(images), nothing, (64, 64))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_term_with_levels_takes_a_choice_of_them(build_pair, images, targets, name, head):
    student, teacher = build_pair(head)
    if name == "pseudo_label":
        with pytest.raises(ValueError, match="levels: detections belong to no level"):
            TERMS[name](student, teacher, levels=["P4"])
        return
    term = TERMS[name](student, teacher, levels=["P4"])
    assert term.level_names == ["P4"] and term.pairs == [(1, 1)]
    output = student(images)
    term(output, teacher(images), targets, (64, 64)).backward()
    with pytest.raises(ValueError, match=r"levels: P8 finds no partner; this loss needs .*, as have P3, P4, P5$"):
        TERMS[name](student, teacher, levels=["P4", "P8"])


@pytest.mark.parametrize(
    ("name", "head"), [*((name, "task_aligned") for name in FOR_DENSE_PAIRS if name != "ld"), *HEADED]
)
def test_every_term_follows_a_cut(build_tiny, images, targets, name, head):
    student = build_tiny(channels=32, head=head)
    teacher = build_tiny(seed=1, channels=24, head=head).eval().requires_grad_(False)
    taught = teacher(images)
    unit = Distiller(student, {"term": TERMS[name](student, teacher)})
    optimizer = torch.optim.AdamW(unit.parameters())
    unit(images, targets, {"teacher": Lesson(taught, targets)})[0].backward()
    optimizer.step()
    pruner = Pruner((64, 64), target=0.5, epochs=[0])
    pruner.check(unit)
    cut_everywhere(pruner.plan(unit, 0), unit, None, optimizer)
    assert set(student.feature_channels) == {16} or max(student.feature_channels) < 32
    unit(images, targets, {"teacher": Lesson(taught, targets)})[0].backward()
    optimizer.step()
    assert [n for n, p in unit.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []


@torch.no_grad()
def test_a_level_that_only_interpolation_pairs(build_tiny, images):
    student, teacher = build_tiny(levels=(5, 6)).eval(), build_tiny(seed=1, levels=(4, 5), channels=24).eval()
    ours, theirs = student(images), teacher(images)
    mean = theirs.features[1].mean(dim=(2, 3), keepdim=True)  # of 2x2 cells, seen from the middle of all four
    mimic = PlainMimicTerm(student, teacher, levels=["P6"])
    assert mimic.pairs == [(1, 1)]
    wanted = plain_mimic(mimic.adapters["P6"](ours.features[1]), mean)
    torch.testing.assert_close(mimic(ours, theirs, [], (64, 64)), wanted)
    # without a choice the level takes part as well
    assert PlainMimicTerm(student, teacher).pairs == AttentionTransferTerm(student, teacher).pairs == [(0, 1), (1, 1)]
    fused = AttentionTransferTerm(student, teacher, match="fused")(ours, theirs, [], (64, 64))
    wanted = attention_transfer(fuse_levels(ours.features), mean)  # the teacher's only once
    torch.testing.assert_close(fused, wanted)


@pytest.mark.parametrize("name", ["dense_sigmoid", "box_mimic", "cross_kd"])
def test_what_is_said_of_each_location_is_not_interpolated(build_tiny, name):
    student, teacher = build_tiny(levels=(5, 6)), build_tiny(seed=1, levels=(4, 5))
    assert TERMS[name](student, teacher).pairs == [(0, 1)]
    message = "levels: P6 finds no partner; this loss needs an equal stride, location by location, as have P5"
    with pytest.raises(ValueError, match=f"^{message}$"):
        TERMS[name](student, teacher, levels=["P6"])


def test_maps_of_unlike_sizes_are_brought_together(build_tiny, images):
    student, teacher = build_tiny(), build_tiny(seed=1).eval()
    finer = teacher(torch.nn.functional.interpolate(images, scale_factor=2.0))
    assert PlainMimicTerm(student, teacher)(student(images), finer, [], (64, 64)).isfinite()


def test_pseudo_labels_are_what_a_sure_teacher_sees(build_tiny, images):
    # strides that have nothing in common
    student, teacher = build_tiny(levels=(3, 4)), build_tiny(seed=1, levels=(5,)).eval()
    torch.nn.init.constant_(teacher.head.class_logits.bias, 1.0)
    ours, theirs = student(images), teacher(images)
    seen = teacher.decode(theirs, [(64, 64)] * 2)
    assert all(len(d.scores) > 1 for d in seen)
    threshold = float(seen[0].scores.median())
    term = PseudoLabelTerm(student, teacher, score_threshold=threshold)
    labels = []
    for d in seen:
        keep = d.scores >= threshold
        labels.append({"boxes": d.boxes[keep], "labels": d.labels[keep], "scores": d.scores[keep]})
    assert torch.equal(term(ours, theirs, [{}, {}], (64, 64)), sum(student.loss(ours, labels).values()))


@torch.no_grad()
def test_each_anchor_is_a_prediction_of_its_own(build_tiny):
    student = build_tiny(head="retinanet", levels=(5,))
    maps = lambda values: (torch.tensor(values).reshape(1, -1, 1, 1),)  # noqa: E731
    # one location, nine anchors, two classes; the teacher is sure of the first two anchors, by 1/2 and 4/5
    logits = [[0.0, -99], [-99, math.log(4)], *[[-99.0, -99]] * 7]
    theirs = DenseOutput((), maps(logits), maps([[1.0, 1, 1, 1]] * 9))
    ours = DenseOutput(
        (), maps([[0.0, -99], [-99, 0], *logits[2:]]), maps([[1.0, 1, 1, 1], [2, 1, 1, 1]] + [[5.0] * 4] * 7)
    )
    # |1/2 - 4/5| * BCE(1/2, 4/5) = 0.3 ln 2, over the sum 1.3 of the predictions' scores
    loss = DenseSigmoidTerm(student, student)(ours, theirs, [], (32, 32))
    torch.testing.assert_close(loss, torch.tensor(0.3 * math.log(2) / 1.3))
    # the first boxes agree, the second have IoU 2/3; the others do not count
    loss = BoxMimicTerm(student, student)(ours, theirs, [], (32, 32))
    torch.testing.assert_close(loss, torch.tensor(0.8 * (1 / 3) / 1.3))


def test_heads_without_counterparts_are_refused(build_tiny):
    one, nine = build_tiny(), build_tiny(head="retinanet")
    for name in ("dense_sigmoid", "box_mimic"):
        TERMS[name](one, build_tiny(head="gfl"))
        message = f"^name: {name} needs .* the student makes 1, the teacher 9; choose pseudo_label, which fits any pair"
        with pytest.raises(ValueError, match=message):
            TERMS[name](one, nine)
    none = build_tiny()
    none.anchors = 0
    with pytest.raises(ValueError, match=r"needs two dense heads.* the student, test_resnet, has none"):
        BoxMimicTerm(none, none)
