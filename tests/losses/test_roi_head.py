import math

import pytest
import torch

from losses import bounded_regression, class_deltas, kd, roi_classification, roi_regression

TARGETS = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 2, 0]])
FOREGROUND = torch.tensor([1.0, 0.5, 0])


def regression(student, teacher):
    return roi_regression(student, teacher, FOREGROUND)


def bounded(student, teacher):
    return bounded_regression(student, teacher, TARGETS, FOREGROUND)


# Each takes three proposals with four numbers, logits or deltas.
LOSSES = [roi_classification, regression, bounded]


def test_roi_classification_of_known_probabilities():
    # The background, class 1, is 3/4 against 1/2 on one of two proposals.
    student, teacher = torch.tensor([[0.0, math.log(3)], [0, 0]]), torch.zeros(2, 2)
    expected = torch.tensor(math.log(4 / 3) / 2 / 2)
    torch.testing.assert_close(roi_classification(student, teacher), expected)
    torch.testing.assert_close(roi_classification(2 * student, teacher, 2.0), 4 * expected)


def test_roi_classification_is_kd():
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    assert torch.equal(roi_classification(student, teacher, 2.0), kd(student, teacher, 2.0))


def test_roi_regression_of_known_deltas():
    student = torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1], [9, 9, 9, 9]])
    teacher = torch.tensor([[0.5, 2, 0, 0], [1, 1, 1, 4], [0, 0, 0, 0]])
    # (1/8 + 3/2) / 4 and (5/2) / 4, weighted 1 and 1/2 of 3/2; the third is background.
    expected = (1.625 / 4 + 0.5 * 2.5 / 4) / 1.5
    torch.testing.assert_close(regression(student, teacher), torch.tensor(expected))


def test_roi_regression_is_its_formula():
    student, teacher, weight = torch.randn(5, 8) * 2, torch.randn(5, 8), torch.rand(5)
    total = 0.0
    for s, t, w in zip(student.tolist(), teacher.tolist(), weight.tolist()):
        for a, b in zip(s, t):
            total += w * (0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5) / 8
    torch.testing.assert_close(roi_regression(student, teacher, weight), torch.tensor(total / weight.sum().item()))


def test_bounded_regression_of_known_deltas():
    student = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 3], [9, 9, 9, 9]])
    teacher = torch.tensor([[1.0, 0, 0, 0], [1, 4, 1, 1], [2, 0, 2, 0]])
    # Squared errors 2 against 1, so the student is to learn; 4 against 9, so it is not; background.
    torch.testing.assert_close(bounded(student, teacher), torch.tensor(2 / 1.5))
    # 2 exceeds 1 by 1, and not by more.
    assert bounded_regression(student, teacher, TARGETS, FOREGROUND, margin=1.0).item() == 0
    # The paper's m = 6: 4 counts as long as it is not 6 better than the teacher's 9.
    loss = bounded_regression(student, teacher, TARGETS, FOREGROUND, margin=-6.0)
    torch.testing.assert_close(loss, torch.tensor((2 + 0.5 * 4) / 1.5))


def test_bounded_regression_is_its_formula():
    student, teacher, target = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 4)
    weight, total, count = torch.rand(8), 0.0, 0
    for s, t, y, w in zip(student.tolist(), teacher.tolist(), target.tolist(), weight.tolist()):
        student_error = sum((a - b) ** 2 for a, b in zip(s, y))
        if student_error > sum((a - b) ** 2 for a, b in zip(t, y)) + 0.5:
            total, count = total + w * student_error, count + 1
    assert 0 < count < 8
    expected = torch.tensor(total / weight.sum().item())
    torch.testing.assert_close(bounded_regression(student, teacher, target, weight, 0.5), expected)


def test_class_deltas_are_those_of_the_label():
    deltas = torch.arange(24.0).view(3, 8).requires_grad_()  # two classes
    chosen = class_deltas(deltas, torch.tensor([0, 1, 2]))
    # Label 2 is the background, which takes what the last class has.
    assert chosen.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15], [20, 21, 22, 23]]
    chosen.sum().backward()
    assert deltas.grad.sum(dim=1).tolist() == [4, 4, 4]
    # One box for all classes.
    assert torch.equal(class_deltas(deltas[:, :4], torch.tensor([0, 1, 2])), deltas[:, :4])
    assert class_deltas(deltas[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 4)


def test_neither_targets_nor_weights_learn():
    student, others = torch.randn(3, 4, requires_grad=True), torch.zeros(2, 3, 4, requires_grad=True)
    weight = torch.ones(3, requires_grad=True)
    bounded_regression(student, others[0], others[1], weight).backward()
    assert student.grad.abs().sum() > 0
    assert others.grad is None and weight.grad is None


def test_shapes_are_checked():
    values, weight = torch.zeros(3, 4), torch.ones(3)
    for loss in LOSSES:
        with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\) differ"):
            loss(values, values[:2])
    with pytest.raises(ValueError, match=r"roi_classification: logits have shape \(1, 3, 4\)"):
        roi_classification(values[None], values[None])
    with pytest.raises(ValueError, match=r"bounded_regression\(student, target\): shapes \(3, 4\) and \(2, 4\) differ"):
        bounded_regression(values, values, values[:2], weight)
    for loss in (roi_regression, lambda s, t, w: bounded_regression(s, t, t, w)):
        with pytest.raises(ValueError, match=r"weight has shape \(2,\) for values \(3, 4\); it must be \(3,\)"):
            loss(values, values, weight[:2])
    for width in (6, 12):
        deltas = torch.zeros(3, width)
        with pytest.raises(ValueError, match=rf"bounded_regression: deltas have shape \(3, {width}\); .* be \(N, 4\)"):
            bounded_regression(deltas, deltas, deltas, weight)
    with pytest.raises(
        ValueError, match=r"roi_regression: deltas have shape \(3, 6\); .* be \(N, K \* 4\) or \(N, 4\)"
    ):
        roi_regression(torch.zeros(3, 6), torch.zeros(3, 6), weight)
    with pytest.raises(ValueError, match=r"class_deltas: deltas have shape \(3, 6\)"):
        class_deltas(torch.zeros(3, 6), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"class_deltas: labels have shape \(2,\) for deltas \(3, 4\)"):
        class_deltas(values, torch.zeros(2, dtype=torch.long))
