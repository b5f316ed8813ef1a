"""Soft labels: the student's class scores follow the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.detection import quality_focal_loss
from losses.normalizer import average_across_ranks
from losses.shape_check import require_same_shape


def dense_sigmoid(student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], beta: float = 1.0) -> Tensor:
    """Soft labels for dense heads with a sigmoid a class, as CrossKD trains them (Wang 2024, arXiv 2306.11369).

    sum |sigmoid(s) - sigmoid(t)|^beta * BCE(sigmoid(s), sigmoid(t)) / N over all classes, locations, levels and
    images: the quality focal loss with the teacher's probability as quality.

    N is the sum over all images, levels and locations of the teacher's highest class score, averaged over ranks, at
    least 1. A deviation: the authors divide by the number of the student's positives, which a loss that knows no
    targets cannot see.

    Args:
        student_logits: (B, K, H, W) a pyramid level, before the sigmoid.
        teacher_logits: the same shapes, with the same classes in the same order. Detached.
        beta: 1 in CrossKD; 2 puts more weight on the largest disagreements.

    Returns:
        The normalised sum; 0 where student and teacher agree everywhere.

    Raises:
        ValueError: no levels, unlike numbers of levels, or a level whose shapes differ.
    """
    if not student_logits or len(student_logits) != len(teacher_logits):
        raise ValueError(
            f"dense_sigmoid: the student has {len(student_logits)} levels, the teacher {len(teacher_logits)}; "
            "they must be equally many, and at least one"
        )
    losses, confidences = [], []
    for level, (student, teacher) in enumerate(zip(student_logits, teacher_logits)):
        require_same_shape(f"dense_sigmoid(student, teacher), level {level}", student, teacher)
        quality = teacher.detach().float().sigmoid()
        losses.append(quality_focal_loss(student, quality, beta))
        confidences.append(quality.amax(dim=1).sum())
    normalizer = average_across_ranks(torch.stack(confidences).sum()).clamp(min=1)
    return torch.stack(losses).sum() / normalizer
