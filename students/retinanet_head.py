"""RetinaNet's head (Lin 2017, arXiv 1708.02002): nine anchors a location, each moved and scaled to a box."""

import math

import torch
from torch import Tensor

from losses.detection import focal_loss
from losses.normalizer import average_across_ranks
from losses.precision import at_least_float32
from students.assignment import Objects, assign_by_overlap
from students.dense_head import DenseHead, Predictions, wanted_scores

# width and height in strides: 4 strides across, at 3 ratios of height to width and 3 scales an octave; in torchvision's
# order, so that where its RetinaNet teaches this head, or learns from it, anchors meet their like
ANCHOR_SIZES = [
    (4 * 2 ** (n / 3) / ratio**0.5, 4 * 2 ** (n / 3) * ratio**0.5) for ratio in (0.5, 1, 2) for n in range(3)
]
LARGEST_GROWTH = math.log(1000 / 16)  # in log scale; a fresh network must not overflow


class RetinaNetHead(DenseHead):
    """Class scores and deltas for nine anchors a location: 3 scales by 3 ratios of height to width (arXiv 1708.02002).

    A deviation: anchors lie around the centres of the cells, not around their corners.
    """

    anchors = len(ANCHOR_SIZES)

    def __init__(self, channels: int, num_classes: int, num_levels: int, depth: int):
        super().__init__(channels, num_classes, num_levels, depth)
        self.register_buffer("anchor_sizes", torch.tensor(ANCHOR_SIZES), persistent=False)  # (A, 2) in strides

    def read_boxes(self, outputs: Tensor) -> tuple[Tensor, ...]:
        deltas = at_least_float32(outputs).unflatten(1, (self.anchors, 4))  # (B, A, 4, H, W): x, y, width, height
        sizes = at_least_float32(self.anchor_sizes)[..., None, None]
        centre = deltas[:, :, :2] * sizes
        half = sizes * deltas[:, :, 2:].clamp(max=LARGEST_GROWTH).exp() / 2
        return (torch.cat((half - centre, half + centre), dim=2).flatten(1, 2),)

    def loss(self, predicted: Predictions, objects: Objects) -> dict[str, Tensor]:
        """Focal loss on all anchors but those too close to call, L1 between deltas on the assigned ones.

        Both are divided by the number of assigned anchors over the batch, averaged across ranks, at least 1.
        """
        logits, boxes = predicted.logits, predicted.boxes
        sizes = at_least_float32(self.anchor_sizes).repeat(len(predicted.locations) // self.anchors, 1)
        sizes = sizes * predicted.strides[:, None]
        anchors = torch.cat((predicted.locations - sizes / 2, predicted.locations + sizes / 2), dim=-1)
        index, assigned, ignored = assign_by_overlap(anchors, objects.boxes, objects.mask)
        matched = objects.at(index)
        assigned = (assigned & (matched.scores > 0)).float()
        num_assigned = average_across_ranks(assigned.sum()).clamp(min=1.0)

        wanted = wanted_scores(logits, matched.labels, assigned * matched.scores)
        counted = (~ignored).float()[..., None].expand_as(logits)
        classification = focal_loss(logits, wanted, counted) / num_assigned
        # over all anchors, most of weight 0: picking the positives out would make a GPU wait for the CPU
        difference = (to_deltas(boxes, anchors) - to_deltas(matched.boxes, anchors)).abs().sum(dim=-1)
        return {"classification": classification, "box": (difference * assigned).sum() / num_assigned}


def to_deltas(boxes: Tensor, anchors: Tensor) -> Tensor:
    """How far boxes (..., N, 4) xyxy lie from anchors (N, 4), in anchor sizes, and their growth, as logs."""
    anchor_sizes = anchors[:, 2:] - anchors[:, :2]
    sizes = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)  # padding has no size
    moved = (boxes[..., :2] + boxes[..., 2:] - anchors[:, :2] - anchors[:, 2:]) / 2
    return torch.cat((moved / anchor_sizes, (sizes / anchor_sizes).log()), dim=-1)
