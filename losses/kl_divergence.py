"""How far one softened distribution is from another, which most soft labels are made of."""

import torch.nn.functional as F
from torch import Tensor

from losses.temperature import soften


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(t / tau) || softmax(s / tau)) over the last dimension.

    tau^2 keeps the gradient's size where tau changes: it falls with 1 / tau^2 (Hinton 2015, arXiv 1503.02531).

    Args:
        student_logits: (..., K) before the softmax.
        teacher_logits: the same shape. Detached.
        temperature: tau; 1 softens nothing.

    Returns:
        (...), one non-negative number a distribution, 0 where the two agree.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    student = F.log_softmax(soften(student_logits, temperature), dim=-1)
    teacher = F.log_softmax(soften(teacher_logits.detach(), temperature), dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
