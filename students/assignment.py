"""Which of a dense head's predictions answers for which object; whole batches at once, objects padded."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losses.adaptive_threshold import adaptive_threshold
from losses.box_iou import pairwise_iou


class Objects(NamedTuple):
    """The objects of a batch, M on each image, padded; M is at least 1, so that nobody has to ask for images without.

    Attributes:
        boxes: (B, M, 4) xyxy in pixels.
        labels: (B, M) int64.
        scores: (B, M) how sure of each whoever found it is; 1 for ground truth.
        mask: (B, M) bool, False for padding.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    mask: Tensor

    def at(self, index: Tensor) -> "Objects":
        """The object (B, N) of each of N predictions, from its index (B, N)."""
        boxes = self.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return Objects(boxes, *(values.gather(1, index) for values in self[1:]))


def pad_targets(targets: list[dict[str, Tensor]], device: torch.device) -> Objects:
    """The batch's targets, see `Detector.loss`, as one tensor each; scores are detached."""
    boxes = [t["boxes"].to(device) for t in targets]
    labels = [t["labels"].to(device) for t in targets]
    scores = [
        t["scores"].detach().to(device) if "scores" in t else torch.ones(len(t["labels"]), device=device)
        for t in targets
    ]
    counts = torch.tensor([len(t["labels"]) for t in targets], device=device)
    boxes, labels, scores = map(_pad, (boxes, labels, scores))
    return Objects(boxes, labels, scores, torch.arange(labels.shape[1], device=device) < counts[:, None])


def _pad(rows: list[Tensor]) -> Tensor:
    """(M_b, ...) each -> (B, M, ...), filled up with zeros, M at least 1."""
    one = rows[0].new_zeros(1, *rows[0].shape[1:])
    return pad_sequence([*rows, one], batch_first=True)[:-1]


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
    """Gives each object the locations that classify and box it best at once (TOOD, arXiv 2108.07755).

    Alignment is score^alpha * IoU^beta; an object takes its `top_k` best among the locations inside its box, and a
    location that several objects want goes to the one it overlaps most. Qualities are alignments rescaled so that an
    object's best equals its highest IoU. Deviation from the paper: an object that holds no location takes the one
    nearest to its centre, so that tiny objects are not lost.

    Args:
        scores: (B, N, K) class probabilities.
        boxes: (B, N, 4) predicted xyxy in pixels.
        locations: (N, 2) x and y in pixels.
        strides: (N,) pixels.
        target_boxes: (B, M, 4) xyxy in pixels, padded; M is at least 1.
        target_labels: (B, M) int64, padded with any class.
        target_mask: (B, M) bool, False for padding.
    """
    num_locations, num_objects = scores.shape[1], target_boxes.shape[1]
    inside = _inside(locations, target_boxes)
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


@torch.no_grad()
def assign_atss(
    anchors: Tensor,
    strides: Tensor,
    level_sizes: Sequence[int],
    target_boxes: Tensor,
    target_mask: Tensor,
    top_k: int = 9,
) -> tuple[Tensor, Tensor]:
    """Adaptive training sample selection (ATSS, Zhang 2020, arXiv 1912.02424), for one anchor a location.

    An object's candidates are, on each level, the `top_k` anchors nearest to its centre. It takes those that overlap it
    by at least the mean plus the deviation of all its candidates, and whose centre lies inside it. An anchor that
    several objects take goes to the one it overlaps most. Deviation from the paper, which can leave an object with
    nothing: where it is smaller than a cell, or where all of its anchors overlap others more, it takes the anchor of
    the finest level that is nearest to its centre, whoever else would have had it.

    Args:
        anchors: (N, 4) xyxy in pixels, level after level.
        strides: (N,) pixels.
        level_sizes: how many of them each level has.
        target_boxes: (B, M, 4) xyxy in pixels, padded; M is at least 1.
        target_mask: (B, M) bool, False for padding.
        top_k: candidates a level; fewer where the level has fewer.

    Returns:
        The object of each anchor, (B, N) int64, and where it is assigned at all, (B, N) bool.
    """
    mask = target_mask[..., None]
    overlap, candidates, threshold = adaptive_threshold(anchors.split(list(level_sizes)), target_boxes, top_k)
    locations = (anchors[:, :2] + anchors[:, 2:]) / 2
    near = torch.zeros_like(overlap, dtype=torch.bool).scatter_(-1, candidates, True)
    chosen = near & (overlap >= threshold[..., None]) & _inside(locations, target_boxes) & mask

    value = torch.where(chosen, overlap, overlap.new_full((), -1.0))
    winners = torch.zeros_like(chosen).scatter_(1, value.argmax(dim=1, keepdim=True), True)
    won = chosen & winners
    forced = _nearest_if_none(won, target_boxes, locations, strides) & mask
    value = torch.where(forced, 1 + overlap, value)
    best, objects = value.max(dim=1)
    return objects, best >= 0


@torch.no_grad()
def assign_by_overlap(
    anchors: Tensor,
    target_boxes: Tensor,
    target_mask: Tensor,
    foreground: float = 0.5,
    background: float = 0.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """RetinaNet's assignment (Lin 2017, arXiv 1708.02002): by each anchor's IoU with its best object.

    As in the authors' code, an object's own best anchors are assigned to it, all of them where several are equal, even
    if they overlap it less than `foreground`. Others that overlap such an anchor more get it only if it is their best
    too.

    Args:
        anchors: (N, 4) xyxy in pixels.
        target_boxes: (B, M, 4) xyxy in pixels, padded; M is at least 1.
        target_mask: (B, M) bool, False for padding.
        foreground: from this IoU on an anchor is assigned.
        background: below this IoU it is background; between the two it is neither.

    Returns:
        The object of each anchor, (B, N) int64; where it is assigned, and where it is neither, both (B, N) bool.
    """
    overlap = pairwise_iou(target_boxes, anchors).masked_fill(~target_mask[..., None], -1.0)  # (B, M, N)
    forced = (overlap == overlap.amax(dim=-1, keepdim=True)) & (overlap > 0)
    best = overlap.amax(dim=1)
    objects = torch.where(forced, 1 + overlap, overlap).argmax(dim=1)
    assigned = (best >= foreground) | forced.any(dim=1)
    return objects, assigned, (best >= background) & ~assigned


def _inside(locations: Tensor, target_boxes: Tensor) -> Tensor:
    """(B, M, N) whether each location (N, 2) lies inside each box (B, M, 4), edges left out."""
    top_left = locations - target_boxes[:, :, None, :2]
    bottom_right = target_boxes[:, :, None, 2:] - locations
    return torch.cat((top_left, bottom_right), dim=-1).amin(dim=-1) > 0


def _nearest_if_none(inside: Tensor, target_boxes: Tensor, locations: Tensor, strides: Tensor) -> Tensor:
    """(B, M, N) True at the finest location nearest to the centre of each object that holds no location."""
    centres = (target_boxes[..., :2] + target_boxes[..., 2:]) / 2
    finest = strides == strides.min()
    distance = (locations - centres[:, :, None]).square().sum(dim=-1)
    nearest = distance.masked_fill(~finest, float("inf")).argmin(dim=-1, keepdim=True)
    return torch.zeros_like(inside).scatter_(-1, nearest, True) & ~inside.any(dim=-1, keepdim=True)
