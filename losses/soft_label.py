"""Soft labels: the student's class scores follow the teacher's."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.detection import quality_focal_loss
from losses.kl_divergence import softened_kl
from losses.normalizer import average_across_ranks
from losses.precision import at_least_float32
from losses.shape_check import require_same_shape
from losses.temperature import soften


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Knowledge distillation, tau^2 * KL(softmax(t / tau) || softmax(s / tau)) (Hinton 2015, arXiv 1503.02531).

    Args:
        student_logits: (..., K) before the softmax.
        teacher_logits: the same shape, with the same classes in the same order. Detached.
        temperature: tau; 1 softens nothing.

    Returns:
        The mean over samples; 0 for none.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.
    """
    require_same_shape("kd(student, teacher)", student_logits, teacher_logits)
    return _mean_or_zero(softened_kl(student_logits, teacher_logits, temperature))


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 0.25,
    temperature: float = 1.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao 2022, arXiv 2203.08679).

    tau^2 * [alpha * KL(b_T || b_S) + beta * KL(q_T || q_S)], where b = (p, 1 - p) is the probability of the labelled
    class against all others, and q the softmax over the others alone. Ordinary KD weights the second part by 1 - p of
    the teacher, which all but silences it where the teacher is sure. The defaults are the authors' for ROI heads.

    Args:
        student_logits: (N, K) before the softmax, K at least 2; in ROI heads the background is one of the K.
        teacher_logits: the same shape, with the same classes in the same order. Detached.
        labels: (N,) int64 in [0, K), the true class. Others are not looked for here, as a GPU would have to wait for
            that: they are a RuntimeError of PyTorch on a CPU, a failed assertion on a GPU.
        alpha: weight of the labelled class against the others.
        beta: weight of the others among themselves.
        temperature: tau; 1 softens nothing.

    Returns:
        The mean over samples; 0 for none.

    Raises:
        ValueError: the shapes differ or are not (N, K) with K at least 2, `labels` is not one a row, or the temperature
            is not above 0.
    """
    require_same_shape("dkd(student, teacher)", student_logits, teacher_logits)
    if student_logits.dim() != 2 or student_logits.shape[1] < 2:
        raise ValueError(f"dkd: logits have shape {tuple(student_logits.shape)}; they must be (N, K), K at least 2")
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"dkd: labels have shape {tuple(labels.shape)} for logits {tuple(student_logits.shape)}; they must be "
            f"{tuple(student_logits.shape[:1])}, one a row"
        )
    labels = labels[:, None]
    # every column but the labelled one; a boolean mask would make the GPU wait for the CPU
    others = torch.arange(student_logits.shape[1] - 1, device=labels.device)
    others = others + (others >= labels)

    student_binary = _log_binary(soften(student_logits, temperature), labels, others)
    teacher_binary = _log_binary(soften(teacher_logits.detach(), temperature), labels, others)
    target = F.kl_div(student_binary, teacher_binary, reduction="none", log_target=True).sum(dim=1)
    non_target = softened_kl(student_logits.gather(1, others), teacher_logits.gather(1, others), temperature)
    return _mean_or_zero(alpha * temperature**2 * target + beta * non_target)


def dist(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """DIST: relations instead of values (Huang 2022, arXiv 2205.10536).

    tau^2 * [beta * mean_i (1 - rho(row i)) + gamma * mean_c (1 - rho(column c))], where rho is Pearson's correlation of
    the student's with the teacher's softened probabilities. Rows relate the classes of a sample, columns the samples of
    a class. 1e-8 is added to the product of norms in rho, as in the authors' code; so a row or column that is constant
    correlates with nothing and counts a full 1. Columns are constant where there is one sample only.

    Args:
        student_logits: (N, K) before the softmax.
        teacher_logits: the same shape, with the same classes in the same order. Detached.
        temperature: tau; 1 softens nothing.
        beta: weight of the rows.
        gamma: weight of the columns.

    Returns:
        The weighted sum of two means, each in [0, 2 tau^2]; 0 for no samples.

    Raises:
        ValueError: the shapes differ or are not (N, K), or the temperature is not above 0.
    """
    require_same_shape("dist(student, teacher)", student_logits, teacher_logits)
    if student_logits.dim() != 2:
        raise ValueError(f"dist: logits have shape {tuple(student_logits.shape)}; they must be (N, K)")
    student = F.softmax(soften(student_logits, temperature), dim=1)
    teacher = F.softmax(soften(teacher_logits.detach(), temperature), dim=1)
    if not student.numel():
        return student.sum()  # columns without samples have no mean
    rows, columns = _correlation(student, teacher), _correlation(student.T, teacher.T)
    return temperature**2 * (beta * (1 - rows).mean() + gamma * (1 - columns).mean())


def dense_sigmoid(
    student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], beta: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Soft labels for dense heads with a sigmoid a class, as CrossKD trains them (Wang 2024, arXiv 2306.11369).

    tau^2 * sum |sigmoid(s / tau) - sigmoid(t / tau)|^beta * BCE(sigmoid(s / tau), sigmoid(t / tau)) / N over all
    classes, locations, levels and images: the quality focal loss with the teacher's probability as quality, both sides
    softened. CrossKD has tau = 1.

    N is the sum over all images, levels and locations of the teacher's highest class score, not softened (softened
    scores would count the background), averaged over ranks, at least 1. A deviation: the authors divide by the number
    of the student's positives, which a loss that knows no targets cannot see.

    Args:
        student_logits: (B, K, H, W) a pyramid level, before the sigmoid.
        teacher_logits: the same shapes, with the same classes in the same order. Detached.
        beta: 1 in CrossKD; 2 puts more weight on the largest disagreements; 0 is plain binary cross-entropy. Between 0
            and 1 the gradient is infinite where the two agree.
        temperature: tau.

    Returns:
        The normalised sum, smallest where student and teacher agree everywhere: 0 there, except for beta = 0, where the
        minimum is the entropy of the teacher's softened scores, normalised alike.

    Raises:
        ValueError: no levels, unlike numbers of levels, a level whose shapes differ, or a temperature not above 0.
    """
    if not student_logits or len(student_logits) != len(teacher_logits):
        raise ValueError(
            f"dense_sigmoid: the student has {len(student_logits)} levels, the teacher {len(teacher_logits)}; "
            "they must be equally many, and at least one"
        )
    losses, confidences = [], []
    for level, (student, teacher) in enumerate(zip(student_logits, teacher_logits)):
        require_same_shape(f"dense_sigmoid(student, teacher), level {level}", student, teacher)
        teacher = at_least_float32(teacher.detach())
        losses.append(quality_focal_loss(soften(student, temperature), soften(teacher, temperature).sigmoid(), beta))
        confidences.append(teacher.sigmoid().amax(dim=1).sum())
    normalizer = average_across_ranks(torch.stack(confidences).sum()).clamp(min=1)
    return temperature**2 * torch.stack(losses).sum() / normalizer


def _mean_or_zero(losses: Tensor) -> Tensor:
    """The mean, or for no elements 0 that still has a graph."""
    return losses.sum() / max(1, losses.numel())


def _log_binary(logits: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """(N, K) logits -> (N, 2), the log-probabilities of the labelled class and of all others together.

    In logarithms throughout: 1 - p in float32 would be 0 for a sure teacher.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    rest = log_probabilities.gather(1, others).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_probabilities.gather(1, labels), rest], dim=1)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row with its counterpart, (R, V) and (R, V) -> (R,)."""
    first = first - first.mean(dim=1, keepdim=True)
    second = second - second.mean(dim=1, keepdim=True)
    return (first * second).sum(dim=1) / (first.norm(dim=1) * second.norm(dim=1) + 1e-8)
