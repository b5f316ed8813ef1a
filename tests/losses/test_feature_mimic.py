import math

import pytest
import torch

from losses import cwd, masked_mimic, pkd, plain_mimic, score_weighted_mimic

WEIGHTED = [score_weighted_mimic, masked_mimic]


def test_plain_mimic_of_known_maps():
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[3.0, 2.0]]]])
    # (1 + 0 + 9 + 4) / 4
    torch.testing.assert_close(plain_mimic(student, teacher), torch.tensor(3.5))


def test_plain_mimic_agrees_with_loops():
    student, teacher = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    squares = [(s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist())]
    torch.testing.assert_close(plain_mimic(student, teacher), torch.tensor(sum(squares) / (2 * 3 * 2 * 4)))


def test_pkd_of_known_maps():
    student = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0, 1.0]]]])
    # Mean 1, unbiased variance (1 + 0 + 1) / 2 = 1, so z = (-1, 0, 1) and (-1, 1, 0): 0.5 * (0 + 1 + 1) / 3.
    torch.testing.assert_close(pkd(student, teacher), torch.tensor(1 / 3))


def test_pkd_is_one_minus_pearson_correlation():
    student, teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    correlations = []
    for channel in range(3):
        pair = torch.stack([student[:, channel].flatten(), teacher[:, channel].flatten()])
        correlations.append(torch.corrcoef(pair)[0, 1])
    num_values = 2 * 5 * 4
    expected = (num_values - 1) / num_values * (1 - torch.stack(correlations).mean())
    torch.testing.assert_close(pkd(student, teacher), expected, atol=1e-5, rtol=0)


def test_pkd_ignores_scale_and_shift_of_the_students_channels():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    scale, shift = torch.tensor([0.5, 3.0, 20.0]).view(1, 3, 1, 1), torch.tensor([-4.0, 0.0, 7.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(pkd(student * scale + shift, teacher), pkd(student, teacher), atol=1e-4, rtol=0)
    torch.testing.assert_close(pkd(teacher * scale + shift, teacher), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert pkd(-teacher, teacher) > 1.9  # a mirrored map is as wrong as can be, however alike its scale


def test_pkd_statistics_run_over_the_batch():
    # Each image alone is constant; only against the other one does it say anything.
    student = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert pkd(student, 5 * student).item() < 1e-6
    # z = -+s against +-s with s^2 = 7/8 (8 values, unbiased): 0.5 * (2 s)^2.
    torch.testing.assert_close(pkd(student, -student), torch.tensor(2 * 7 / 8), atol=1e-5, rtol=0)


def test_pkd_of_dead_channels_and_single_values_is_finite():
    for shape in [(1, 2, 1, 1), (2, 2, 3, 3)]:
        student = torch.ones(shape, requires_grad=True)
        loss = pkd(student, torch.full(shape, 3.0))
        loss.backward()
        assert loss.item() == 0
        assert student.grad.isfinite().all()


def test_score_weighted_mimic_of_known_maps():
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]], [[[5.0, 0.0]], [[0.0, 1.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[3.0, 2.0]]], [[[5.0, 3.0]], [[0.0, 0.0]]]])
    scores = torch.tensor([[[0.5, 0.25]], [[0.9, 0.1]]])
    # Squares summed over the two channels: 1 + 9 = 10 and 0 + 4 = 4; 0 and 9 + 1 = 10.
    # (0.5 * 10 + 0.25 * 4 + 0.9 * 0 + 0.1 * 10) / (2 channels * 1.75) = 7 / 3.5
    torch.testing.assert_close(score_weighted_mimic(student, teacher, scores), torch.tensor(2.0))


def test_masked_mimic_of_known_maps():
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]], [[[5.0, 0.0]], [[0.0, 1.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[3.0, 2.0]]], [[[5.0, 3.0]], [[0.0, 0.0]]]])
    mask = torch.tensor([[[True, False]], [[True, True]]])
    # Squares summed over the two channels at the three masked locations: (10 + 0 + 10) / (2 * 3).
    torch.testing.assert_close(masked_mimic(student, teacher, mask), torch.tensor(10 / 3))


def test_cwd_of_known_maps():
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[0.0, math.log(3)]], [[7.0, 7.0]]]])
    # Channel 0: p_T = (1/4, 3/4), p_S = (1/2, 1/2): KL = ln(1/2) / 4 + 3 ln(3/2) / 4. Channel 1: both even, 0.
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    torch.testing.assert_close(cwd(student, teacher), torch.tensor(divergence / 2))
    # Twice the logits at twice the temperature are the same distributions; the factor is 2^2.
    torch.testing.assert_close(cwd(student, 2 * teacher, temperature=2.0), torch.tensor(4 * divergence / 2))


def test_cwd_agrees_with_loops():
    student, teacher, temperature = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), 1.5
    total = 0.0
    for image in range(2):
        for channel in range(3):
            s, t = (
                [math.exp(v / temperature) for v in m[image, channel].flatten().tolist()] for m in (student, teacher)
            )
            s, t = [v / sum(s) for v in s], [v / sum(t) for v in t]
            total += sum(q * math.log(q / p) for p, q in zip(s, t))
    torch.testing.assert_close(cwd(student, teacher, temperature), torch.tensor(temperature**2 * total / 6))


def test_cwd_ignores_offsets():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(cwd(student + 5, teacher - 3), cwd(student, teacher), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mimic", WEIGHTED)
def test_weighted_mimics_agree_with_loops(mimic):
    student, teacher, weights = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), torch.rand(2, 2, 4)
    if mimic is masked_mimic:
        weights = (weights > 0.4).float()
    squares, total = 0.0, 0.0
    for b in range(2):
        for y in range(2):
            for x in range(4):
                weight = weights[b, y, x].item()
                total += weight
                for c in range(3):
                    squares += weight * (student[b, c, y, x] - teacher[b, c, y, x]).item() ** 2
    expected = squares / (2 * total) if mimic is masked_mimic else squares / (3 * total)
    torch.testing.assert_close(mimic(student, teacher, weights), torch.tensor(expected))


def test_equal_scores_are_plain_mimic():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    loss = score_weighted_mimic(student, teacher, torch.full((2, 4, 4), 0.03))
    torch.testing.assert_close(loss, plain_mimic(student, teacher))


@pytest.mark.parametrize("mimic", WEIGHTED)
def test_images_without_weight_do_not_count(mimic):
    student, teacher, weights = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.ones(2, 4, 4)
    weights[1] = 0
    alone = mimic(student[:1], teacher[:1], weights[:1])
    torch.testing.assert_close(mimic(student, teacher, weights), alone)


@pytest.mark.parametrize("mimic", WEIGHTED)
def test_weights_are_checked_and_do_not_learn(mimic):
    student, weights = torch.randn(2, 3, 4, 4, requires_grad=True), torch.rand(2, 4, 4, requires_grad=True)
    mimic(student, torch.randn(2, 3, 4, 4), weights).backward()
    assert weights.grad is None
    for shape in [(2, 1, 4, 4), (2, 4, 3), (1, 4, 4)]:
        with pytest.raises(ValueError, match=r"for features \(2, 3, 4, 4\); it must be \(2, 4, 4\)") as error:
            mimic(student, torch.randn(2, 3, 4, 4), torch.zeros(shape))
        assert str(shape) in str(error.value)


@pytest.mark.parametrize("mimic", [plain_mimic, pkd, cwd, *WEIGHTED])
def test_widths_are_checked(mimic):
    weights = [torch.zeros(1, 4, 4)] if mimic in WEIGHTED else []
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        mimic(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4), *weights)
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
        mimic(torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), *weights)
