"""What the YOLO detectors learn their own task with."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.box_iou import ciou, pairwise_iou
from losses.normalizer import average_across_ranks
from students.assignment import Objects
from students.yolo.assignment import Matches, Predicted

NOMINAL_BATCH = 64  # images; what the published gains and rates go with
_BALANCE = (4.0, 1.0, 0.4)  # of the objectness of the levels: fine ones have more cells, and most of them are empty


class Gains(NamedTuple):
    """Weights of the three losses, as published for images of 640x640 pixels with 80 classes."""

    box: float
    objectness: float
    classification: float


def balanced_losses(predicted: Predicted, objects: Objects, matches: Matches, gains: Gains) -> dict[str, Tensor]:
    """YOLOv5's losses, and YOLOv7's for another assignment: means over each level, added up.

    Boxes have 1 - CIoU, classes a binary cross-entropy each. Objectness should be the CIoU of the matched box, 0
    without any; the largest where there are several. Its gain follows the image's area, that of classes their number,
    and all are for batches of 64 images: what the published rates see, however large the present batch is.

    Where objects have scores, what they ask for counts so much less. Deviation: the original leaves class scores out
    where there is one class only, and the scores of its detections rest on a layer that is never trained.

    Args:
        predicted: of the batch.
        objects: likewise.
        matches: pairs of the two.
        gains: of this architecture.
    """
    index, num_classes = matches.predictions, predicted.classes.shape[-1]
    wanted, boxes, classes = _pairs(predicted, objects, matches)
    weight = matches.counted * wanted.scores
    numbers = [x.sum() for x in (weight > 0).float().split(matches.level_sizes, dim=1)]
    numbers = average_across_ranks(torch.stack(numbers)).clamp(min=1.0)  # (levels,)

    overlap = ciou(boxes, wanted.boxes)
    box = _by_level((1 - overlap) * weight, matches) / numbers
    entropy = _class_entropy(classes, wanted.labels) * weight
    classification = _by_level(entropy, matches) / (numbers * num_classes)

    quality = overlap.detach().clamp(min=0) * weight
    target = torch.zeros_like(predicted.objectness).scatter_reduce(1, index, quality, "amax")
    objectness = F.binary_cross_entropy_with_logits(predicted.objectness, target, reduction="none")
    levels = objectness.split(predicted.level_sizes, dim=1)
    height, width = (side * 8 for side in predicted.shapes[0])
    area, share = height * width / 640**2, num_classes / 80
    return {
        "classification": NOMINAL_BATCH * gains.classification * share * classification.sum(),
        "objectness": NOMINAL_BATCH * gains.objectness * area * sum(b * x.mean() for b, x in zip(_BALANCE, levels)),
        "box": NOMINAL_BATCH * gains.box * box.sum(),
    }


def darknet_losses(
    predicted: Predicted, objects: Objects, matches: Matches, ignored: float = 0.7, box_gain: float = 0.07
) -> dict[str, Tensor]:
    """YOLOv4's losses: sums over each image, divided by the number of images.

    Boxes have 1 - CIoU, classes and objectness a binary cross-entropy each. Objectness should be 1 for matched
    anchors, else 0, but what overlaps any object by more than `ignored` is neither.

    Where objects have scores, what they ask for counts so much less.

    Args:
        predicted: of the batch.
        objects: likewise.
        matches: pairs of the two.
        ignored: IoU.
        box_gain: as in the authors' configuration.
    """
    wanted, boxes, classes = _pairs(predicted, objects, matches)
    weight = matches.counted * wanted.scores
    box = (1 - ciou(boxes, wanted.boxes)) * weight
    target = torch.zeros_like(predicted.objectness).scatter_reduce(1, matches.predictions, weight, "amax")
    with torch.no_grad():
        overlap = pairwise_iou(objects.boxes, predicted.boxes).masked_fill(~objects.mask[..., None], 0.0)
        counted = (target > 0) | (overlap.amax(dim=1) <= ignored)
    objectness = F.binary_cross_entropy_with_logits(predicted.objectness, target, counted.float(), reduction="sum")
    images = len(target)
    return {
        "classification": (_class_entropy(classes, wanted.labels) * weight).sum() / images,
        "objectness": objectness / images,
        "box": box_gain * box.sum() / images,
    }


def _pairs(predicted: Predicted, objects: Objects, matches: Matches) -> tuple[Objects, Tensor, Tensor]:
    """The object (B, C), the predicted box (B, C, 4) and class logits (B, C, K) of each match."""
    index = matches.predictions[..., None]
    boxes, classes = (x.gather(1, index.expand(-1, -1, x.shape[-1])) for x in (predicted.boxes, predicted.classes))
    return objects.at(matches.objects), boxes, classes


def _class_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C) binary cross-entropy of logits (B, C, K), summed over the classes, where only the label's should be 1."""
    # `one_hot` would make a GPU wait, to see whether all labels are classes
    target = (labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=-1)


def _by_level(values: Tensor, matches: Matches) -> Tensor:
    """The sum of values (B, C) on each level, (levels,)."""
    return torch.stack([x.sum() for x in values.split(matches.level_sizes, dim=1)])
