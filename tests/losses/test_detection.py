import math

import pytest
import torch
import torchvision

from losses import distribution_focal_loss, focal_loss, giou_loss, quality_focal_loss


def test_quality_focal_loss_of_known_probabilities():
    logits = torch.tensor([[0.0, math.log(3)]])  # probabilities 1/2 and 3/4
    quality = torch.tensor([[1.0, 0.5]])
    # (1/2)^2 * -ln(1/2) + (1/4)^2 * -(ln(3/4) + ln(1/4)) / 2 = 0.25 ln 2 + 0.03125 ln(16/3)
    expected = 0.25 * math.log(2) + 0.03125 * math.log(16 / 3)
    torch.testing.assert_close(quality_focal_loss(logits, quality), torch.tensor(expected))


def test_quality_focal_loss_beta_is_the_exponent():
    logits, quality = torch.zeros(1, 1), torch.ones(1, 1)
    for beta in (1.0, 2.0, 3.0):
        torch.testing.assert_close(
            quality_focal_loss(logits, quality, beta), torch.tensor(0.5**beta * math.log(2)), msg=f"beta {beta}"
        )


def test_quality_focal_loss_differentiates_the_modulating_factor_too():
    logits = torch.zeros(1, 1, requires_grad=True)
    quality_focal_loss(logits, torch.ones(1, 1)).backward()
    # L = (1 - p)^2 * -ln p, dp/dz = p (1 - p): at p = 1/2, (2 (1 - p) ln p - (1 - p)^2 / p) / 4 = (-ln 2 - 1/2) / 4.
    torch.testing.assert_close(logits.grad, torch.tensor([[(-math.log(2) - 0.5) / 4]]))


def test_quality_focal_loss_survives_extreme_logits():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(400.0))  # each element: 1^2 * 200
    assert logits.grad.isfinite().all()


def test_focal_loss_of_known_probabilities():
    logits = torch.tensor([[0.0, math.log(3)]])  # probabilities 1/2 and 3/4
    # 0.25 (1/2)^2 ln 2, and twice 0.75 (3/4)^2 ln 4
    expected = 0.0625 * math.log(2) + 2 * 0.75 * 0.5625 * math.log(4)
    loss = focal_loss(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(loss, torch.tensor(expected))
    # alpha 0.1, gamma 1
    loss = focal_loss(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), alpha=0.1, gamma=1.0)
    torch.testing.assert_close(loss, torch.tensor(0.1 * 0.5 * math.log(2)))


def test_focal_loss_asks_for_a_soft_target():
    logits = torch.tensor([[math.log(3)]], requires_grad=True)
    assert focal_loss(logits, torch.tensor([[0.75]]), torch.ones(1, 1)) < 1e-12
    # p = 3/4 against 1/2: (0.25 / 2 + 0.75 / 2) (1/4)^2 * -(ln(3/4) + ln(1/4)) / 2
    loss = focal_loss(logits, torch.tensor([[0.5]]), torch.ones(1, 1))
    torch.testing.assert_close(loss, torch.tensor(0.5 / 16 * math.log(16 / 3) / 2))
    loss.backward()
    assert logits.grad > 0


def test_distribution_focal_loss_of_known_distributions():
    logits = torch.tensor([0.0, math.log(2), 0]).expand(4, 3)  # probabilities 1/4, 1/2, 1/4 of 0, 1 and 2
    # 1.25 lies between 1 and 2: -(3/4 ln(1/2) + 1/4 ln(1/4)) = 5/4 ln 2; the others meet one bin of 1/4: 2 ln 2
    for number, expected in enumerate((1.25, 2, 2, 2)):
        weight = torch.zeros(4)
        weight[number] = 3
        loss = distribution_focal_loss(logits, torch.tensor([1.25, 2, 7, -1]), weight)
        torch.testing.assert_close(loss, torch.tensor(3 * expected * math.log(2)), msg=f"number {number}")


def test_distribution_focal_loss_is_least_around_the_target():
    # 1.3 is the mean of 0.7 at 1 and 0.3 at 2
    logits = torch.tensor([[1e-9, 0.7, 0.3, 1e-9]]).log().requires_grad_()
    distribution_focal_loss(logits, torch.tensor([1.3]), torch.ones(1)).backward()
    assert logits.grad.abs().max() < 1e-6


def test_giou_loss_of_known_boxes():
    pred = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [3, 3, 5, 4]])
    target = torch.tensor([[1.0, 1, 3, 3], [2, 0, 3, 1], [3, 3, 5, 4]])
    # GIoU 1/7 - 2/9 = -5/63, -1/3 and 1; so 0.5 * 68/63 + 3 * 4/3 + 7 * 0.
    torch.testing.assert_close(giou_loss(pred, target, torch.tensor([0.5, 3, 7])), torch.tensor(34 / 63 + 4))


def cross_entropy(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -(target * math.log(p) + (1 - target) * math.log(1 - p)), abs(p - target)


def test_focal_losses_agree_with_loops():
    logits, target, weight = torch.randn(4, 3), torch.rand(4, 3), torch.rand(4, 3)
    quality, focal = 0.0, 0.0
    for z, y, w in zip(*(values.flatten().tolist() for values in (logits, target, weight))):
        entropy, distance = cross_entropy(z, y)
        quality += distance**1.5 * entropy
        focal += w * (0.3 * y + 0.7 * (1 - y)) * distance**1.5 * entropy
    torch.testing.assert_close(quality_focal_loss(logits, target, 1.5), torch.tensor(quality))
    torch.testing.assert_close(focal_loss(logits, target, weight, 0.3, 1.5), torch.tensor(focal))


def test_distribution_focal_loss_agrees_with_loops():
    logits, target, weight, total = torch.randn(2, 3, 5), torch.rand(2, 3) * 4, torch.rand(2, 3), 0.0
    for image in range(2):
        for row in range(3):
            powers, y = [math.exp(z) for z in logits[image, row].tolist()], target[image, row].item()
            for value, power in enumerate(powers):
                share = max(0.0, 1 - abs(value - y))  # how much of the target is this bin's
                total -= weight[image, row].item() * share * math.log(power / sum(powers))
    torch.testing.assert_close(distribution_focal_loss(logits, target, weight), torch.tensor(total))


def test_giou_loss_agrees_with_another_giou():
    corner, size = 10 * torch.rand(2, 6, 2), 10 * torch.rand(2, 6, 2) + 1
    (pred, target), weight = torch.cat([corner, corner + size], dim=-1), torch.rand(6)
    expected = (weight * torchvision.ops.generalized_box_iou_loss(pred, target)).sum()
    torch.testing.assert_close(giou_loss(pred, target, weight), expected)


def test_targets_and_weights_do_not_learn():
    logits, boxes = torch.randn(4, 5, requires_grad=True), torch.rand(4, 4, requires_grad=True)
    others = [torch.rand(shape, requires_grad=True) for shape in [(4, 5), (4, 5), (4,), (4,), (4, 4)]]
    target, weight, place, row_weight, target_boxes = others
    loss = focal_loss(logits, target, weight) + quality_focal_loss(logits, target)
    loss = loss + distribution_focal_loss(logits, place, row_weight) + giou_loss(boxes, target_boxes, row_weight)
    loss.backward()
    assert all(x.grad is None for x in others)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"quality_focal_loss.*\(2, 3\) and \(2, 1\) differ"):
        quality_focal_loss(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"giou_loss.*\(2, 4\) and \(1, 4\) differ"):
        giou_loss(torch.zeros(2, 4), torch.zeros(1, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"weight has shape \(2, 1\)"):
        giou_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"focal_loss.*\(2, 3\) and \(2, 1\) differ"):
        focal_loss(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"focal_loss: weight has shape \(2,\)"):
        focal_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"distribution_focal_loss: weight has shape \(2, 3\)"):
        distribution_focal_loss(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"distribution_focal_loss.*\(1,\) and \(2,\) differ"):
        distribution_focal_loss(torch.zeros(2, 3), torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match=r"logits have shape \(2, 1\); give 2 bins or more"):
        distribution_focal_loss(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
