import math

import pytest
import torch

from losses import dense_sigmoid


def test_dense_sigmoid_of_known_probabilities():
    zero, three = 0.0, math.log(3)  # probabilities 1/2 and 3/4
    # Two levels, two classes; level 0 has two locations, level 1 has one.
    teacher = [torch.tensor([[[[three, three]], [[zero, zero]]]]), torch.tensor([[[[zero]], [[-three]]]])]
    student = [torch.tensor([[[[zero, three]], [[zero, zero]]]]), torch.tensor([[[[three]], [[-three]]]])]
    # Two elements differ, by 1/4 each. Level 0: t = 3/4, s = 1/2, BCE = ln 2.
    # Level 1: t = 1/2, s = 3/4, BCE = -(ln(3/4) + ln(1/4)) / 2 = ln(16/3) / 2.
    # N = the highest score at each location = 3/4 + 3/4 + 1/2 = 2.
    expected = (0.25 * math.log(2) + 0.25 * math.log(16 / 3) / 2) / 2
    torch.testing.assert_close(dense_sigmoid(student, teacher), torch.tensor(expected))
    # Both differences are 1/4, so one more power of them divides the loss by 4.
    torch.testing.assert_close(dense_sigmoid(student, teacher, beta=2.0), torch.tensor(expected / 4))


def test_normalizer_is_at_least_one():
    teacher, student = [torch.zeros(1, 1, 1, 1)], [torch.full((1, 1, 1, 1), math.log(3))]
    # N would be 1/2; the loss is 1/4 * ln(16/3) / 2, undivided.
    torch.testing.assert_close(dense_sigmoid(student, teacher), torch.tensor(math.log(16 / 3) / 8))


def test_more_images_do_not_change_the_loss():
    student, teacher = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    once = dense_sigmoid([student], [teacher])
    twice = dense_sigmoid([student.repeat(2, 1, 1, 1)], [teacher.repeat(2, 1, 1, 1)])
    torch.testing.assert_close(once, twice)


def test_zero_where_student_equals_teacher():
    logits = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]
    assert dense_sigmoid(logits, logits).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_student_learns(dtype):
    student = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = dense_sigmoid([student], [teacher])
    assert loss.dtype == torch.float32 and loss.shape == () and loss.isfinite()
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_no_images_is_zero():
    assert dense_sigmoid([torch.zeros(0, 3, 4, 4)], [torch.zeros(0, 3, 4, 4)]).item() == 0


def test_levels_and_shapes_are_checked():
    level = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="the student has 1 levels, the teacher 2"):
        dense_sigmoid([level], [level, level])
    with pytest.raises(ValueError, match="at least one"):
        dense_sigmoid([], [])
    with pytest.raises(ValueError, match=r"level 1: shapes \(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        dense_sigmoid([level, level], [level, level[:, :1]])
