"""YOLO detectors teach and learn: each loss between two dense heads, location by location and anchor by anchor."""

import pytest
import torch

import students
from distill.distiller import Distiller, Lesson
from distill.terms import (
    TERMS,
    BoxMimicTerm,
    CrossKDTerm,
    DenseSigmoidTerm,
    LDTerm,
    PseudoLabelTerm,
    ScoreWeightedMimicTerm,
)
from teachers import ScaledDetector, inherit, speak

FITTING = sorted(set(TERMS) - {"roi_kd", "ld", "cross_kd"})
SMALL = {"yolov4": {"width": 0.125, "depth": 0.25}, "yolov5": {"width": 0.125}, "yolov7": {"width": 0.125}}


def small(family, seed=0, **changes):
    torch.manual_seed(seed)
    return students.build(family, **{"class_names": ["a", "b"]} | SMALL[family] | changes)


@pytest.fixture(scope="module")
def pair():
    return small("yolov5"), small("yolov7", seed=1).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FITTING)
def test_every_term_reaches_the_student_alone(pair, images, targets, name):
    student, teacher = pair
    unit = Distiller(student, {"it": TERMS[name](student, teacher)})
    unit.bind({"teacher": teacher})
    with torch.no_grad():
        lesson = Lesson(teacher(images), targets)
    _, terms, _ = unit.losses(images, targets, {"teacher": lesson})
    assert terms["it"].isfinite() and terms["it"].dtype == torch.float32
    student.zero_grad()
    terms["it"].backward()
    if name != "pseudo_label":  # a fresh teacher is sure of nothing
        assert student.backbone.stem.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_scores_teach_class_and_objectness_together(images):
    student, teacher = small("yolov5"), small("yolov5", seed=1)
    term, said = DenseSigmoidTerm(student, teacher), student(images)
    assert term(said, said, [], (64, 64)) == 0
    term(said, teacher(images), [], (64, 64)).backward()
    head = student.head
    assert all(x.weight.grad.abs().sum() > 0 for x in (*head.class_logits, *head.objectness))
    assert all(x.weight.grad is None for x in head.boxes)
    boxes = BoxMimicTerm(student, teacher)
    student.zero_grad()
    boxes(student(images), teacher(images), [], (64, 64)).backward()
    assert all(x.weight.grad.abs().sum() > 0 for x in head.boxes)


def test_a_sure_teachers_detections_are_learnt(images):
    student, teacher = small("yolov5"), small("yolov4", seed=1).eval()
    with torch.no_grad():
        teacher.head.objectness[1].bias += 8
        teacher.head.class_logits[1].bias[1::2] += 8
        output = teacher(images)
    term = PseudoLabelTerm(student, teacher)
    assert term(student(images), output, [], (64, 64)) > 2 * term(
        student(images), small("yolov4")(images), [], (64, 64)
    )


def test_heads_without_counterparts_are_refused(pair, build_tiny):
    student, teacher = pair
    with pytest.raises(ValueError, match="the student makes 3, the teacher 1; choose pseudo_label"):
        DenseSigmoidTerm(student, build_tiny())
    with pytest.raises(ValueError, match="ld needs dense heads with equally long distributions"):
        LDTerm(student, teacher)
    with pytest.raises(ValueError, match="cross_kd sends features from one head of"):
        CrossKDTerm(student, teacher)
    assert ScoreWeightedMimicTerm(student, build_tiny()).level_names == ["P3", "P4", "P5"]


def test_a_teacher_of_other_classes_is_put_in_order(images):
    teacher = small("yolov7", class_names=["x", "b", "a"]).eval()
    with torch.no_grad():
        for layer in teacher.class_layers:
            torch.nn.init.normal_(layer.bias)
        before = [x.unflatten(1, (3, 3)) for x in teacher(images).class_logits]
        speak(teacher, ["a", "b", "c"])
        after = [x.unflatten(1, (3, 3)) for x in teacher(images).class_logits]
    assert teacher.unknown == (2,)
    for old, new in zip(before, after):
        torch.testing.assert_close(new[:, :, :2], old[:, :, [2, 1]])
        assert (new[:, :, 2].sigmoid() == 0).all()


def test_a_student_inherits_and_a_teacher_sees_more(images, targets):
    student, teacher = small("yolov5"), small("yolov5", seed=1)
    assert inherit(student, teacher, ["neck", "head"])["head"][0] > 0
    assert torch.equal(student.head.boxes[0].weight, teacher.head.boxes[0].weight)
    scaled = ScaledDetector(teacher, 2.0)
    assert scaled.strides == (4, 8, 16)
    assert all(loss.isfinite() for loss in scaled.loss(scaled(images), targets).values())
