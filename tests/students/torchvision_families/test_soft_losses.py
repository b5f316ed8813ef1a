"""Targets with scores. The hand-worked cases have anchors of 10 px or 8 px, a score of 0.3, and mostly a class logit of
0, a probability of 1/2, or ln 3, one of 3/4."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder

import students
from students.assignment import Objects
from students.torchvision_families.soft_losses import (
    objects_of,
    soft_cross_entropy,
    soft_fcos_losses,
    soft_proposal_losses,
    soft_retinanet_losses,
    soft_roi_losses,
    soft_ssd_losses,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))
ANCHOR, MOVED = [0.0, 0, 10, 10], [5.0, 0, 15, 10]  # half its width to the right: deltas of 0.5, 0, 0, 0
MEMBERS = {
    "fcos": {"name": "fcos", "backbone": "resnet18", "channels": 32, "head_depth": 1},
    "retinanet": {"name": "retinanet", "backbone": "resnet18", "channels": 32},
    "retinanet v2": {"name": "retinanet", "version": 2, "backbone": "resnet18", "channels": 32},
    "faster_rcnn": {"name": "faster_rcnn", "backbone": "resnet18", "channels": 32},
    "ssdlite320": {"name": "ssdlite320"},
}


def only_first(anchors, box, score=0.3, label=0, images=1):
    """An object on the first anchor of the first image, none on the others."""
    target = {"boxes": torch.tensor([box]), "labels": torch.tensor([label]), "scores": torch.tensor([score])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    matched = torch.full((images, anchors), -1)
    matched[0, 0] = 0
    return objects_of([target, nothing][:images], list(matched))


def fcos(logits, boxes=(0.25,) * 4, central=LN3, score=0.3):
    """One point at (4, 4), of an anchor of 8 px; what it says of boxes is in units of 8 px."""
    said = {
        "cls_logits": logits,
        "bbox_regression": torch.tensor([[boxes]]),
        "bbox_ctrness": torch.full((1, 1, 1), central),
    }
    head = SimpleNamespace(box_coder=BoxLinearCoder(normalize_by_size=True))
    return soft_fcos_losses(head, only_first(1, [0.0, 0, 8, 16], score), said, [torch.tensor([[0.0, 0, 8, 8]])])


def retinanet(logits, kind="l1", score=0.3):
    """An object, background, and an anchor that is neither; a second image is all background."""
    said = {"cls_logits": logits, "bbox_regression": torch.zeros(2, 3, 4)}
    head = SimpleNamespace(regression_head=SimpleNamespace(_loss_type=kind, box_coder=CODER))
    counted = torch.tensor([[True, True, False], [True] * 3])
    objects = only_first(3, MOVED, score, images=2)
    return soft_retinanet_losses(head, objects, counted, said, [torch.tensor([ANCHOR] * 3)] * 2)


def ssd(logits, score=0.3):
    """An object and two of the background, of which one counts."""
    said = {"cls_logits": logits, "bbox_regression": torch.zeros(1, 3, 4)}
    model = SimpleNamespace(neg_to_pos_ratio=1, box_coder=CODER)
    return soft_ssd_losses(model, only_first(3, MOVED, score, label=1), said, [torch.tensor([ANCHOR] * 3)])


def proposals(objectness, score=0.3):
    """An object, one of the background, and an anchor that is not sampled."""
    sampled = torch.tensor([[True, False, False], [False, True, False]])
    anchors = [torch.tensor([ANCHOR] * 3)]
    return soft_proposal_losses(objectness, torch.zeros(3, 4), only_first(3, MOVED, score), *sampled, anchors, CODER)


def roi(logits, score=0.3):
    """An object of the second class, and the background."""
    labels, wanted = torch.tensor([2, 0]), torch.tensor([[0.5, 0, 0, 0]] * 2)
    return soft_roi_losses(logits, torch.zeros(2, 12), labels, wanted, torch.tensor([score, 0.9]))


def test_fcos_by_hand():
    losses = fcos(torch.zeros(1, 1, 2))
    # of its class: (0.25 * 0.3 + 0.75 * 0.7) * (0.5 - 0.3)^2 * ln 2; of the other: 0.75 * 0.5^2 * ln 2
    assert losses["classification"].item() == pytest.approx(0.6 * 0.04 * LN2 + 0.75 * 0.25 * LN2)
    # (2, 2, 6, 6) within (0, 0, 8, 16): IoU and GIoU are 16 / 128
    assert losses["bbox_regression"].item() == pytest.approx(0.3 * (1 - 1 / 8))
    # 4 px to the left, right and top, 12 to the bottom
    central = math.sqrt(4 / 12)
    assert losses["bbox_ctrness"].item() == pytest.approx(0.3 * (central * math.log(4 / 3) + (1 - central) * LN4))


def test_retinanet_by_hand():
    logits = torch.tensor([[[0.0], [0], [9]], [[-99.0]] * 3])
    losses = retinanet(logits)
    # as above, and the background's, divided by one assigned anchor and by two images
    assert losses["classification"].item() == pytest.approx((0.6 * 0.04 + 0.75 * 0.25) * LN2 / 2)
    assert losses["bbox_regression"].item() == pytest.approx(0.3 * 0.5 / 2)
    # the two boxes share 50 of 150 px, and fill the box around both
    assert retinanet(logits, "giou")["bbox_regression"].item() == pytest.approx(0.3 * (1 - 1 / 3) / 2)


def test_ssd_by_hand():
    losses = ssd(torch.tensor([[[0.0, LN3], [0, LN3], [0, 0]]]))
    # of the two of the background the first is the worse
    assert losses["classification"].item() == pytest.approx(0.3 * math.log(4 / 3) + 0.7 * LN4 + LN4)
    assert losses["bbox_regression"].item() == pytest.approx(0.3 * 0.5**2 / 2)


def test_proposals_by_hand():
    objectness, box = proposals(torch.tensor([[LN3], [0], [9]]))
    assert objectness.item() == pytest.approx((0.3 * math.log(4 / 3) + 0.7 * LN4 + LN2) / 2)
    assert box.item() == pytest.approx(0.3 * (0.5 - 1 / 18) / 2)


def test_roi_by_hand():
    # probabilities of 1/4, 1/4 and 1/2
    classes, box = roi(torch.tensor([[0.0, 0, LN2], [0, 0, LN2]]))
    assert classes.item() == pytest.approx((0.3 * LN2 + 0.7 * LN4 + LN4) / 2)
    assert box.item() == pytest.approx(0.3 * (0.5 - 1 / 18) / 2)


def test_softmax_by_pytorchs_cross_entropy_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits, scores = torch.randn(50, 4, generator=generator), torch.rand(50, generator=generator)
    labels = torch.randint(1, 4, (50,), generator=generator)
    wanted = torch.zeros(50, 4).scatter_(1, labels[:, None], scores[:, None])
    wanted[:, 0] = 1 - scores
    torch.testing.assert_close(
        soft_cross_entropy(logits, labels, scores), F.cross_entropy(logits, wanted, reduction="none")
    )


def at_first(x, rest):
    """A class logit x at the first anchor, and what else there is."""
    return torch.cat((x.view(1), torch.tensor(rest)))


@pytest.mark.parametrize(
    "class_loss",
    [
        lambda x: fcos(at_first(x, [-9.0]).view(1, 1, 2))["classification"],
        lambda x: retinanet(at_first(x, [-9.0] * 5).view(2, 3, 1))["classification"],
        # a softmax of 0 and x is the sigmoid of x
        lambda x: ssd(torch.stack((torch.zeros(3), at_first(x, [-9.0, -9.0])), dim=1)[None])["classification"],
        lambda x: proposals(at_first(x, [-9.0, -9.0]).view(3, 1))[0],
        lambda x: roi(torch.stack((torch.zeros(2), torch.full((2,), -99.0), at_first(x, [-9.0])), dim=1))[0],
    ],
    ids=["fcos", "retinanet", "ssd", "proposals", "roi"],
)
def test_the_score_is_where_a_probability_goes(class_loss):
    for probability, direction in [(0.1, -1), (0.3, 0), (0.6, 1), (0.95, 1)]:
        x = torch.tensor(math.log(probability / (1 - probability)), requires_grad=True)
        class_loss(x).backward()
        assert x.grad.item() == pytest.approx(0, abs=1e-7) if direction == 0 else x.grad.item() * direction > 1e-3


@pytest.fixture(scope="module", params=MEMBERS)
def learner(request):
    """A detector and what it says of three images, from whose pyramid and heads gradients are asked."""
    torch.manual_seed(0)
    detector = students.build(class_names=["a", "b"], **MEMBERS[request.param]).train()
    return detector, detector(torch.rand(3, 3, 64, 64))


def targets(*scores):
    """Two objects, one that covers its image, and an image without any; with scores where there are some."""
    boxes = [torch.tensor([[4.0, 4, 40, 44], [30, 20, 62, 60]]), torch.tensor([[0.0, 0, 64, 64]]), torch.zeros(0, 4)]
    labels = [torch.tensor([0, 1]), torch.tensor([1]), torch.zeros(0, dtype=torch.long)]
    made = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels)]
    return [t | {"scores": s} for t, s in zip(made, scores)] + made[len(scores) :]


def losses_of(learner, targets):
    torch.manual_seed(1)  # proposals and anchors are sampled
    return learner[0].loss(learner[1], targets)


@torch.no_grad()
def test_objects_of_score_1_are_true_ones(learner):
    wanted, ones = losses_of(learner, targets()), (torch.ones(2), torch.ones(1), torch.ones(0))
    for number in (1, 3):  # of the images; what has no scores is true
        found = losses_of(learner, targets(*ones[:number]))
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_boxes_count_by_their_score(learner):
    true, half = (
        losses_of(learner, targets()),
        losses_of(learner, targets(torch.full((2,), 0.5), torch.full((1,), 0.5))),
    )
    boxes = [name for name in true if "reg" in name or "ctrness" in name]
    assert len(boxes) == (1 if len(true) == 2 else 2)
    for name in boxes:
        torch.testing.assert_close(half[name], true[name] / 2, atol=1e-6, rtol=1e-4)
    assert all(half[name] != true[name] for name in true)


@torch.no_grad()
def test_without_boxes_it_is_torchvisions_loss_of_nothing(learner):
    nothing = targets()[2:] * 3
    wanted = losses_of(learner, nothing)
    found = losses_of(learner, [t | {"scores": torch.zeros(0)} for t in nothing])
    assert all(value.isfinite() for value in found.values())
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_the_gradient_goes_to_the_student_alone(learner):
    detector, _ = learner
    scores = torch.tensor([0.3, 0.8], requires_grad=True)
    made = targets(scores)
    output = detector(torch.rand(3, 3, 64, 64).to(memory_format=torch.channels_last))
    detector.zero_grad()
    losses = losses_of((detector, output), made)
    sum(losses.values()).backward()
    assert scores.grad is None
    assert [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_low_precision(learner):
    detector, _ = learner
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = detector(torch.rand(3, 3, 64, 64))
        losses = losses_of((detector, output), targets(torch.tensor([0.3, 0.8]).bfloat16()))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())


def test_objects_of_anchors():
    found = only_first(2, MOVED, images=2)
    assert isinstance(found, Objects)
    assert found.mask.tolist() == [[True, False], [False, False]]
    assert found.scores.tolist() == [[pytest.approx(0.3), 0], [0, 0]]
    assert found.boxes[0, 0].tolist() == MOVED
