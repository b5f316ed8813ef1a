import math

import pytest
import torch

from distill.combiner import Combiner
from distill.distiller import Distiller
from distill.terms import BoxMimicTerm, FeatureMimicTerm, FPNAttentionTerm, SoftLabelTerm, match_levels
from losses import attention_transfer, dense_sigmoid, plain_mimic
from students import DenseOutput


def all_terms(student, teacher):
    return {
        "soft_label": SoftLabelTerm(student, teacher),
        "feature_mimic": FeatureMimicTerm(student, teacher),
        "fpn_attention": FPNAttentionTerm(student, teacher),
        "box": BoxMimicTerm(student, teacher),
    }


def weighted(*weights):
    return Combiner(dict(zip(("soft_label", "feature_mimic", "fpn_attention", "box"), weights)))


@pytest.fixture
def pair(build_tiny):
    """A student and a wider teacher."""
    return build_tiny(), build_tiny(seed=1, channels=24, backbone="test_efficientnet").eval().requires_grad_(False)


def test_levels_meet_at_equal_strides():
    assert match_levels((8, 16, 32), (8, 16, 32)) == [(0, 0), (1, 1), (2, 2)]
    assert match_levels((8, 16, 32), (4, 8, 16)) == [(0, 1), (1, 2)]
    assert match_levels((32, 64), (8, 16, 32)) == [(0, 2)]
    with pytest.raises(ValueError, match=r"strides \[8, 16\]\) and the teacher's \(\[32, 64\]\) have none in common"):
        match_levels((8, 16), (32, 64))


@torch.no_grad()
def test_each_term_is_its_loss_over_the_common_levels(build_tiny, images):
    student = build_tiny(levels=(3, 4, 5)).eval()
    teacher = build_tiny(seed=1, levels=(2, 3, 4), channels=24).eval()
    ours, theirs = student(images), teacher(images)
    soft = SoftLabelTerm(student, teacher, beta=2.0)
    mimic = FeatureMimicTerm(student, teacher, plain_mimic)
    attention = FPNAttentionTerm(student, teacher)
    pairs = [(0, 1), (1, 2)]
    assert torch.equal(
        soft(ours, theirs),
        dense_sigmoid([ours.class_logits[i] for i, _ in pairs], [theirs.class_logits[j] for _, j in pairs], 2.0),
    )
    assert list(mimic.adapters) == ["P3", "P4"]
    adapted = [adapter(ours.features[i]) for adapter, (i, _) in zip(mimic.adapters.values(), pairs)]
    assert [x.shape[1] for x in adapted] == [24, 24]
    wanted = sum(plain_mimic(x, theirs.features[j]) for x, (_, j) in zip(adapted, pairs))
    assert torch.equal(mimic(ours, theirs), wanted)
    assert torch.equal(
        attention(ours, theirs), sum(attention_transfer(ours.features[i], theirs.features[j]) for i, j in pairs)
    )


def test_boxes_count_by_the_teachers_score(build_tiny):
    student = build_tiny(levels=(4, 5))
    maps = lambda *values: tuple(torch.tensor(v).reshape(1, -1, 1, 1) for v in values)  # noqa: E731
    # one location a level, two classes; scores 0.5 and 0.8, sigmoid(ln 4)
    ours = DenseOutput((), (), maps([1.0, 1, 1, 1], [2.0, 1, 1, 1]))
    theirs = DenseOutput((), maps([0.0, -9], [-9, math.log(4)]), maps([1.0, 1, 1, 1], [1.0, 1, 1, 1]))
    # the first boxes agree; the second are (-2, -1, 1, 1) and (-1, -1, 1, 1), areas 6 and 4: GIoU = IoU = 2/3
    term = BoxMimicTerm(student, student)
    torch.testing.assert_close(term(ours, theirs), torch.tensor(0.8 * (1 / 3) / 1.3))
    # smooth-L1 of one coordinate that is off by 1: 0.5, over four coordinates
    term = BoxMimicTerm(student, student, "smooth_l1")
    torch.testing.assert_close(term(ours, theirs), torch.tensor(0.8 * (0.5 / 4) / 1.3))


def test_weights_enter_the_sum_and_each_part_is_given(pair, images, targets):
    student, teacher = pair
    unit = Distiller(student, all_terms(student, teacher), weighted(1.0, 2.0, 100.0, 4.0)).eval()
    taught = teacher(images)
    total, parts = unit(images, targets, taught)
    output = student(images)
    wanted = {
        "task": sum(student.loss(output, targets).values()),
        **{name: w * unit.terms[name](output, taught) for name, w in zip(unit.terms, (1.0, 2.0, 100.0, 4.0))},
    }
    assert list(parts) == ["task", "soft_label", "feature_mimic", "fpn_attention", "box"]
    for name, value in parts.items():
        assert value.item() == pytest.approx(wanted[name].item(), rel=1e-5) and value.item() > 0
        assert not value.requires_grad
    assert total.item() == pytest.approx(sum(value.item() for value in parts.values()), rel=1e-6)


def test_every_parameter_of_the_unit_has_a_gradient(pair, images, targets):
    student, teacher = pair
    unit = Distiller(student, all_terms(student, teacher))
    unit(images, targets, teacher(images))[0].backward()
    assert [name for name, p in unit.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in teacher.parameters())


def test_weights_of_zero_are_plain_training(pair, images, targets, build_tiny):
    student, teacher = pair
    plain = build_tiny()
    Distiller(plain)(images, targets)[0].backward()
    unit = Distiller(student, all_terms(student, teacher), weighted(0.0, 0.0, 0.0, 0.0))
    unit(images, targets, teacher(images))[0].backward()
    for (name, ours), theirs in zip(student.named_parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_term_moves_the_student(pair, images, targets, build_tiny):
    student, teacher = pair
    plain = build_tiny()
    Distiller(plain)(images, targets)[0].backward()
    taught = Distiller(student, {"soft_label": SoftLabelTerm(student, teacher)})
    taught(images, targets, teacher(images))[0].backward()
    assert not torch.equal(student.head.class_logits.weight.grad, plain.head.class_logits.weight.grad)


def test_a_student_is_at_zero_distance_from_itself(build_tiny, images):
    student = build_tiny().eval()
    output = student(images)
    assert FPNAttentionTerm(student, student)(output, output) == 0
    assert SoftLabelTerm(student, student)(output, output) == 0
    assert BoxMimicTerm(student, student)(output, output).item() == pytest.approx(0, abs=1e-6)


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
    term = FeatureMimicTerm(build_tiny(levels=(5, 6)), build_tiny(levels=(4, 5, 6)))
    assert list(term.adapters) == ["P5", "P6"]
    assert [int(name[1:]) for name in term.adapters] == [int(math.log2(s)) for s in (32, 64)]
