"""The anchor-free head that is trained with task-aligned assignment (TOOD, arXiv 2108.07755)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.detection import giou_loss, quality_focal_loss
from losses.normalizer import average_across_ranks
from students.assignment import Objects, assign_task_aligned
from students.dense_head import DenseHead, Predictions, wanted_scores


class TaskAlignedHead(DenseHead):
    """Class scores and edge distances at each location (FCOS, arXiv 1904.01355).

    There is no centerness branch: the class score is trained to be the quality of its box.
    """

    first_box = 2.0  # a first box of about 4 strides, an object's usual size
    box_loss_weight = 5.0

    def read_boxes(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return (F.softplus(outputs),)

    def loss(self, predicted: Predictions, objects: Objects) -> dict[str, Tensor]:
        """Quality focal loss on all locations and GIoU on the assigned ones.

        The first is divided by the sum of the assigned qualities over the batch, the second by the number of assigned
        locations; both at least 1 and averaged across ranks. A deviation from the paper, which weights boxes by their
        quality too: that leaves small objects, whose first boxes are poor, without a gradient to better them.
        """
        logits, boxes = predicted.logits, predicted.boxes
        index, quality = assign_task_aligned(
            logits.detach().sigmoid(),
            boxes.detach(),
            predicted.locations,
            predicted.strides,
            objects.boxes,
            objects.labels,
            objects.mask,
        )
        matched = objects.at(index)
        quality = quality * matched.scores
        assigned = (quality > 0).float()
        total_quality, num_assigned = average_across_ranks(torch.stack((quality.sum(), assigned.sum()))).clamp(min=1.0)
        classification = quality_focal_loss(logits, wanted_scores(logits, matched.labels, quality)) / total_quality
        # over all locations, most of weight 0: picking the positives out would make a GPU wait for the CPU
        box = giou_loss(boxes, matched.boxes, assigned) / num_assigned
        return {"classification": classification, "box": self.box_loss_weight * box}
