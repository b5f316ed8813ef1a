"""The losses a dense detector learns its own task with.

All are sums: the normaliser, such as the sum of the positives' qualities, may be common to several, and only the caller
knows it.
"""

import torch.nn.functional as F
from torch import Tensor

from losses.box_iou import giou
from losses.precision import at_least_float32
from losses.shape_check import require_same_shape, require_weight


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss (Generalized Focal Loss, Li 2020, arXiv 2006.04388).

    sum |sigmoid(logit) - quality|^beta * BCE(sigmoid(logit), quality). The gradient also flows through the modulating
    factor, as in the authors' code.

    Args:
        logits: (..., K) before the sigmoid, one column a class.
        quality: the same shape, in [0, 1]: what each probability should be, for example the IoU of the matched box at
            its class and 0 elsewhere. Detached.
        beta: how strongly what is already right is played down.

    Returns:
        The sum over all elements, not normalised; 0 for none.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape("quality_focal_loss(logits, quality)", logits, quality)
    logits, quality = at_least_float32(logits), at_least_float32(quality.detach())
    cross_entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return ((logits.sigmoid() - quality).abs().pow(beta) * cross_entropy).sum()


def focal_loss(logits: Tensor, target: Tensor, weight: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of a sigmoid a class (RetinaNet, Lin 2017, arXiv 1708.02002).

    sum weight * alpha_t * |target - p|^gamma * BCE(p, target), p = sigmoid(logit), alpha_t = alpha * target +
    (1 - alpha) * (1 - target): the paper's loss for targets of 0 and 1, and defined in between as well. The gradient
    also flows through the modulating factor.

    Args:
        logits: (..., K) before the sigmoid, one column a class.
        target: the same shape, in [0, 1]. Detached.
        weight: the same shape, what each element counts. Detached.
        alpha: weight of a target of 1 against one of 0.
        gamma: how strongly what is already right is played down.

    Returns:
        The weighted sum, not normalised; 0 for none.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape("focal_loss(logits, target)", logits, target)
    require_weight("focal_loss", weight, logits, item_dims=0)
    logits, target = at_least_float32(logits), at_least_float32(target.detach())
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    balance = alpha * target + (1 - alpha) * (1 - target)
    losses = balance * (logits.sigmoid() - target).abs().pow(gamma) * cross_entropy
    return (at_least_float32(weight.detach()) * losses).sum()


def distribution_focal_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Distribution focal loss (Generalized Focal Loss, Li 2020, arXiv 2006.04388).

    sum weight * -((n + 1 - y) log p_n + (y - n) log p_(n + 1)), where n and n + 1 are the bins around the target y and
    p = softmax(logits): least where the two share all probability such that their mean is y.

    Args:
        logits: (..., R) before the softmax, over the values 0 to R - 1, R at least 2.
        target: (...) brought into [0, R - 1] where it lies outside. Detached. The authors' code leaves 0.1 free at the
            upper end.
        weight: (...) what each distribution counts. Detached.

    Returns:
        The weighted sum, not normalised; 0 for none.

    Raises:
        ValueError: fewer than 2 bins, or `target` or `weight` is not one number a distribution.
    """
    require_weight("distribution_focal_loss", weight, logits, item_dims=1)
    require_same_shape("distribution_focal_loss(target, weight)", target, weight)
    last = logits.shape[-1] - 1
    if last < 1:
        raise ValueError(f"distribution_focal_loss: logits have shape {tuple(logits.shape)}; give 2 bins or more")
    log_probabilities = F.log_softmax(at_least_float32(logits), dim=-1)
    target = at_least_float32(target.detach()).clamp(0, last)
    lower = target.floor().clamp(max=last - 1)
    index = lower.long()[..., None]
    log_lower, log_upper = (log_probabilities.gather(-1, index + n).squeeze(-1) for n in (0, 1))
    losses = -((lower + 1 - target) * log_lower + (target - lower) * log_upper)
    return (at_least_float32(weight.detach()) * losses).sum()


def giou_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted GIoU loss, sum weight * (1 - GIoU) (Rezatofighi 2019, arXiv 1902.09630).

    Args:
        pred: (..., 4) xyxy in any unit.
        target: (..., 4) xyxy, the same shape and unit. Detached.
        weight: (...) what each box counts. Detached.

    Returns:
        The weighted sum, not normalised; 0 for no boxes.

    Raises:
        ValueError: `pred` and `target` differ in shape, or `weight` is not one number a box.
    """
    require_same_shape("giou_loss(pred, target)", pred, target)
    require_weight("giou_loss", weight, pred, item_dims=1)
    return (at_least_float32(weight.detach()) * (1 - giou(pred, target.detach()))).sum()
