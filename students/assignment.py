"""Which location answers for which object: the task-aligned assigner (TOOD, arXiv 2108.07755)."""

from typing import NamedTuple

import torch
from torch import Tensor

from losses.box_iou import pairwise_iou


class Assignment(NamedTuple):
    """The object of every location, N locations over all levels.

    Attributes:
        objects: (B, N) int64 index into the padded objects; meaningless where `quality` is 0.
        quality: (B, N) in [0, 1]: the score that a location should give to its object's class; 0 for background.
    """

    objects: Tensor
    quality: Tensor


@torch.no_grad()
def assign_task_aligned(
    scores: Tensor,
    boxes: Tensor,
    locations: Tensor,
    strides: Tensor,
    target_boxes: Tensor,
    target_labels: Tensor,
    target_mask: Tensor,
    top_k: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> Assignment:
    """Gives each object the locations that classify and box it best at once.

    Alignment is score^alpha * IoU^beta; an object takes its `top_k` best among the locations inside its box, and a
    location that several objects want goes to the one it overlaps most. Qualities are alignments rescaled so that an
    object's best equals its highest IoU. Deviation from the paper: an object that holds no location takes the one
    nearest to its centre, so that tiny objects are not lost.

    Args:
        scores: (B, N, K) class probabilities.
        boxes: (B, N, 4) predicted xyxy in pixels.
        locations: (N, 2) x and y in pixels.
        strides: (N,) pixels.
        target_boxes: (B, M, 4) xyxy in pixels, padded.
        target_labels: (B, M) int64, padded with any class.
        target_mask: (B, M) bool, False for padding.
    """
    batch, num_locations, _ = scores.shape
    num_objects = target_boxes.shape[1]
    if num_objects == 0:
        return Assignment(
            scores.new_zeros(batch, num_locations, dtype=torch.long), scores.new_zeros(batch, num_locations)
        )

    # edge distances from every location to every object: (B, M, N, 4)
    top_left = locations - target_boxes[:, :, None, :2]
    bottom_right = target_boxes[:, :, None, 2:] - locations
    inside = torch.cat((top_left, bottom_right), dim=-1).amin(dim=-1) > 0
    inside = inside | _nearest_if_none(inside, target_boxes, locations, strides)
    inside = inside & target_mask[..., None]

    iou = pairwise_iou(target_boxes, boxes)  # (B, M, N)
    index = target_labels[..., None].expand(-1, -1, num_locations)
    object_scores = scores.transpose(1, 2).gather(1, index)  # (B, M, N)
    alignment = object_scores.pow(alpha) * iou.pow(beta) * inside

    # a location inside the box may take part even while its alignment is still 0: a fresh head must start somewhere
    ranking = torch.where(inside, alignment + 1e-9, alignment.new_full((), -1.0))
    best = ranking.topk(min(top_k, num_locations), dim=-1).indices
    chosen = torch.zeros_like(inside).scatter_(-1, best, True) & inside

    overlap = torch.where(chosen, iou, iou.new_full((), -1.0))
    objects = overlap.argmax(dim=1)  # (B, N)
    chosen = chosen & (torch.arange(num_objects, device=objects.device)[:, None] == objects[:, None])

    alignment, overlap = alignment * chosen, iou * chosen
    strongest = alignment.amax(dim=-1, keepdim=True)
    quality = alignment / strongest.clamp(min=1e-12) * overlap.amax(dim=-1, keepdim=True)
    return Assignment(objects, quality.sum(dim=1))


def _nearest_if_none(inside: Tensor, target_boxes: Tensor, locations: Tensor, strides: Tensor) -> Tensor:
    """(B, M, N) True at the finest location nearest to the centre of each object that holds no location."""
    centres = (target_boxes[..., :2] + target_boxes[..., 2:]) / 2
    finest = strides == strides.min()
    distance = (locations - centres[:, :, None]).square().sum(dim=-1)
    nearest = distance.masked_fill(~finest, float("inf")).argmin(dim=-1, keepdim=True)
    return torch.zeros_like(inside).scatter_(-1, nearest, True) & ~inside.any(dim=-1, keepdim=True)
