import math

import pytest
import torch

from students.assignment import pad_targets
from students.yolo.assignment import Matches, Predicted
from students.yolo.loss import Gains, balanced_losses, darknet_losses

GAINS = Gains(box=0.05, objectness=1.0, classification=0.5)
ZERO = math.log(2)  # cross-entropy of a logit of 0


def predict(num_classes=2):
    """One anchor on maps of 2x1, 1x1 and 1x1 cells: four predictions, in all of which nothing is said."""
    boxes = torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 0, 16, 16], [0, 0, 32, 32]]])
    shapes = ((1, 2), (1, 1), (1, 1))
    return Predicted(boxes, torch.zeros(1, 4, num_classes), torch.zeros(1, 4), shapes, torch.ones(3, 1, 2))


def pad(boxes, labels, **more):
    boxes, labels = torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(labels, dtype=torch.long)
    return pad_targets([{"boxes": boxes, "labels": labels, **more}], torch.device("cpu"))


def match(*pairs, sizes=(2, 1, 1)):
    """(prediction, object, counted) each."""
    predictions, objects, counted = (torch.tensor([column]) for column in zip(*pairs))
    return Matches(predictions, objects, counted.bool(), sizes)


def test_balanced_losses_of_known_matches():
    # of the fine level one match fits to the pixel, one is half of its object's width: IoU 1/2, centres 4 px apart on
    # a diagonal of 16^2 + 8^2 px, v = 4/pi^2 (atan 2 - atan 1)^2
    objects = pad([[0, 0, 8, 8], [8, 0, 24, 8]], [0, 1])
    found = balanced_losses(predict(), objects, match((0, 0, 1), (1, 1, 1), (2, 0, 0), (3, 0, 0)), GAINS)
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    overlap = 0.5 - 16 / 320 - v * v / (0.5 + v)
    assert found["box"].item() == pytest.approx(64 * 0.05 * (1 - overlap) / 2, rel=1e-5)
    # two classes, each of both matches costs log 2; the mean over matches and classes
    assert found["classification"].item() == pytest.approx(64 * 0.5 * (2 / 80) * ZERO, rel=1e-5)
    # any target costs log 2 where nothing is said; 16 x 8 pixels
    area = 8 * 16 / 640**2
    assert found["objectness"].item() == pytest.approx(64 * area * ZERO * (4.0 + 1.0 + 0.4), rel=1e-5)


def test_objectness_should_be_the_best_overlap():
    objects = pad([[0, 0, 8, 8], [0, 0, 16, 8]], [0, 0])
    predicted = predict()
    predicted = predicted._replace(objectness=torch.zeros(1, 4, requires_grad=True))
    loss = balanced_losses(predicted, objects, match((0, 0, 1), (0, 1, 1), (2, 0, 0), (3, 0, 0)), GAINS)["objectness"]
    loss.backward()
    # gradients are (1/2 - target) * weight: the target of the first is 1, of the others 0
    weight = 64 * 8 * 16 / 640**2 * torch.tensor([[4 / 2, 4 / 2, 1.0, 0.4]])
    torch.testing.assert_close(predicted.objectness.grad, weight * torch.tensor([[-0.5, 0.5, 0.5, 0.5]]))


def test_scores_weigh_what_objects_ask_for():
    pairs = match((0, 0, 1), (1, 0, 0), (2, 0, 0), (3, 0, 0))
    boxes = [[0, 0, 16, 8]]
    whole, half = (
        balanced_losses(predict(), pad(boxes, [0], scores=torch.tensor([score])), pairs, GAINS) for score in (1.0, 0.5)
    )
    assert half["box"] == whole["box"] / 2 and half["classification"] == whole["classification"] / 2
    whole, half = (
        darknet_losses(predict(), pad(boxes, [0], scores=torch.tensor([score])), pairs) for score in (1.0, 0.5)
    )
    assert half["box"] == whole["box"] / 2 and half["classification"] == whole["classification"] / 2


def test_darknet_losses_of_known_matches():
    # the second prediction lies on an object by 8x8 of 8x8 + 8x1, more than 0.7, and answers for none
    objects = pad([[0, 0, 8, 8], [8, 0, 16, 9]], [0, 1])
    found = darknet_losses(predict(3), objects, match((0, 0, 1), (2, 1, 1), (3, 0, 0)))
    # the third, 16x16: IoU 72/256; centres (8, 8) and (12, 4.5), diagonal 16^2 + 16^2
    v = 4 / math.pi**2 * (math.atan(8 / 9) - math.atan(1)) ** 2
    overlap = 72 / 256 - (16 + 12.25) / 512 - v * v / (1 - 72 / 256 + v)
    assert found["box"].item() == pytest.approx(0.07 * (1 - overlap), rel=1e-5)
    assert found["classification"].item() == pytest.approx(2 * 3 * ZERO, rel=1e-5)
    assert found["objectness"].item() == pytest.approx(3 * ZERO, rel=1e-5)


def test_no_objects():
    nothing = pad([], [])
    pairs = match((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0))
    for losses in (balanced_losses(predict(), nothing, pairs, GAINS), darknet_losses(predict(), nothing, pairs)):
        assert losses["box"] == losses["classification"] == 0 and losses["objectness"] > 0
    assert darknet_losses(predict(), nothing, pairs)["objectness"].item() == pytest.approx(4 * ZERO)


def test_targets_have_no_gradient():
    predicted = predict()
    predicted = predicted._replace(
        boxes=predicted.boxes.clone().requires_grad_(), objectness=predicted.objectness.requires_grad_()
    )
    objects = pad([[1, 1, 9, 7]], [0])
    loss = balanced_losses(predicted, objects, match((0, 0, 1), (1, 0, 0), (2, 0, 0), (3, 0, 0)), GAINS)
    (gradient,) = torch.autograd.grad(loss["objectness"], predicted.boxes, allow_unused=True)
    assert gradient is None  # the overlap that objectness should tell is none of the box's business
    (gradient,) = torch.autograd.grad(loss["box"], predicted.boxes)
    assert gradient[0, 0].abs().sum() > 0 and not gradient[0, 1:].any()
