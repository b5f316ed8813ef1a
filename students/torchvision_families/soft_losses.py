"""What torchvision's heads learn of objects that another detector found, each with a score.

torchvision's own losses know true objects only. Here what is assigned to an object of score s, by the head's own
assigner, should give it a probability of s: a sigmoid in focal loss at |s - p|, as quality focal loss has it (arXiv
2006.04388), or else in binary cross-entropy; a softmax by s on the class and 1 - s on the background, in cross-entropy.
All have no gradient at p = s, which torchvision's focal loss of soft targets has. All that is said of the object's box
counts s times. Divisors are torchvision's, counts of what is assigned; so scores of 1 give torchvision's own losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou, generalized_box_iou_loss

from losses.detection import focal_loss
from students.assignment import Objects, pad_targets
from students.dense_head import wanted_scores

Targets = list[dict[str, Tensor]]  # as `TorchvisionDetector.to_head_targets` gives them


def have_scores(targets: Targets) -> bool:
    """Whether any of a batch's targets are another detector's; the others' objects then have scores of 1."""
    return any("scores" in target for target in targets)


def match(matcher: Matcher, targets: Targets, anchors: list[Tensor]) -> list[Tensor]:
    """The object (N,) of each of an image's anchors (N, 4), as torchvision numbers them: -1 for the background."""
    return [
        matcher(box_iou(target["boxes"], boxes))
        if len(target["boxes"])
        else torch.full((len(boxes),), -1, device=boxes.device)
        for target, boxes in zip(targets, anchors)
    ]


def objects_of(targets: Targets, matched: list[Tensor]) -> Objects:
    """The object (B, N, ...) of each anchor, from its number (N,) on each image; where it is negative, there is none:
    `mask` is False there, and the score 0."""
    numbers = torch.stack(matched)
    objects = pad_targets(targets, numbers.device).at(numbers.clamp(min=0))
    return objects._replace(scores=objects.scores * (numbers >= 0), mask=numbers >= 0)


def soft_fcos_losses(
    head: FCOSHead, objects: Objects, predictions: dict[str, Tensor], anchors: list[Tensor]
) -> dict[str, Tensor]:
    """FCOS' losses, all divided by the number of assigned points; at least 1.

    Args:
        head: for how it encodes boxes.
        objects: of each point, (B, N, ...).
        predictions: (B, N, .) each, by torchvision's names.
        anchors: (N, 4) for each image.
    """
    logits, positive, points = predictions["cls_logits"], objects.mask, torch.stack(anchors)
    weight, number = objects.scores[positive], positive.sum().clamp(min=1)
    wanted = wanted_scores(logits, objects.labels, objects.scores)
    boxes = head.box_coder.decode(predictions["bbox_regression"], points)[positive]
    overlap_loss = generalized_box_iou_loss(boxes, objects.boxes[positive])
    edges = head.box_coder.encode(points[positive], objects.boxes[positive]).unflatten(-1, (2, 2))  # (P, 2, x and y)
    central = (edges.amin(dim=1) / edges.amax(dim=1)).prod(dim=-1).sqrt()
    said = predictions["bbox_ctrness"].squeeze(dim=2)[positive]
    return {
        "classification": focal_loss(logits, wanted, torch.ones_like(logits)) / number,
        "bbox_regression": (weight * overlap_loss).sum() / number,
        "bbox_ctrness": F.binary_cross_entropy_with_logits(said, central, weight, reduction="sum") / number,
    }


def soft_retinanet_losses(
    head: RetinaNetHead,
    objects: Objects,
    counted: Tensor,
    predictions: dict[str, Tensor],
    anchors: list[Tensor],
) -> dict[str, Tensor]:
    """RetinaNet's losses, of each image divided by the number of its assigned anchors, at least 1; their means.

    Args:
        head: for how it encodes boxes, and for its loss of them.
        objects: of each anchor, (B, N, ...).
        counted: (B, N) False where an anchor is too close to call.
        predictions: (B, N, .) each, by torchvision's names.
        anchors: (N, 4) for each image.
    """
    logits, positive = predictions["cls_logits"], objects.mask
    share = 1 / (len(positive) * positive.sum(dim=1, keepdim=True).clamp(min=1))  # (B, 1)
    wanted = wanted_scores(logits, objects.labels, objects.scores)
    weight = (objects.scores * share)[positive]
    said, boxes, anchors = (x[positive] for x in (predictions["bbox_regression"], objects.boxes, torch.stack(anchors)))
    coder = head.regression_head.box_coder
    if head.regression_head._loss_type == "giou":
        box_loss = generalized_box_iou_loss(coder.decode_single(said, anchors), boxes)
    else:
        box_loss = (said - coder.encode_single(boxes, anchors)).abs().sum(dim=-1)
    return {
        "classification": focal_loss(logits, wanted, (counted * share)[..., None].expand_as(logits)),
        "bbox_regression": (weight * box_loss).sum(),
    }


def soft_ssd_losses(
    model: SSD, objects: Objects, predictions: dict[str, Tensor], anchors: list[Tensor]
) -> dict[str, Tensor]:
    """SSD's losses, divided by the number of assigned anchors, at least 1. Of the others the worst classified count,
    a number for each assigned anchor of their image.

    Args:
        model: for that number, and for how it encodes boxes.
        objects: of each anchor, (B, N, ...).
        predictions: (B, N, .) each, by torchvision's names.
        anchors: (N, 4) for each image.
    """
    positive = objects.mask
    entropy = soft_cross_entropy(predictions["cls_logits"], objects.labels, objects.scores)
    ranks = entropy.detach().masked_fill(positive, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    negative = ranks < model.neg_to_pos_ratio * positive.sum(dim=1, keepdim=True)
    wanted = model.box_coder.encode_single(objects.boxes[positive], torch.stack(anchors)[positive])
    box_loss = weighted_smooth_l1(predictions["bbox_regression"][positive], wanted, objects.scores[positive], beta=1.0)
    number = positive.sum().clamp(min=1)
    return {
        "bbox_regression": box_loss / number,
        # apart, as in torchvision: where negatives run out, positives count among them
        "classification": (entropy[positive].sum() + entropy[negative].sum()) / number,
    }


def soft_proposal_losses(
    objectness: Tensor,
    deltas: Tensor,
    objects: Objects,
    positive: Tensor,
    negative: Tensor,
    anchors: list[Tensor],
    coder: BoxCoder,
) -> tuple[Tensor, Tensor]:
    """A proposal network's losses of objectness and boxes, divided by the number of sampled anchors.

    Args:
        objectness: (B*N, 1) before the sigmoid.
        deltas: (B*N, 4).
        objects: of each anchor, (B, N, ...).
        positive: (B*N,) bool, the sampled ones of those that are assigned.
        negative: (B*N,) bool, and of the background.
        anchors: (N, 4) for each image.
        coder: how deltas tell boxes.
    """
    sampled, scores = positive | negative, objects.scores.flatten()
    boxes, anchors = objects.boxes.flatten(0, 1)[positive], torch.cat(anchors)[positive]
    box_loss = weighted_smooth_l1(deltas[positive], coder.encode_single(boxes, anchors), scores[positive], beta=1 / 9)
    objectness_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], scores[sampled])
    return objectness_loss, box_loss / sampled.sum()


def soft_roi_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """An ROI head's losses of classes and boxes, divided by the number of sampled boxes.

    Args:
        logits: (P, C) before the softmax, the background first.
        deltas: (P, C*4).
        labels: (P,) int64; 0 for the background.
        wanted: (P, 4) the true deltas.
        scores: (P,) of the object of each; whatever it be for the background.
    """
    positive = labels > 0
    scores = scores * positive
    said = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]
    box_loss = weighted_smooth_l1(said, wanted[positive], scores[positive], beta=1 / 9)
    return soft_cross_entropy(logits, labels, scores).mean(), box_loss / len(labels)


def soft_cross_entropy(logits: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """(...) -s log p_label - (1 - s) log p_0, of logits (..., C) whose first class is the background, with labels and
    scores s (...)."""
    log_p = logits.log_softmax(dim=-1)
    return -(scores * log_p.gather(-1, labels[..., None]).squeeze(-1) + (1 - scores) * log_p[..., 0])


def weighted_smooth_l1(said: Tensor, wanted: Tensor, weight: Tensor, beta: float) -> Tensor:
    """The sum of the smooth L1 distances of (P, 4) from (P, 4), each row times its weight (P,)."""
    return (F.smooth_l1_loss(said, wanted, beta=beta, reduction="none").sum(dim=-1) * weight).sum()
