"""The head of Generalized Focal Loss (Li 2020, arXiv 2006.04388): every edge is a distribution over distances."""

import torch
from torch import Tensor

from losses.box_iou import iou
from losses.detection import distribution_focal_loss, giou_loss, quality_focal_loss
from losses.normalizer import average_across_ranks
from losses.precision import at_least_float32
from students.assignment import Objects, assign_atss
from students.dense_head import DenseHead, Predictions, wanted_scores
from students.locations import square_anchors, to_distances


class GFLHead(DenseHead):
    """Class scores that are the IoU of their boxes, and for each edge a distribution over 0 to 16 strides.

    A distance is its distribution's mean. Locations are assigned by ATSS.

    Deviations: anchors lie around the centres of the cells, not around their corners; and where the authors scale each
    level's logits by a learnt number, the towers have batch norms of their own a level.
    """

    box_bins = 17
    giou_weight, dfl_weight = 2.0, 0.25

    def read_boxes(self, outputs: Tensor) -> tuple[Tensor, ...]:
        shares = at_least_float32(outputs).unflatten(1, (4, self.box_bins)).softmax(dim=2)
        bins = torch.arange(self.box_bins, device=outputs.device, dtype=shares.dtype)
        return (shares * bins[:, None, None]).sum(dim=2), outputs

    def loss(self, predicted: Predictions, objects: Objects) -> dict[str, Tensor]:
        """Quality focal loss on all locations; GIoU and distribution focal loss on the assigned ones.

        The first is divided by the number of assigned locations. In the others each location counts as much as its
        highest class score, and they are divided by the sum of these. Both divisors are averaged across ranks and at
        least 1.
        """
        logits, boxes, locations, strides = predicted.logits, predicted.boxes, predicted.locations, predicted.strides
        index, assigned = assign_atss(
            square_anchors(locations, strides), strides, predicted.level_sizes, objects.boxes, objects.mask
        )
        matched = objects.at(index)
        assigned = (assigned & (matched.scores > 0)).float()
        quality = iou(boxes.detach(), matched.boxes) * assigned * matched.scores
        weight = logits.detach().sigmoid().amax(dim=-1) * assigned
        num_assigned, total_weight = average_across_ranks(torch.stack((assigned.sum(), weight.sum()))).clamp(min=1.0)

        classification = quality_focal_loss(logits, wanted_scores(logits, matched.labels, quality)) / num_assigned
        distances = to_distances(matched.boxes, locations, strides)
        # over all locations, most of weight 0: picking the positives out would make a GPU wait for the CPU
        edges = distribution_focal_loss(predicted.box_logits, distances, weight[..., None].expand_as(distances))
        box = self.giou_weight * giou_loss(boxes, matched.boxes, weight) + self.dfl_weight * edges / 4
        return {"classification": classification, "box": box / total_weight}
