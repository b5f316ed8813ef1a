"""Overlap of axis-aligned boxes: all pairs at once, or one by one with GIoU.

torchvision has both, but a pair of empty boxes makes its pairwise IoU NaN (label assignment pads with such boxes), and
its element-wise GIoU picks the overlapping boxes with a mask, which makes the GPU wait for the CPU.
"""

import torch
from torch import Tensor

from losses.shape_check import require_same_shape

EPSILON = 1e-7  # in squared box units; only areas below it are affected


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box in `a` with every box in `b`.

    Args:
        a: (..., N, 4) xyxy with x1 <= x2 and y1 <= y2, in any unit.
        b: (..., M, 4) xyxy in the same unit; the leading dimensions broadcast with those of `a`.

    Returns:
        (..., N, M) float32 in [0, 1]; 0 where both boxes are empty.

    Raises:
        ValueError: the last dimension is not 4.
    """
    for boxes in (a, b):
        if boxes.shape[-1] != 4:
            raise ValueError(f"pairwise_iou: boxes have shape {tuple(boxes.shape)}; they must be (..., 4), xyxy")
    intersection, union = _intersection_and_union(a.float()[..., :, None, :], b.float()[..., None, :, :])
    return intersection / union.clamp(min=EPSILON)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of each box in `a` with the box at the same place in `b` (Rezatofighi 2019, arXiv 1902.09630).

    IoU - |C minus the union| / |C|, where C is the smallest box around both.

    Args:
        a: (..., 4) xyxy with x1 <= x2 and y1 <= y2, in any unit.
        b: (..., 4) xyxy, the same shape and unit.

    Returns:
        (...) float32 in (-1, 1]; 0 where both boxes are the same empty one.

    Raises:
        ValueError: the shapes differ, or the last dimension is not 4.
    """
    require_same_shape("giou(a, b)", a, b)
    if a.shape[-1] != 4:
        raise ValueError(f"giou: boxes have shape {tuple(a.shape)}; they must be (..., 4), xyxy")
    a, b = a.float(), b.float()
    intersection, union = _intersection_and_union(a, b)
    enclosing = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return intersection / union.clamp(min=EPSILON) - (enclosing - union) / enclosing.clamp(min=EPSILON)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas for boxes that broadcast against each other, (..., 4) -> two (...)."""
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = _area(top_left, torch.maximum(top_left, bottom_right))
    union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - intersection
    return intersection, union


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    width, height = (bottom_right - top_left).unbind(-1)
    return width * height
