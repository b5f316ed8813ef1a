"""ATSS's threshold: how much an anchor must overlap an object to belong to it, for each object by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.box_iou import pairwise_iou
from losses.precision import at_least_float32


@torch.no_grad()
def adaptive_threshold(
    anchors: Sequence[Tensor], target_boxes: Tensor, candidates_per_level: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean plus the unbiased standard deviation of an object's IoU with the anchors that lie nearest to it.

    Nearest by their centres, a fixed number of them a level (Zhang 2020, arXiv 1912.02424). A single candidate has no
    spread, where the authors' code gives NaN.

    Args:
        anchors: (A_l, 4) xyxy a pyramid level.
        target_boxes: (..., M, 4) xyxy in the same unit.
        candidates_per_level: as many as there are where a level has fewer.

    Returns:
        Outside the graph, over all N = sum A_l anchors, levels in order: the IoU of each object with each, (..., M, N);
        the candidates' indices, (..., M, C) int64; the threshold, (..., M), 0 where there are no anchors.

    Raises:
        ValueError: no levels, anchors that are not (A_l, 4), or objects that are not (..., M, 4).
    """
    if not anchors:
        raise ValueError("adaptive_threshold: anchors has 0 levels; it must have at least one")
    for number, level in enumerate(anchors):
        if level.dim() != 2 or level.shape[1] != 4:
            raise ValueError(
                f"adaptive_threshold: anchors of level {number} have shape {tuple(level.shape)}; they must be (A, 4)"
            )
    overlap = pairwise_iou(target_boxes, torch.cat(list(anchors)))
    centres, candidates, first = _centres(target_boxes), [], 0
    for level in anchors:
        distance = (_centres(level) - centres[..., None, :]).square().sum(dim=-1)  # (..., M, A_l)
        nearest = distance.topk(min(candidates_per_level, len(level)), dim=-1, largest=False).indices
        candidates.append(nearest + first)
        first += len(level)
    candidates = torch.cat(candidates, dim=-1)
    values = overlap.gather(-1, candidates)
    if not values.numel():
        return overlap, candidates, values.sum(dim=-1)
    spread = values.std(dim=-1, correction=min(1, values.shape[-1] - 1))
    return overlap, candidates, values.mean(dim=-1) + spread


def _centres(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> (..., 2)."""
    boxes = at_least_float32(boxes)
    return (boxes[..., :2] + boxes[..., 2:]) / 2
