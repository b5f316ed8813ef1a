import pytest
import torch

from losses import pkd, plain_mimic

MIMICS = [plain_mimic, pkd]


def test_plain_mimic_of_known_maps():
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[3.0, 2.0]]]])
    # (1 + 0 + 9 + 4) / 4
    torch.testing.assert_close(plain_mimic(student, teacher), torch.tensor(3.5))


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


@pytest.mark.parametrize("mimic", MIMICS)
def test_zero_where_student_equals_teacher(mimic):
    features = torch.randn(2, 3, 4, 4)
    assert mimic(features, features.clone()).item() == 0


@pytest.mark.parametrize("mimic", MIMICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_student_learns(mimic, dtype):
    student = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = mimic(student, teacher)
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("mimic", MIMICS)
def test_shapes_are_checked(mimic):
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        mimic(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    for shape in [(0, 2, 4, 4), (2, 4, 4)]:
        with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
            mimic(torch.zeros(shape), torch.zeros(shape))
