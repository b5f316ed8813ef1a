import math

import pytest
import torch

from losses import attention_transfer, fgd_attention, fuse_levels


def test_attention_transfer_of_known_maps():
    student = torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]])
    teacher = torch.tensor([[[[2.0, 0.0]]]])
    # Student: mean squares (1, 2) over sqrt(5). Teacher: (4, 0) over 4 = (1, 0).
    # Mean of (1/sqrt(5) - 1)^2 and 4/5: (1/5 - 2/sqrt(5) + 1 + 4/5) / 2 = 1 - 1/sqrt(5).
    torch.testing.assert_close(attention_transfer(student, teacher), torch.tensor(1 - 5**-0.5))


def test_attention_transfer_agrees_with_loops():
    student, teacher = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)

    def attention(image):
        strengths = [sum(v * v for v in location) / len(location) for location in image.flatten(1).T.tolist()]
        return [s / math.sqrt(sum(x * x for x in strengths)) for s in strengths]

    total = 0.0
    for image in range(2):
        total += sum((a - b) ** 2 for a, b in zip(attention(student[image]), attention(teacher[image])))
    torch.testing.assert_close(attention_transfer(student, teacher), torch.tensor(total / 16))


def test_every_image_is_normalised_for_itself():
    student = torch.stack([torch.ones(1, 1, 2), 10 * torch.ones(1, 1, 2)])
    assert attention_transfer(student, torch.ones(2, 3, 1, 2)).item() < 1e-12


def test_silent_maps_are_finite():
    student = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss = attention_transfer(student, torch.ones(1, 2, 2, 2))
    loss.backward()
    # (0 - 1/2)^2 at each of the four locations.
    torch.testing.assert_close(loss, torch.tensor(0.25))
    assert student.grad.isfinite().all()


def test_fgd_attention_of_known_maps():
    three = math.log(3)
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[0.0, three]], [[0.0, -three]]]])
    # T = 1/2. Spatial: mean |F| = (0, ln 3), over T (0, ln 9): 2 softmax = 2 (1/10, 9/10) = (0.2, 1.8); the student's
    # is (1, 1): |-0.8| + |0.8| = 1.6. Channel: mean |F| = ln 3 / 2 in both: (1, 1) against (1, 1).
    torch.testing.assert_close(fgd_attention(student, teacher), torch.tensor(1.6))
    # Locations and channels swapped: the channels are (0.2, 1.8), the locations (1, 1).
    swapped = teacher.permute(0, 3, 2, 1).contiguous()
    torch.testing.assert_close(fgd_attention(student, swapped), torch.tensor(1.6))
    # Two images, one of them alike: half of it.
    batch = fgd_attention(torch.zeros(2, 2, 1, 2), torch.cat([teacher, torch.zeros(1, 2, 1, 2)]))
    torch.testing.assert_close(batch, torch.tensor(0.8))


def _attention_by_loops(features, temperature):
    """All of A^s and A^c of one image, as two lists."""
    channels, height, width = features.shape
    values = features.abs().tolist()
    locations = [sum(values[c][y][x] for c in range(channels)) / channels for y in range(height) for x in range(width)]
    means = [
        sum(values[c][y][x] for y in range(height) for x in range(width)) / (height * width) for c in range(channels)
    ]
    result = []
    for strengths in (locations, means):
        powers = [math.exp(strength / temperature) for strength in strengths]
        result.append([len(powers) * power / sum(powers) for power in powers])
    return result


def test_fgd_attention_agrees_with_loops():
    student, teacher = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    total = 0.0
    for image in range(2):
        pairs = zip(_attention_by_loops(student[image], 0.7), _attention_by_loops(teacher[image], 0.7))
        total += sum(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs))
    torch.testing.assert_close(fgd_attention(student, teacher, temperature=0.7), torch.tensor(total / 2))


def test_fgd_attention_is_blind_to_signs():
    features = torch.randn(2, 3, 4, 4)
    assert fgd_attention(-features, features).item() == 0


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 1, 1, 1)])
def test_fgd_attention_of_one_channel_is_finite(shape):
    student = torch.randn(shape, requires_grad=True)
    loss = fgd_attention(student, torch.randn(shape))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_fgd_attention_checks_widths():
    with pytest.raises(ValueError, match=r"fgd_attention.*\(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        fgd_attention(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))


def test_fuse_levels_of_known_maps():
    fine = torch.tensor([[1.0, -2, 0, 0], [0, 0, 0, 5], [-1, -1, 9, 0], [-3, -1, 0, 0]]).view(1, 1, 4, 4)
    middle = torch.tensor([[1.0, 2], [3, 4]]).view(1, 1, 2, 2)
    coarse = torch.tensor([[[[10.0]]]])
    # Maxima of the 2x2 blocks of the finest: 1, 5, -1, 9; the coarsest everywhere: 10. (1 + 1 + 10) / 3 and so on.
    expected = torch.tensor([[12.0, 17], [12, 23]]).view(1, 1, 2, 2) / 3
    torch.testing.assert_close(fuse_levels([fine, middle, coarse]), expected)


def test_fuse_levels_takes_odd_sizes_and_repeats_the_nearest():
    fused = fuse_levels(
        [torch.zeros(2, 3, 7, 5), torch.zeros(2, 3, 3, 3), torch.arange(4.0).view(2, 2).expand(2, 3, 2, 2)]
    )
    # Of 3 rows or columns over 2, floor(i * 2 / 3) = 0, 0, 1.
    expected = torch.tensor([[0.0, 0, 1], [0, 0, 1], [2, 2, 3]]) / 3
    torch.testing.assert_close(fused, expected.expand(2, 3, 3, 3))


def test_one_level_is_itself():
    features = torch.randn(2, 3, 4, 4)
    assert torch.equal(fuse_levels([features]), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_pyramids_meet_in_an_attention_loss(dtype):
    student = [torch.randn(2, 3, side, side, dtype=dtype, requires_grad=True) for side in (8, 4, 2, 1)]
    teacher = [torch.randn(2, 5, side, side, dtype=dtype, requires_grad=True) for side in (8, 4, 2, 1)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        fused = fuse_levels(student)
        loss = attention_transfer(fused, fuse_levels(teacher))
    assert fused.shape == (2, 3, 2, 2) and fused.dtype == torch.float32
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(level.grad.abs().sum() > 0 for level in student)
    assert all(level.grad is None for level in teacher)


def test_fuse_levels_gradient():
    levels = [torch.randn(1, 2, side, side, dtype=torch.float64, requires_grad=True) for side in (4, 2, 1)]
    assert torch.autograd.gradcheck(lambda *xs: fuse_levels(xs), levels)


def test_fuse_levels_checks_levels():
    with pytest.raises(ValueError, match="there are no levels"):
        fuse_levels([])
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and \(1, 2, 2, 2\) must agree in batch and channels"):
        fuse_levels([torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2, 2)])
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
        fuse_levels([torch.zeros(1, 3, 0, 4)])
