import math

import pytest
import torch

from losses import dense_sigmoid, dist, dkd, kd


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


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


def test_dense_sigmoid_of_known_softened_probabilities():
    # tau = 2 halves the logits: t = 3/4 at both locations, s = 1/2 at one; N counts the unsoftened 9/10 twice.
    teacher = [torch.full((1, 1, 1, 2), 2 * math.log(3))]
    student = [torch.tensor([[[[0.0, 2 * math.log(3)]]]])]
    expected = 4 * 0.25 * math.log(2) / 1.8
    torch.testing.assert_close(dense_sigmoid(student, teacher, temperature=2.0), torch.tensor(expected))


def test_dense_sigmoid_without_focus_is_smallest_at_the_teachers_entropy():
    logits = torch.zeros(1, 1, 1, 2)
    student = logits.clone().requires_grad_()
    loss = dense_sigmoid([student], [logits], beta=0.0)
    loss.backward()
    # Two fair coins, ln 2 each; N = 1/2 + 1/2.
    torch.testing.assert_close(loss, torch.tensor(2 * math.log(2)))
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 3.0), (2.0, 0.5)])
def test_dense_sigmoid_is_its_formula(beta, temperature):
    student, teacher = (
        [torch.randn(2, 2, 2, 1), torch.randn(2, 2, 1, 1)],
        [torch.randn(2, 2, 2, 1), torch.randn(2, 2, 1, 1)],
    )
    total, normalizer = 0.0, 0.0
    for level_student, level_teacher in zip(student, teacher):
        for z_s, z_t in zip(level_student.flatten().tolist(), level_teacher.flatten().tolist()):
            p, q = sigmoid(z_s / temperature), sigmoid(z_t / temperature)
            total -= abs(p - q) ** beta * (q * math.log(p) + (1 - q) * math.log(1 - p))
        normalizer += sum(sigmoid(z) for z in level_teacher.amax(dim=1).flatten().tolist())
    expected = torch.tensor(temperature**2 * total / max(1, normalizer))
    torch.testing.assert_close(dense_sigmoid(student, teacher, beta, temperature), expected)


def test_normalizer_is_at_least_one():
    teacher, student = [torch.zeros(1, 1, 1, 1)], [torch.full((1, 1, 1, 1), math.log(3))]
    # N would be 1/2; the loss is 1/4 * ln(16/3) / 2, undivided.
    torch.testing.assert_close(dense_sigmoid(student, teacher), torch.tensor(math.log(16 / 3) / 8))


def test_more_images_do_not_change_the_loss():
    student, teacher = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    once = dense_sigmoid([student], [teacher])
    twice = dense_sigmoid([student.repeat(2, 1, 1, 1)], [teacher.repeat(2, 1, 1, 1)])
    torch.testing.assert_close(once, twice)


def test_no_images_is_zero():
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = dense_sigmoid([student], [torch.zeros(0, 3, 4, 4)])
    loss.backward()
    assert loss.item() == 0


def test_levels_and_shapes_are_checked():
    level = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="the student has 1 levels, the teacher 2"):
        dense_sigmoid([level], [level, level])
    with pytest.raises(ValueError, match="at least one"):
        dense_sigmoid([], [])
    with pytest.raises(ValueError, match=r"level 1: shapes \(1, 2, 4, 4\) and \(1, 1, 4, 4\) differ"):
        dense_sigmoid([level, level], [level, level[:, :1]])


# The losses below take (N, K) logits of a softmax.

LABELS = torch.tensor([0, 2, 1, 3, 3])


def labelled_dkd(student, teacher, temperature=1.0):
    return dkd(student, teacher, LABELS[: len(student)], temperature=temperature)


def softmax(logits, temperature):
    exponentials = [math.exp(z / temperature) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def pearson(x, y):
    x, y = [a - sum(x) / len(x) for a in x], [b - sum(y) / len(y) for b in y]
    return sum(a * b for a, b in zip(x, y)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def test_kd_of_known_probabilities():
    # Softened by tau = 2, sample 0 is (1/4, 3/4) against (1/2, 1/2); sample 1 agrees.
    student = torch.tensor([[0.0, 2 * math.log(3)], [5.0, 1.0]])
    teacher = torch.tensor([[0.0, 0.0], [5.0, 1.0]])
    # 4 * (ln(2) / 2 + ln(2/3) / 2) over two samples = ln(4/3).
    torch.testing.assert_close(kd(student, teacher, temperature=2.0), torch.tensor(math.log(4 / 3)))


def test_kd_is_its_formula():
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        expected += 9 * divergence(softmax(t, 3), softmax(s, 3)) / 5
    torch.testing.assert_close(kd(student, teacher, 3.0), torch.tensor(expected))
    # Leading dimensions are all samples.
    reshaped = kd(student.view(5, 1, 4), teacher.view(5, 1, 4), 3.0)
    torch.testing.assert_close(reshaped, torch.tensor(expected))


def test_dkd_of_known_probabilities():
    student = torch.tensor([[math.log(2), 0.0, 0.0]])  # (1/2, 1/4, 1/4)
    teacher = torch.tensor([[0.0, 0.0, math.log(2)]])  # (1/4, 1/4, 1/2)
    # Class 0 against the rest: (1/4, 3/4) and (1/2, 1/2). The rest alone: (1/3, 2/3) and (1/2, 1/2).
    target = math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4
    others = math.log(2 / 3) / 3 + 2 * math.log(4 / 3) / 3
    labels = torch.tensor([0])
    torch.testing.assert_close(dkd(student, teacher, labels), torch.tensor(target + 0.25 * others))
    torch.testing.assert_close(dkd(student, teacher, labels, 3.0, 0.5), torch.tensor(3 * target + 0.5 * others))
    # Weighted by the teacher's share of the rest, the two are KD.
    torch.testing.assert_close(dkd(student, teacher, labels, 1.0, 0.75), kd(student, teacher))


def test_dkd_is_its_formula():
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    expected = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), LABELS.tolist()):
        p, q = softmax(t, 2)[label], softmax(s, 2)[label]
        others = [[z for k, z in enumerate(logits) if k != label] for logits in (t, s)]
        expected += 4 * divergence([p, 1 - p], [q, 1 - q]) / 5
        expected += 4 * 0.25 * divergence(softmax(others[0], 2), softmax(others[1], 2)) / 5
    torch.testing.assert_close(labelled_dkd(student, teacher, 2.0), torch.tensor(expected))


def test_dkd_of_a_sure_teacher_is_finite():
    # 1 - p of the teacher is exp(-200), which float32 has no number for.
    student = torch.zeros(1, 3, requires_grad=True)
    loss = dkd(student, torch.tensor([[200.0, 0, 0]]), torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(math.log(3)))  # -ln(1/3); the others agree
    assert student.grad.isfinite().all()


def test_dist_of_known_probabilities():
    student = torch.tensor([[math.log(2), 0.0, 0.0]])  # (1/2, 1/4, 1/4): (2, -1, -1) / 12 around its mean
    teacher = torch.tensor([[0.0, math.log(2), 0.0]])  # (1/4, 1/2, 1/4): (-1, 2, -1) / 12
    # rho = (-2 - 2 + 1) / 6 = -1/2; one sample's columns do not vary, so they count 1.
    torch.testing.assert_close(dist(student, teacher, beta=2.0, gamma=0.5), torch.tensor(2 * 1.5 + 0.5))


def test_dist_is_its_formula():
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    rows = [[softmax(z, 2) for z in logits.tolist()] for logits in (student, teacher)]
    columns = [list(zip(*probabilities)) for probabilities in rows]
    row_loss = sum(1 - pearson(s, t) for s, t in zip(*rows)) / 5
    column_loss = sum(1 - pearson(s, t) for s, t in zip(*columns)) / 4
    expected = torch.tensor(4 * (row_loss + 3 * column_loss))
    torch.testing.assert_close(dist(student, teacher, 2.0, 1.0, 3.0), expected, atol=1e-5, rtol=1e-5)


def test_dkd_and_dist_check_their_shapes():
    with pytest.raises(ValueError, match=r"dkd: logits have shape \(2, 1\); they must be \(N, K\), K at least 2"):
        dkd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"dkd: labels have shape \(3,\) for logits \(2, 4\)"):
        dkd(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"dist: logits have shape \(1, 2, 4\); they must be \(N, K\)"):
        dist(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
