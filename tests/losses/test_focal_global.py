import math

import pytest
import torch
from learnt_layers import shake
from torch import nn

from losses import FGD, FGDGlobal, fgd_attention, fgd_focal, fgd_masks
from losses.focal_global import GlobalContext

BOXES = [torch.tensor([[2.0, 2, 20, 14], [0, 0, 9, 9]]), torch.zeros(0, 4)]  # on 32 x 32 pixels


def focal(student, teacher):
    """All locations count alike."""
    return fgd_focal(student, teacher, torch.ones(len(student), *student.shape[2:]))


def test_focal_of_known_maps():
    three = math.log(3)
    teacher = torch.tensor([[[[0.0, three]], [[0.0, -three]]]])
    student = torch.tensor([[[[2.0, three]], [[0.0, 1 - three]]]])
    # T = 1/2. A^s = 2 softmax(0, ln 9) = (0.2, 1.8); both channels have the mean ln 3 / 2, so A^c = (1, 1).
    # Squares summed over channels: 4 and 1. 0.5 * 0.2 * 4 + 1 * 1.8 * 1 = 2.2.
    mask = torch.tensor([[[0.5, 1.0]]])
    torch.testing.assert_close(fgd_focal(student, teacher, mask), torch.tensor(2.2))
    # Locations and channels swapped: A^c = (0.2, 1.8), A^s = (1, 1). Channel 0 has the squares 4 and 0 at the two
    # locations, channel 1 has 0 and 1: 0.5 * 0.2 * 4 + 1 * 1.8 * 1 = 2.2 again.
    swapped = [features.permute(0, 3, 2, 1).contiguous() for features in (student, teacher)]
    torch.testing.assert_close(fgd_focal(*swapped, mask), torch.tensor(2.2))
    # An image alike beside it halves the loss.
    batch = [torch.cat([features, teacher]) for features in (student, teacher)]
    torch.testing.assert_close(fgd_focal(*batch, mask.expand(2, 1, 2)), torch.tensor(1.1))


def test_focal_agrees_with_loops():
    student, teacher, mask = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), torch.rand(2, 2, 4)
    total = 0.0
    for b in range(2):
        values = teacher[b].abs().tolist()
        spatial = [[math.exp(sum(values[c][y][x] for c in range(3)) / 3 / 0.7) for x in range(4)] for y in range(2)]
        channel = [math.exp(sum(values[c][y][x] for y in range(2) for x in range(4)) / 8 / 0.7) for c in range(3)]
        for c in range(3):
            for y in range(2):
                for x in range(4):
                    weight = 8 * spatial[y][x] / sum(map(sum, spatial)) * 3 * channel[c] / sum(channel)
                    total += (mask[b, y, x] * weight * (teacher[b, c, y, x] - student[b, c, y, x]) ** 2).item()
    torch.testing.assert_close(fgd_focal(student, teacher, mask, temperature=0.7), torch.tensor(total / 2))


def test_focal_is_linear_in_the_mask():
    student, teacher, first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), *torch.rand(2, 2, 4, 4)
    both = 2 * fgd_focal(student, teacher, first) + 3 * fgd_focal(student, teacher, second)
    torch.testing.assert_close(fgd_focal(student, teacher, 2 * first + 3 * second), both)


def test_global_context_starts_as_the_identity():
    features = torch.randn(2, 4, 3, 3)
    assert torch.equal(GlobalContext(4)(features), features)


def test_global_context_of_known_maps():
    context = GlobalContext(2)
    nn.init.zeros_(context.attention.weight)  # even attention: the context is the mean over locations
    nn.init.ones_(context.transform[3].weight)
    context.transform[1].bias.data[:] = 4
    features = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
    # One hidden channel: its layer norm gives 0, plus the bias 4; both output channels add 4.
    torch.testing.assert_close(context(features), features + 4)


def test_global_of_known_maps():
    student, teacher = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]], [[2.0, 0.0]]]])
    loss = FGDGlobal(2)
    # Both blocks are the identity at first: 0 + 4 + 4 + 0.
    torch.testing.assert_close(loss(student, teacher), torch.tensor(8.0))
    loss.teacher_context.transform[3].bias.data[:] = 1  # adds 1 to the teacher's: 1 + 1 + 9 + 1
    torch.testing.assert_close(loss(student, teacher), torch.tensor(12.0))
    batch = [torch.cat([features, features]) for features in (student, teacher)]
    torch.testing.assert_close(loss(*batch), torch.tensor(12.0))


def test_global_agrees_with_loops():
    module = FGDGlobal(4)
    shake(module)
    student, teacher = torch.randn(2, 4, 2, 3), torch.randn(2, 4, 2, 3)

    def relate(features, block):
        """One image, (4, 6)."""
        weight, bias = block.attention.weight.flatten(), block.attention.bias
        powers = [math.exp((weight @ features[:, j] + bias).item()) for j in range(6)]
        context = sum(powers[j] / sum(powers) * features[:, j] for j in range(6))
        first, norm, _, last = block.transform
        hidden = first.weight.flatten(1) @ context + first.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt()
        hidden = (hidden * norm.weight.flatten() + norm.bias.flatten()).clamp(min=0)
        added = last.weight.flatten(1) @ hidden + last.bias
        return torch.stack([features[:, j] + added for j in range(6)], dim=1)

    total = 0.0
    for image in range(2):
        ours = relate(student[image].flatten(1), module.student_context)
        theirs = relate(teacher[image].flatten(1), module.teacher_context)
        total += (ours - theirs).square().sum().item()
    torch.testing.assert_close(module(student, teacher), torch.tensor(total / 2))


def test_the_whole_of_known_maps():
    three = math.log(3)
    teacher = torch.tensor([[[[0.0, three]], [[0.0, -three]]]])
    student = torch.tensor([[[[2.0, three]], [[0.0, three]]]])
    # The box covers column 0 and, up to ceil(1/2) = 1 with both ends, column 1, and rows 0 and 1: 1/4 everywhere, and
    # nothing is background. T = 1/2: A^s = (0.2, 1.8), A^c = (1, 1), squares 4 and 4 ln^2 3 of channel 2.
    focal = (0.2 * 4 + 1.8 * 4 * three**2) / 4
    # The student's attention: means (1, ln 3) over T, softmax (e^2, 9) / (e^2 + 9), twice; its channels' means are
    # 1 + ln 3 / 2 and ln 3 / 2, over T ln 3 + (2, 0): 2 (e^2, 1) / (e^2 + 1) against (1, 1).
    square = math.e**2
    spatial = 2 * abs(0.2 - 2 * square / (square + 9))  # two locations, of the same difference
    channel = 2 * abs(1 - 2 * square / (square + 1))
    # Relations, still F: 4 + 4 ln^2 3.
    expected = 2 * focal + 5 * (spatial + channel) + 7 * (4 + 4 * three**2)
    loss = FGD(2, alpha=2.0, beta=3.0, gamma=5.0, lambda_=7.0, temperature=0.5)
    torch.testing.assert_close(
        loss(student, teacher, [torch.tensor([[0.0, 0, 4, 8]])], (8, 16)), torch.tensor(expected)
    )
    # Without boxes all is background, of two locations, 1/2 each: twice the focal part, at 3 for 2.
    expected += 3 * 2 * focal - 2 * focal
    torch.testing.assert_close(loss(student, teacher, [torch.zeros(0, 4)], (8, 16)), torch.tensor(expected))


def test_the_whole_is_the_weighted_sum_of_its_parts():
    fgd = FGD(3, alpha=2.0, beta=3.0, gamma=5.0, lambda_=7.0, temperature=0.6)
    shake(fgd)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    foreground, background = fgd_masks(BOXES, (32, 32), (4, 4))
    expected = 2 * fgd_focal(student, teacher, foreground, 0.6) + 3 * fgd_focal(student, teacher, background, 0.6)
    expected = expected + 5 * fgd_attention(student, teacher, 0.6) + 7 * fgd.relation(student, teacher)
    torch.testing.assert_close(fgd(student, teacher, BOXES, (32, 32)), expected)


def test_defaults_are_the_anchor_free_ones():
    fgd = FGD(2)
    assert (fgd.alpha, fgd.beta, fgd.gamma, fgd.lambda_, fgd.temperature) == (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8)


def test_without_boxes_all_is_background_and_a_box_over_all_leaves_none():
    fgd = FGD(3, alpha=1.0, beta=10.0, gamma=0.0, lambda_=0.0, temperature=0.5)
    student, teacher = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    even = fgd_focal(student, teacher, torch.ones(1, 4, 4))
    torch.testing.assert_close(fgd(student, teacher, [torch.zeros(0, 4)], (32, 32)), 10 * even / 16)
    # Rows and columns 0 to 4, both ends: 1 / 25 everywhere.
    torch.testing.assert_close(fgd(student, teacher, [torch.tensor([[0.0, 0, 32, 32]])], (32, 32)), even / 25)


def test_zero_where_student_equals_teacher():
    features = torch.randn(2, 3, 4, 4)
    assert focal(features, features.clone()).item() == 0
    # Before the first step, while both blocks are the identity; afterwards they differ.
    assert FGDGlobal(3)(features, features.clone()).item() == 0
    assert FGD(3)(features, features.clone(), BOXES, (32, 32)).item() == 0
    relation = FGDGlobal(3)
    shake(relation)
    assert relation(features, features.clone()).item() > 0


def test_both_blocks_learn():
    torch.manual_seed(0)  # no hidden channel is behind a closed ReLU everywhere
    module = FGDGlobal(8)
    shake(module)
    module(torch.randn(4, 8, 3, 3), torch.randn(4, 8, 3, 3)).backward()
    # All but the bias of the attention: a constant added before the softmax changes nothing.
    names = {name for name, parameter in module.named_parameters() if parameter.grad.abs().max() < 1e-4}
    assert names == {"student_context.attention.bias", "teacher_context.attention.bias"}


def test_masks_boxes_and_widths_are_checked():
    features = torch.zeros(2, 3, 4, 4)
    for loss_of in (focal, FGDGlobal(2), lambda x, y: FGD(2)(x, y, BOXES, (32, 32))):
        with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\) and \(2, 3, 4, 4\) differ"):
            loss_of(features[:, :2], features)
    with pytest.raises(ValueError, match=r"mask: shape \(2, 1, 4, 4\) for features \(2, 3, 4, 4\)"):
        fgd_focal(features, features, torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"mask: shape \(1, 4, 4\) for features \(2, 3, 4, 4\)"):
        FGD(3)(features, features, BOXES[:1], (32, 32))
    with pytest.raises(ValueError, match="channels is 1"):
        GlobalContext(1)
