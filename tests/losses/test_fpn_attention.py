import pytest
import torch

from losses import attention_transfer


def test_attention_transfer_of_known_maps():
    student = torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]])
    teacher = torch.tensor([[[[2.0, 0.0]]]])
    # Student: mean squares (1, 2) over sqrt(5). Teacher: (4, 0) over 4 = (1, 0).
    # Mean of (1/sqrt(5) - 1)^2 and 4/5: (1/5 - 2/sqrt(5) + 1 + 4/5) / 2 = 1 - 1/sqrt(5).
    torch.testing.assert_close(attention_transfer(student, teacher), torch.tensor(1 - 5**-0.5))


def test_every_image_is_normalised_for_itself():
    student = torch.stack([torch.ones(1, 1, 2), 10 * torch.ones(1, 1, 2)])
    assert attention_transfer(student, torch.ones(2, 3, 1, 2)).item() < 1e-12


def test_zero_where_student_equals_teacher():
    features = torch.randn(2, 3, 4, 4)
    assert attention_transfer(features, features.clone()).item() == 0


def test_silent_maps_are_finite():
    student = torch.zeros(1, 2, 2, 2, requires_grad=True)
    loss = attention_transfer(student, torch.ones(1, 2, 2, 2))
    loss.backward()
    # (0 - 1/2)^2 at each of the four locations.
    torch.testing.assert_close(loss, torch.tensor(0.25))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_student_learns(dtype):
    student = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 5, 4, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = attention_transfer(student, teacher)
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_shapes_are_checked():
    features = torch.zeros(2, 3, 4, 4)
    for other in [(1, 3, 4, 4), (2, 3, 2, 4), (2, 3, 4, 2)]:
        with pytest.raises(ValueError, match="must agree in batch, height and width"):
            attention_transfer(features, torch.zeros(other))
    for shape in [(0, 3, 4, 4), (3, 4, 4)]:
        with pytest.raises(ValueError, match=r"must be \(B, C, H, W\), not empty"):
            attention_transfer(torch.zeros(shape), torch.zeros(shape))
