import itertools
import math

import pytest
import torch

from losses import query_distillation


def random_queries(batch, queries, classes=3, dtype=torch.float32):
    """Logits, and boxes that lie inside the image."""
    size = torch.rand(batch, queries, 2, dtype=dtype) * 0.4 + 0.05
    center = torch.rand(batch, queries, 2, dtype=dtype) * (1 - size) + size / 2
    return torch.randn(batch, queries, classes, dtype=dtype), torch.cat([center, size], dim=-1)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def class_loss(student, teacher, beta):
    total = 0.0
    for z, q in zip(student, map(sigmoid, teacher)):
        p = sigmoid(z)
        total -= abs(p - q) ** beta * (q * math.log(p) + (1 - q) * math.log(1 - p))
    return total


def box_loss(a, b):
    """5 L1 + 2 (1 - GIoU) of two cxcywh boxes."""
    l1 = sum(abs(x - y) for x, y in zip(a, b))
    a, b = ((c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2) for c in (a, b))
    width, height = max(0.0, min(a[2], b[2]) - max(a[0], b[0])), max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - width * height
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 5 * l1 + 2 * (1 - width * height / union + (around - union) / around)


def test_query_distillation_of_known_queries():
    three = math.log(3)
    teacher_logits = torch.tensor([[[three], [-three]]])  # probabilities 3/4 and 1/4
    teacher_boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]]])
    # The student has them in the other order; its first query, at 1/2, is only half as wide as the teacher's.
    student_logits = torch.tensor([[[-three], [0.0]]])
    student_boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.2, 0.4]]])
    loss = query_distillation(student_logits, student_boxes, teacher_logits, teacher_boxes)
    # QFL (1/4)^2 ln 2; L1 0.2 and GIoU 1/2 (inside it, half its area) with weight 3/4; N = 3/4 + 1/4.
    torch.testing.assert_close(loss, torch.tensor(math.log(2) / 16 + 0.75 * (5 * 0.2 + 2 * 0.5)))


@pytest.mark.parametrize(("student_queries", "teacher_queries"), [(3, 3), (4, 2), (2, 4)])
def test_query_distillation_is_its_formula(student_queries, teacher_queries):
    student, teacher = random_queries(2, student_queries), random_queries(2, teacher_queries)
    total, normalizer = 0.0, 0.0
    for s_logits, s_boxes, t_logits, t_boxes in zip(*(values.tolist() for values in (*student, *teacher))):
        targets = sorted(zip(t_logits, t_boxes), key=lambda query: -max(query[0]))[:student_queries]
        confidences = [sigmoid(max(logits)) for logits, _ in targets]

        def pair_losses(order, beta):
            return [
                class_loss(s_logits[i], logits, beta) + confidence * box_loss(s_boxes[i], box)  # noqa: B023
                for i, (logits, box), confidence in zip(order, targets, confidences)  # noqa: B023
            ]

        orders = itertools.permutations(range(student_queries), len(targets))
        best = min(orders, key=lambda order: sum(pair_losses(order, beta=0)))
        total += sum(pair_losses(best, beta=2))
        normalizer += sum(confidences)
    torch.testing.assert_close(query_distillation(*student, *teacher), torch.tensor(total / max(1, normalizer)))


def test_matching_prefers_what_the_teacher_is_sure_of():
    # Both teacher queries lie nearer to the one student query at the left, but only the first is an object.
    teacher_logits = torch.tensor([[[3.0], [-3.0]]])
    teacher_boxes = torch.tensor([[[0.4, 0.5, 0.2, 0.2], [0.2, 0.5, 0.2, 0.2]]])
    student_boxes = torch.tensor([[[0.2, 0.5, 0.2, 0.2], [0.9, 0.5, 0.2, 0.2]]], requires_grad=True)
    query_distillation(torch.zeros(1, 2, 1), student_boxes, teacher_logits, teacher_boxes).backward()
    pulled_right, pulled_left = student_boxes.grad[0, :, 0].neg().tolist()
    assert pulled_right > 1 > abs(pulled_left)  # the first is drawn to the object, and strongly


def test_zero_where_the_students_queries_are_the_teachers_in_any_order():
    logits, boxes = random_queries(2, 5)
    order = torch.randperm(5)
    loss = query_distillation(logits[:, order], boxes[:, order], logits, boxes)
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-5, rtol=0)


def test_smallest_value_of_plain_cross_entropy_is_the_teachers_entropy():
    logits, boxes = torch.zeros(1, 2, 1), torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]]])
    # Two fair coins; N = 1/2 + 1/2.
    loss = query_distillation(logits, boxes, logits, boxes, beta=0.0)
    torch.testing.assert_close(loss, torch.tensor(2 * math.log(2)))


def test_students_without_a_teacher_query_learn_nothing():
    logits, boxes = (values.requires_grad_() for values in random_queries(1, 4))
    query_distillation(logits, boxes, *random_queries(1, 1)).backward()
    assert (logits.grad.abs().sum(dim=2) > 0).sum() == 1
    assert (boxes.grad.abs().sum(dim=2) > 0).sum() == 1


@pytest.mark.parametrize(("batch", "student_queries", "teacher_queries"), [(0, 2, 2), (2, 0, 3), (2, 3, 0)])
def test_no_pairs_is_zero_and_still_has_a_graph(batch, student_queries, teacher_queries):
    student = [values.requires_grad_() for values in random_queries(batch, student_queries)]
    loss = query_distillation(*student, *random_queries(batch, teacher_queries))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(values.grad, torch.zeros_like(values)) for values in student)


def test_one_box_over_the_whole_image():
    whole = torch.tensor([[[0.5, 0.5, 1.0, 1.0]]])
    logits = torch.full((1, 1, 1), 20.0)  # so sure that N is 1
    assert query_distillation(logits, whole, logits, whole).item() == 0
    quarter = torch.tensor([[[0.25, 0.25, 0.5, 0.5]]])
    # L1 1/4 + 1/4 + 1/2 + 1/2, GIoU 1/4.
    loss = query_distillation(logits, quarter, logits, whole)
    torch.testing.assert_close(loss, torch.tensor(5 * 1.5 + 2 * 0.75))


def test_a_diverged_student_gives_nan_not_an_error():
    logits, boxes = random_queries(1, 2)
    assert query_distillation(logits * math.nan, boxes, *random_queries(1, 2)).isnan()


def test_shapes_are_checked():
    logits, boxes = random_queries(2, 4)
    with pytest.raises(ValueError, match=r"the student's logits have shape \(2, 4, 3\) and its boxes \(2, 3, 4\)"):
        query_distillation(logits, boxes[:, :3], logits, boxes)
    with pytest.raises(ValueError, match=r"the teacher's logits have shape \(4, 3\) and its boxes \(4, 4\)"):
        query_distillation(logits, boxes, logits[0], boxes[0])
    with pytest.raises(ValueError, match=r"student \(2, 4, 3\) and teacher \(2, 4, 2\) logits must agree"):
        query_distillation(logits, boxes, logits[..., :2], boxes)
