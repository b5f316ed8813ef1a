"""The losses a dense detector learns its own task with.

Both are sums: the normaliser, usually the sum of the positives' qualities, is the same for both, and only the caller
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
