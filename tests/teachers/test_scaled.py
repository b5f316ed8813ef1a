import copy

import pytest
import torch

from distill.terms import TERMS, BoxMimicTerm, PlainMimicTerm
from losses import plain_mimic
from students import DenseOutput
from teachers import ScaledDetector, Teacher, inherit


def test_images_are_seen_at_another_size(build_tiny, images):
    detector = build_tiny(seed=1).eval()
    larger = torch.nn.functional.interpolate(images, (128, 128), mode="bilinear", align_corners=False)
    smaller = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    for scale, seen in ((2.0, larger), (0.5, smaller)):
        found, wanted = ScaledDetector(detector, scale)(images), detector(seen)
        assert all(map(torch.equal, found.class_logits, wanted.class_logits))
    assert ScaledDetector(detector, 2.0).strides == (4, 8, 16)
    assert ScaledDetector(detector, 0.5).strides == (16, 32, 64)


@torch.no_grad()
def test_boxes_are_those_of_a_student_whose_cells_are_as_large(build_tiny):
    student, teacher = build_tiny(levels=(3,)).eval(), ScaledDetector(build_tiny(levels=(4,)), 2.0).eval()
    logits, distances = torch.randn(1, 2, 5, 8), torch.rand(1, 4, 5, 8) * 3
    output = DenseOutput((), (logits,), (distances,))
    [ours], [theirs] = student.decode(output, [(40, 60)]), teacher.decode(output, [(40, 60)])
    assert len(ours.scores) > 5 and ours.boxes.max() == 60
    torch.testing.assert_close(theirs.boxes, ours.boxes)
    assert torch.equal(theirs.labels, ours.labels) and torch.equal(theirs.scores, ours.scores)
    # so the same output is no distance apart
    assert BoxMimicTerm(student, teacher)(output, output, [], (40, 64)).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_that_of_the_larger_boxes(build_tiny, images, targets):
    detector = build_tiny().eval()
    scaled = ScaledDetector(detector, 2.0)
    output = scaled(images)
    larger = [{"boxes": 2 * t["boxes"], "labels": t["labels"]} for t in targets]
    assert scaled.loss(output, targets) == detector.loss(output, larger)


@torch.no_grad()
def test_maps_meet_by_the_strides_that_the_student_sees(build_tiny, images):
    student, teacher = build_tiny(levels=(3, 4)).eval(), ScaledDetector(build_tiny(seed=1), 2.0).eval()
    term = PlainMimicTerm(student, teacher)
    assert term.pairs == [(0, 1), (1, 2)] and term.pairing == "P3, P4 by stride"
    ours, theirs = student(images), teacher(images)
    assert [x.shape[-1] for x in theirs.features] == [16, 8, 4]
    adapted = [adapter(x) for adapter, x in zip(term.adapters.values(), ours.features)]
    wanted = plain_mimic(adapted[0], theirs.features[1]) + plain_mimic(adapted[1], theirs.features[2])
    torch.testing.assert_close(term(ours, theirs, [], (64, 64)), wanted)
    # of one and a half times the size no cell is as large as one of the student's
    odd = ScaledDetector(teacher.detector, 1.5)
    assert PlainMimicTerm(student, odd).pairs == [(0, 1), (1, 2)]  # 32/3 is nearer to 8 than 16/3
    with pytest.raises(ValueError, match="have none in common;"):
        BoxMimicTerm(student, odd)


@pytest.mark.parametrize("name", sorted(set(TERMS) - {"roi_kd"}))  # which is for two-stage detectors
def test_every_term_takes_such_a_teacher(build_tiny, images, targets, name):
    head = {"ld": "gfl"}.get(name, "task_aligned")
    student, teacher = build_tiny(head=head), Teacher(ScaledDetector(build_tiny(seed=1, channels=24, head=head), 2.0))
    torch.nn.init.constant_(teacher.detector.head.class_logits.bias, 1.0)  # sure of something
    term = TERMS[name](student, teacher.detector)
    output = student(images)
    loss = term(output, teacher(images), targets, (64, 64))
    gradients = torch.autograd.grad(loss, output.features, allow_unused=True)
    assert loss.isfinite() and sum(g.abs().sum() for g in gradients if g is not None) > 0


def test_all_else_is_the_detectors(build_tiny):
    detector = build_tiny(seed=1)
    scaled = ScaledDetector(detector, 2.0)
    assert scaled.class_names == ["a", "b"] and scaled.recipe is detector.recipe and scaled.head is detector.head
    assert (scaled.anchors, scaled.box_bins) == (detector.anchors, detector.box_bins)
    assert scaled.feature_channels == detector.feature_channels and scaled.output_layers == detector.output_layers
    assert scaled.normalization == detector.normalization
    with pytest.raises(AttributeError, match="nek"):
        scaled.nek  # noqa: B018
    again = copy.deepcopy(scaled)
    assert again.head is not detector.head and again.scale == 2.0
    student = build_tiny()
    inherit(student, scaled, ["head"])
    assert torch.equal(student.head.class_logits.weight, detector.head.class_logits.weight)
