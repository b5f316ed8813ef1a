"""Two-stage heads: the student's proposals go through both heads, whose outputs then stand row against row.

The teacher pools its own features at the student's proposals. Besides `roi_classification`, `dkd` takes the same logits
with the proposals' labels. Both heads must encode their boxes alike, with the same means and deviations.
"""

import torch.nn.functional as F
from torch import Tensor

from losses.normalizer import weighted_mean
from losses.precision import at_least_float32
from losses.shape_check import require_same_shape, require_weight
from losses.soft_label import kd


def roi_classification(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the softened class distributions, the background among the classes, on every proposal; see `kd`.

    The soft part of Chen 2017 (NIPS, Learning Efficient Object Detection Models with Knowledge Distillation). A
    deviation: the cross-entropy there weights the background 1.5, so that its minimum is not at the teacher's scores.

    Args:
        student_logits: (N, K + 1) before the softmax.
        teacher_logits: the same shape, with the same classes in the same order. Detached.
        temperature: tau; 1 softens nothing.

    Returns:
        The mean over proposals; 0 for none.

    Raises:
        ValueError: the shapes differ or are not (N, K + 1), or the temperature is not above 0.
    """
    require_same_shape("roi_classification(student, teacher)", student_logits, teacher_logits)
    if student_logits.dim() != 2:
        raise ValueError(
            f"roi_classification: logits have shape {tuple(student_logits.shape)}; they must be (N, K + 1)"
        )
    return kd(student_logits, teacher_logits, temperature)


def class_deltas(deltas: Tensor, labels: Tensor) -> Tensor:
    """The four deltas that belong to each proposal's class, the only ones that its training touches.

    Args:
        deltas: (N, K * 4), class by class, or (N, 4) for all classes together.
        labels: (N,) int64; background, K or above, gets the last class' deltas, and should weigh 0.

    Returns:
        (N, 4), in the graph.

    Raises:
        ValueError: `deltas` is not (N, K * 4), or `labels` not one a row.
    """
    _require_deltas("class_deltas", deltas)
    if labels.shape != deltas.shape[:1]:
        raise ValueError(
            f"class_deltas: labels have shape {tuple(labels.shape)} for deltas {tuple(deltas.shape)}; they must be "
            f"{tuple(deltas.shape[:1])}, one a row"
        )
    by_class = deltas.unflatten(1, (-1, 4))
    columns = labels.clamp(max=by_class.shape[1] - 1)[:, None, None].expand(-1, 1, 4)
    return by_class.gather(1, columns).squeeze(1)


def roi_regression(student_deltas: Tensor, teacher_deltas: Tensor, weight: Tensor) -> Tensor:
    """Smooth-L1 between the box deltas, quadratic below 1, averaged over them; the weighted mean over proposals.

    With a weight of 1 for every proposal it is the loss that MasKD's code (Huang 2022, arXiv 2205.14589) puts on its
    ROI head. Usual here: 1 on foreground, 0 on background, where the deltas mean nothing.

    Args:
        student_deltas: (N, 4), from `class_deltas` or a head for all classes together, or (N, K * 4).
        teacher_deltas: the same shape. Detached.
        weight: (N,), not negative. Detached. Their sum, averaged over ranks and at least 1e-6, is the normaliser.

    Returns:
        The weighted mean; 0 for no proposals, or no foreground.

    Raises:
        ValueError: the deltas differ in shape or are not (N, K * 4), or `weight` is not one number a proposal.
    """
    _require_deltas("roi_regression", student_deltas)
    require_same_shape("roi_regression(student, teacher)", student_deltas, teacher_deltas)
    require_weight("roi_regression", weight, student_deltas, item_dims=1)
    student, teacher = at_least_float32(student_deltas), at_least_float32(teacher_deltas.detach())
    return weighted_mean(F.smooth_l1_loss(student, teacher, reduction="none").mean(dim=-1), weight)


def bounded_regression(
    student_deltas: Tensor, teacher_deltas: Tensor, target_deltas: Tensor, weight: Tensor, margin: float = 0.0
) -> Tensor:
    """Teacher-bounded regression: the truth is the target, the teacher only says where it is worth an effort.

    |s - y|^2 where |s - y|^2 > |t - y|^2 + m, else 0, summed over the four deltas (Chen 2017, NIPS, Learning Efficient
    Object Detection Models with Knowledge Distillation); the weighted mean over proposals. The paper writes
    |s - y|^2 + m > |t - y|^2, so its m is this one with the sign changed; at 0 the two are the same.

    Args:
        student_deltas: (N, 4), from `class_deltas` or a head for all classes together.
        teacher_deltas: the same shape. Detached.
        target_deltas: the same shape, the true deltas y; any finite number on background. Detached.
        weight: (N,), 1 on foreground and 0 on background. Detached. Their sum, averaged over ranks and at least 1e-6,
            is the normaliser, also where the bound lets only some of them count.
        margin: m, in squared deltas; by how much the student's error must exceed the teacher's.

    Returns:
        The weighted mean; 0 for no proposals, no foreground, or a student nowhere worse than the teacher by m.

    Raises:
        ValueError: the deltas differ in shape or are not (N, 4), or `weight` is not one number a proposal.
    """
    if student_deltas.dim() != 2 or student_deltas.shape[1] != 4:
        raise ValueError(
            f"bounded_regression: deltas have shape {tuple(student_deltas.shape)}; they must be (N, 4), of several "
            "classes those that class_deltas takes"
        )
    require_same_shape("bounded_regression(student, teacher)", student_deltas, teacher_deltas)
    require_same_shape("bounded_regression(student, target)", student_deltas, target_deltas)
    require_weight("bounded_regression", weight, student_deltas, item_dims=1)
    target = at_least_float32(target_deltas.detach())
    student_error = (at_least_float32(student_deltas) - target).square().sum(dim=-1)
    teacher_error = (at_least_float32(teacher_deltas.detach()) - target).square().sum(dim=-1)
    return weighted_mean(student_error * (student_error > teacher_error + margin), weight)


def _require_deltas(name: str, deltas: Tensor) -> None:
    if deltas.dim() != 2 or not deltas.shape[1] or deltas.shape[1] % 4:
        raise ValueError(f"{name}: deltas have shape {tuple(deltas.shape)}; they must be (N, K * 4) or (N, 4)")
