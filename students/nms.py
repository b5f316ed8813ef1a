"""From all predictions of an image to the few that are told: the best candidates, then class-wise NMS.

Twice, for two readers: `select` gives lists whose length depends on what was found, `select_padded` the same detections
in tensors of fixed shape, which a graph can be exported with.
"""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from students.detector import Detections, Limits

LIMITS = Limits()
SCORE_THRESHOLD, IOU_THRESHOLD, MAX_CANDIDATES, MAX_DETECTIONS = LIMITS


def select(
    boxes: Tensor,
    scores: Tensor,
    image_sizes: list[tuple[int, int]],
    score_threshold: float = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
    max_candidates: int = MAX_CANDIDATES,
    max_detections: int = MAX_DETECTIONS,
) -> list[Detections]:
    """The detections of each image, best first.

    Args:
        boxes: (B, N, 4) xyxy in pixels; (B, N, K, 4) where each class has its own.
        scores: (B, N, K) in [0, 1].
        image_sizes: (height, width) of the valid part of each image, in pixels; boxes are clipped to it.
        score_threshold: lower scores are dropped.
        iou_threshold: of two boxes of one class that overlap more, the lower-scored goes.
        max_candidates: (prediction, class) pairs that enter the NMS, per image.
        max_detections: detections kept per image.
    """
    top_boxes, top_scores, top_labels = _candidates(boxes, scores, max_candidates)
    detections = []
    for i, (height, width) in enumerate(image_sizes):
        keep = top_scores[i] > score_threshold
        limit = boxes.new_tensor([width, height, width, height])
        candidates = top_boxes[i][keep].clamp(min=0).minimum(limit)
        kept_scores, labels = top_scores[i][keep], top_labels[i][keep]
        order = batched_nms(candidates, kept_scores, labels, iou_threshold)[:max_detections]
        detections.append(Detections(candidates[order], kept_scores[order], labels[order]))
    return detections


def select_padded(
    boxes: Tensor, scores: Tensor, image_size: tuple[int, int], limits: Limits = LIMITS
) -> tuple[Tensor, Tensor, Tensor]:
    """What `select` gives where all of each image is valid, without shapes that depend on values.

    Args:
        boxes: (B, N, 4) xyxy in pixels; (B, N, K, 4) where each class has its own.
        scores: (B, N, K) in [0, 1].
        image_size: (height, width) of all images, in pixels; boxes are clipped to it.
        limits: of `select`.

    Returns:
        Boxes (B, M, 4), scores (B, M), best first, and labels (B, M) int64; M are the most detections. Where an image
        has fewer, the rest are boxes of zeros with score 0 and label -1. With fewer candidates than M, as many of each.
    """
    num_classes = scores.shape[-1]
    boxes, scores, labels = _candidates(boxes, scores, limits.max_candidates)
    boxes = clip(boxes, image_size)
    counts = scores > limits.score_threshold
    survives = survivors(boxes, scores, counts, labels, num_classes, image_size, limits.iou_threshold)
    scores = torch.where(survives, scores, 0.0)
    scores, order = scores.topk(torch.sym_min(limits.max_detections, scores.shape[1]), dim=1)
    found = scores > 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * found[..., None]
    return boxes, scores, torch.where(found, labels.gather(1, order), -1)


def clip(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) with nothing beyond the image of (height, width)."""
    height, width = image_size
    return torch.stack((boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)), dim=-1).flatten(-2)


def survivors(
    boxes: Tensor,
    scores: Tensor,
    counts: Tensor,
    groups: Tensor | int,
    num_groups: int,
    image_size: tuple[int, int],
    iou_threshold: float,
) -> Tensor:
    """Which boxes an NMS leaves, (B, M) bool, without shapes that depend on values.

    Args:
        boxes: (B, M, 4) xyxy in pixels, within the image.
        scores: (B, M).
        counts: (B, M) bool; the others neither survive nor suppress any.
        groups: (B, M), from 0; only boxes of one group meet.
        num_groups: one more than the last.
        image_size: (height, width) of all images, in pixels.
        iou_threshold: of two boxes of one group that overlap more, the lower-scored goes.
    """
    # one NMS for all: boxes of other groups and images are moved so far away that they cannot meet
    images = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    place = (images * num_groups + groups) * (torch.sym_max(*image_size) + 1)
    # what does not count lies in one place of its own, where the first suppresses the rest and costs no more time
    nowhere = boxes.new_tensor([-2.0, -2.0, -1.0, -1.0])
    apart = torch.where(counts[..., None], boxes + place[..., None], nowhere)
    kept = nms(apart.flatten(0, 1), scores.flatten(), iou_threshold)
    return (torch.zeros_like(scores).flatten().index_fill(0, kept, 1.0).view_as(scores) > 0) & counts


def _candidates(boxes: Tensor, scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best (prediction, class) pairs of each image: boxes (B, M, 4), scores (B, M), best first, labels (B, M)."""
    num_classes = scores.shape[-1]
    scores, order = scores.flatten(1).topk(torch.sym_min(most, scores.shape[1] * num_classes), dim=1)
    of_each_class = boxes.dim() == 4
    boxes, rows = (boxes.flatten(1, 2), order) if of_each_class else (boxes, order // num_classes)
    return boxes.gather(1, rows[..., None].expand(-1, -1, 4)), scores, order % num_classes
