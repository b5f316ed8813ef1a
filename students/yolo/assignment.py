"""Which anchors answer for which object, in YOLOv4, YOLOv5 and YOLOv7; whole batches at once, objects padded.

All start from pairs of an object and an anchor that might go together, as many for every object: most of them count
nothing, but shapes depend on no values, so that a GPU need not wait.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.box_iou import pairwise_iou
from students.assignment import Objects
from students.yolo.head import STRIDES

# from the cell that an object's centre lies in: itself, left, above, right, below
_NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))


class Predicted(NamedTuple):
    """All that a head predicts for a batch: N predictions over levels, locations and anchors, in this order, float32.

    Attributes:
        boxes: (B, N, 4) xyxy in pixels.
        classes: (B, N, K) logits given an object.
        objectness: (B, N) logits.
        shapes: height and width of each level's map.
        anchor_sizes: (levels, A, 2) width and height in pixels.
    """

    boxes: Tensor
    classes: Tensor
    objectness: Tensor
    shapes: tuple[tuple[int, int], ...]
    anchor_sizes: Tensor

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """How many of the N belong to each level."""
        return tuple(height * width * self.anchor_sizes.shape[1] for height, width in self.shapes)


class Matches(NamedTuple):
    """C pairs of a prediction and an object on each image, level after level.

    Attributes:
        predictions: (B, C) int64 index into the N predictions; one may occur several times.
        objects: (B, C) int64 index into the padded objects.
        counted: (B, C) bool; the others are no pairs.
        level_sizes: how many of the C belong to each level.
    """

    predictions: Tensor
    objects: Tensor
    counted: Tensor
    level_sizes: tuple[int, ...]


@torch.no_grad()
def match_by_ratio(predicted: Predicted, objects: Objects, largest: float = 4.0) -> Matches:
    """YOLOv5's assignment, and the candidates of YOLOv7's: anchors of about the object's shape.

    An object takes an anchor if neither side is `largest` times the other's or more, in the cell that holds its centre
    and in those two of the four beside it that are nearest to the centre, as far as they are on the map.

    Args:
        predicted: read for its anchors and maps.
        objects: of the batch.
        largest: ratio of two sides.
    """
    centres, sizes = _centres_and_sizes(objects)
    moves = centres.new_tensor(_NEIGHBOURS)
    parts = []
    for (height, width), stride, anchors in zip(predicted.shapes, STRIDES, predicted.anchor_sizes):
        ratio = sizes[:, :, None] / anchors
        fits = torch.maximum(ratio, 1 / ratio.clamp(min=1e-9)).amax(dim=-1) < largest  # (B, M, A)
        centre, limit = centres / stride, centres.new_tensor((width, height))
        before = (centre % 1 < 0.5) & (centre > 1)
        after = ((limit - centre) % 1 < 0.5) & (limit - centre > 1)
        near = torch.cat((torch.ones_like(before[..., :1]), before, after), dim=-1)  # (B, M, 5)
        cells = centre.floor()[:, :, None] + moves
        index = _index(cells, (height, width), len(anchors))  # (B, M, A, 5)
        parts.append((index, fits[..., None] & near[:, :, None] & objects.mask[..., None, None]))
    return _gather(parts, predicted)


@torch.no_grad()
def match_by_shape(predicted: Predicted, objects: Objects, threshold: float = 0.213) -> Matches:
    """YOLOv4's assignment: in the cell of its centre, an object takes the anchor that is most like it, of all levels,
    and each other one whose IoU with it is above `threshold` when both have the same centre.

    Args:
        predicted: read for its anchors and maps.
        objects: of the batch.
        threshold: 0.213 in the authors' configuration.
    """
    centres, sizes = _centres_and_sizes(objects)
    anchors = predicted.anchor_sizes.flatten(0, 1)
    intersection = torch.minimum(sizes[:, :, None], anchors).prod(dim=-1)
    union = sizes.prod(dim=-1)[..., None] + anchors.prod(dim=-1) - intersection
    overlap = intersection / union  # (B, M, levels*A)
    taken = (overlap > threshold) | F.one_hot(overlap.argmax(dim=-1), len(anchors)).bool()
    taken = (taken & objects.mask[..., None]).unflatten(-1, predicted.anchor_sizes.shape[:2])
    parts = []
    for level, (shape, stride) in enumerate(zip(predicted.shapes, STRIDES)):
        cells = (centres / stride).floor()[:, :, None]
        parts.append((_index(cells, shape, taken.shape[-1]), taken[:, :, level, :, None]))
    return _gather(parts, predicted)


@torch.no_grad()
def choose_by_cost(
    matches: Matches, predicted: Predicted, objects: Objects, top_k: int = 10, box_weight: float = 3.0
) -> Matches:
    """YOLOv7's choice among candidates, by what they predict (SimOTA, YOLOX, arXiv 2107.08430; 2207.02696).

    A candidate, whichever object brought it, costs an object the cross-entropy of the root of its joint class scores
    plus `box_weight` times -log IoU. An object takes its cheapest ones, as many as the IoUs of its `top_k` best sum up
    to, at least one; a candidate that several take goes to the one it costs least.

    Args:
        matches: the candidates.
        predicted: what is predicted for them.
        objects: of the batch.
        top_k: candidates whose IoU counts.
        box_weight: of the second part of the cost.
    """
    index = matches.predictions
    boxes = predicted.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    classes = predicted.classes.gather(1, index[..., None].expand(-1, -1, predicted.classes.shape[-1]))
    objectness = predicted.objectness.gather(1, index)
    valid = matches.counted[:, None] & objects.mask[..., None]  # (B, M, C)
    overlap = pairwise_iou(objects.boxes, boxes) * valid

    score = (classes.sigmoid() * objectness.sigmoid()[..., None]).sqrt().clamp(1e-6, 1 - 1e-6)  # (B, C, K)
    absent = -torch.log1p(-score)
    labels = objects.labels[:, None].expand(-1, score.shape[1], -1)
    present = -score.log().gather(2, labels) - absent.gather(2, labels)  # (B, C, M)
    cost = (absent.sum(dim=-1, keepdim=True) + present).transpose(1, 2) - box_weight * (overlap + 1e-8).log()
    cost = cost.masked_fill(~valid, float("inf"))

    top_k = min(top_k, overlap.shape[-1])
    number = overlap.topk(top_k, dim=-1).values.sum(dim=-1).int().clamp(min=1)  # (B, M)
    cheapest = cost.topk(top_k, dim=-1, largest=False).indices
    ranks = torch.arange(top_k, device=cost.device)
    chosen = torch.zeros_like(valid).scatter_(-1, cheapest, ranks < number[..., None]) & valid
    # as in the authors' code the cheapest object of all wins, be it one of those that took the candidate or not
    contested = chosen.sum(dim=1, keepdim=True) > 1
    winner = torch.zeros_like(chosen).scatter_(1, cost.argmin(dim=1, keepdim=True), True)
    chosen = torch.where(contested, winner & valid, chosen)
    return matches._replace(objects=chosen.int().argmax(dim=1), counted=chosen.any(dim=1))


def _centres_and_sizes(objects: Objects) -> tuple[Tensor, Tensor]:
    """(B, M, 2) each, in pixels."""
    boxes = objects.boxes.float()
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def _index(cells: Tensor, shape: tuple[int, int], num_anchors: int) -> Tensor:
    """Of each anchor of cells (B, M, S, 2), column and row, its number within the level, (B, M, A, S)."""
    height, width = shape
    columns, rows = (cells[..., n].long().clamp(0, side - 1) for n, side in ((0, width), (1, height)))
    anchors = torch.arange(num_anchors, device=cells.device)[:, None]
    return (rows * width + columns)[:, :, None] * num_anchors + anchors


def _gather(parts: list[tuple[Tensor, Tensor]], predicted: Predicted) -> Matches:
    """Matches, from the index within its level and whether it counts, (B, M, A, S) each, of each level."""
    starts = [sum(predicted.level_sizes[:level]) for level in range(len(parts))]
    numbers = [
        torch.arange(index.shape[1], device=index.device)[:, None, None].expand_as(index).flatten(1)
        for index, _ in parts
    ]
    return Matches(
        torch.cat([index.flatten(1) + start for (index, _), start in zip(parts, starts)], dim=1),
        torch.cat(numbers, dim=1),
        torch.cat([counted.flatten(1) for _, counted in parts], dim=1),
        tuple(x.shape[1] for x in numbers),
    )
