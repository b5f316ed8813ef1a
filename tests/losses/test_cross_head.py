import pytest
import torch

from losses import align_statistics


def test_align_statistics_of_known_maps():
    student = torch.tensor([[[[0.0, 1.0, 2.0]], [[5.0, 5.0, 8.0]]]])
    teacher = torch.tensor([[[[10.0, 14.0, 12.0]], [[1.0, 1.0, 1.0]]]])
    # Channel 0: mean 1, deviation 1 becomes mean 12, deviation 2. Channel 1: the teacher's is constant.
    expected = torch.tensor([[[[10.0, 12.0, 14.0]], [[1.0, 1.0, 1.0]]]])
    torch.testing.assert_close(align_statistics(student, teacher), expected)


def test_align_statistics_is_its_formula():
    student, teacher = torch.randn(2, 3, 2, 2), 4 * torch.randn(2, 3, 2, 2) + 7
    aligned = align_statistics(student, teacher)
    for channel in range(3):
        moments = []
        for features in (student, teacher):
            values = features[:, channel].flatten().tolist()
            mean = sum(values) / 8  # over the batch too
            moments.append((mean, (sum((v - mean) ** 2 for v in values) / 7) ** 0.5))
        (mean_s, std_s), (mean_t, std_t) = moments
        for value, result in zip(student[:, channel].flatten().tolist(), aligned[:, channel].flatten().tolist()):
            assert result == pytest.approx((value - mean_s) / (std_s + 1e-6) * std_t + mean_t, rel=1e-4, abs=1e-4)


def test_a_student_like_the_teacher_is_left_as_it_is():
    features = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(align_statistics(features, features.clone()), features, atol=1e-5, rtol=1e-5)


def test_dead_channels_and_single_values_become_the_teachers_mean():
    for shape in [(1, 2, 1, 1), (2, 2, 3, 3)]:
        student = torch.ones(shape, requires_grad=True)
        teacher = torch.randn(shape)
        aligned = align_statistics(student, teacher)
        aligned.square().sum().backward()
        torch.testing.assert_close(aligned, teacher.mean(dim=(0, 2, 3), keepdim=True).expand(shape))
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_student_learns(dtype):
    student = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        aligned = align_statistics(student, teacher)
    assert aligned.dtype == torch.float32 and aligned.isfinite().all()
    aligned.square().mul(torch.rand(2, 3, 4, 4)).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_gradient_is_that_of_finite_differences():
    student = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: align_statistics(x, teacher), student)


def test_memory_format_does_not_matter():
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    other = align_statistics(student.to(memory_format=torch.channels_last), teacher)
    torch.testing.assert_close(other, align_statistics(student, teacher))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        align_statistics(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    for shape in [(0, 2, 4, 4), (2, 4, 4)]:
        with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
            align_statistics(torch.zeros(shape), torch.zeros(shape))
