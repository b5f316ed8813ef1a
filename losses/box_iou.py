"""Overlap of axis-aligned boxes: IoU and DIoU of all pairs at once, IoU, GIoU and CIoU one by one.

torchvision has both, but a pair of empty boxes makes its pairwise IoU NaN (label assignment pads with such boxes), and
its element-wise GIoU picks the overlapping boxes with a mask, which makes the GPU wait for the CPU.
"""

import math

import torch
from torch import Tensor

from losses.precision import at_least_float32
from losses.shape_check import require_same_shape

EPSILON = 1e-7  # in squared box units; only areas below it are affected


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box in `a` with every box in `b`.

    Args:
        a: (..., N, 4) xyxy with x1 <= x2 and y1 <= y2, in any unit.
        b: (..., M, 4) xyxy in the same unit; the leading dimensions broadcast with those of `a`.

    Returns:
        (..., N, M) in [0, 1]; 0 where both boxes are empty.

    Raises:
        ValueError: boxes that are not (..., N, 4), or leading dimensions that do not broadcast.
    """
    return _iou(*_all_pairs("pairwise_iou", a, b))


def pairwise_diou(a: Tensor, b: Tensor) -> Tensor:
    """Distance IoU of every box in `a` with every box in `b` (Zheng 2020, arXiv 1911.08287).

    IoU - d^2 / c^2, where d is the distance of the centres and c the diagonal of the smallest box around both.

    Args:
        a: (..., N, 4) xyxy with x1 <= x2 and y1 <= y2, in any unit.
        b: (..., M, 4) xyxy in the same unit; the leading dimensions broadcast with those of `a`.

    Returns:
        (..., N, M) in (-1, 1]; 0 where both boxes are the same empty one.

    Raises:
        ValueError: boxes that are not (..., N, 4), or leading dimensions that do not broadcast.
    """
    a, b = _all_pairs("pairwise_diou", a, b)
    return _iou(a, b) - _relative_distance(a, b)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each box in `a` with the box at the same place in `b`.

    Args:
        a: (..., 4) xyxy with x1 <= x2 and y1 <= y2, in any unit.
        b: (..., 4) xyxy, the same shape and unit.

    Returns:
        (...) in [0, 1]; 0 where both boxes are empty.

    Raises:
        ValueError: the shapes differ, or the last dimension is not 4.
    """
    require_same_shape("iou(a, b)", a, b)
    _require_boxes("iou", a)
    return _iou(at_least_float32(a), at_least_float32(b))


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of each box in `a` with the box at the same place in `b` (Rezatofighi 2019, arXiv 1902.09630).

    IoU - |C minus the union| / |C|, where C is the smallest box around both.

    Args:
        a: (..., 4) xyxy with x1 <= x2 and y1 <= y2, in any unit.
        b: (..., 4) xyxy, the same shape and unit.

    Returns:
        (...) in (-1, 1]; 0 where both boxes are the same empty one.

    Raises:
        ValueError: the shapes differ, or the last dimension is not 4.
    """
    require_same_shape("giou(a, b)", a, b)
    _require_boxes("giou", a)
    a, b = at_least_float32(a), at_least_float32(b)
    intersection, union = _intersection_and_union(a, b)
    enclosing = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return intersection / union.clamp(min=EPSILON) - (enclosing - union) / enclosing.clamp(min=EPSILON)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of each box in `a` with the box at the same place in `b` (Zheng 2020, arXiv 1911.08287).

    IoU - d^2 / c^2 - alpha v: d is the distance of the centres, c the diagonal of the smallest box around both, v how
    much the aspect ratios differ, 4 / pi^2 (atan(w_b / h_b) - atan(w_a / h_a))^2, and alpha = v / (1 - IoU + v), which
    is taken for a constant.

    Args:
        a: (..., 4) xyxy with x1 <= x2 and y1 <= y2, in any unit.
        b: (..., 4) xyxy, the same shape and unit.

    Returns:
        (...) in (-2, 1]; 0 where both boxes are the same empty one.

    Raises:
        ValueError: the shapes differ, or the last dimension is not 4.
    """
    require_same_shape("ciou(a, b)", a, b)
    _require_boxes("ciou", a)
    a, b = at_least_float32(a), at_least_float32(b)
    overlap = _iou(a, b)
    angles = []
    for boxes in (a, b):
        width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
        angles.append(torch.atan(width / (height + EPSILON)))
    v = 4 / math.pi**2 * (angles[1] - angles[0]).square()
    alpha = (v / (1 - overlap + v).clamp(min=EPSILON)).detach()
    return overlap - _relative_distance(a, b) - alpha * v


def _relative_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of the centres, as a share of the squared diagonal of the smallest box around both."""
    diagonal = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    distance = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    return distance.square().sum(dim=-1) / diagonal.square().sum(dim=-1).clamp(min=EPSILON)


def _require_boxes(name: str, boxes: Tensor) -> None:
    if boxes.shape[-1:] != (4,):
        raise ValueError(f"{name}: boxes have shape {tuple(boxes.shape)}; they must be (..., 4), xyxy")


def _all_pairs(name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(..., N, 4) and (..., M, 4) as (..., N, 1, 4) and (..., 1, M, 4)."""
    for boxes in (a, b):
        _require_boxes(name, boxes)
    leading = zip(reversed(a.shape[:-2]), reversed(b.shape[:-2]))
    if min(a.dim(), b.dim()) < 2 or any(m != n and 1 not in (m, n) for m, n in leading):
        raise ValueError(
            f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}; they must be (..., N, 4) and (..., M, 4), with "
            "leading dimensions that are equal, 1 or left out"
        )
    return at_least_float32(a)[..., :, None, :], at_least_float32(b)[..., None, :, :]


def _iou(a: Tensor, b: Tensor) -> Tensor:
    intersection, union = _intersection_and_union(a, b)
    return intersection / union.clamp(min=EPSILON)


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
