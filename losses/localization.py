"""Localisation: the student's boxes follow the teacher's, as distributions over each edge or as decoded boxes.

Both losses take all images and levels concatenated, so that one sum of weights normalises them all. The usual weight
is the teacher's highest class score at each location.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.adaptive_threshold import adaptive_threshold
from losses.box_iou import giou, pairwise_diou
from losses.kl_divergence import softened_kl
from losses.normalizer import weighted_mean
from losses.precision import at_least_float32
from losses.shape_check import require_same_shape, require_weight


def localization_distillation(
    student_bins: Tensor, teacher_bins: Tensor, weight: Tensor, temperature: float = 10.0
) -> Tensor:
    """LD: distributions over the place of each box edge (Zheng 2022, arXiv 2102.12252).

    tau^2 * KL(softmax(t / tau) || softmax(s / tau)), divided by the number of bins as in the authors' code (the paper
    sums them) and averaged over the four edges, is one location's loss; the whole is their weighted mean. The weights
    are the student's own class scores on positives and `valuable_region` elsewhere in LD, the teacher's class scores in
    CrossKD (arXiv 2306.11369).

    The normaliser is the sum of weights, averaged over ranks, at least 1e-6. So it is in CrossKD, whose code has no
    floor and no average; a deviation from LD's own code, which leaves the weighted sum undivided.

    Args:
        student_bins: (..., 4, R) logits, R bins for each edge.
        teacher_bins: the same shape, with the same bins. Detached.
        weight: (...) what each location counts, not negative. Detached.
        temperature: tau.

    Returns:
        The weighted mean; 0 for no locations.

    Raises:
        ValueError: the bins differ in shape or are not (..., 4, R), `weight` is not one number a location, or the
            temperature is not above 0.
    """
    require_same_shape("localization_distillation(student, teacher)", student_bins, teacher_bins)
    if student_bins.dim() < 2 or student_bins.shape[-2] != 4:
        raise ValueError(
            f"localization_distillation: bins have shape {tuple(student_bins.shape)}; they must be (..., 4, R)"
        )
    require_weight("localization_distillation", weight, student_bins, item_dims=2)
    divergence = softened_kl(student_bins, teacher_bins, temperature) / student_bins.shape[-1]
    return weighted_mean(divergence.mean(dim=-1), weight)


@torch.no_grad()
def valuable_region(anchors: Sequence[Tensor], target_boxes: Tensor, candidates_per_level: int = 9) -> Tensor:
    """Where LD also distils besides the positives: close to an object, not close enough to be assigned to it.

    The valuable localisation region (Zheng 2022, arXiv 2102.12252) is where some object has 0.25 thr <= DIoU < thr, thr
    its `adaptive_threshold`. An anchor may lie in one object's region and be positive for another, as in the authors'
    code; mask the positives where that is not wanted. An object without area has no region, so zeros can pad.

    A deviation: where DIoU is called for, that code (HikariTJU/LD, BboxOverlaps2D) divides the intersection by the
    anchor's area instead of the union; here it is the paper's DIoU.

    Args:
        anchors: (A_l, 4) xyxy a pyramid level; for heads without anchors, squares around the locations.
        target_boxes: (..., M, 4) xyxy in the same unit, the objects of each image.
        candidates_per_level: how many anchors a level enter thr.

    Returns:
        (..., sum A_l), levels in order, outside the graph: the highest IoU with an object whose region it is, the
        weight that the authors give; 0 outside. The mask is `> 0`.

    Raises:
        ValueError: no levels, anchors that are not (A_l, 4), or objects that are not (..., M, 4).
    """
    overlap, _, threshold = adaptive_threshold(anchors, target_boxes, candidates_per_level)
    closeness = pairwise_diou(target_boxes, torch.cat(list(anchors)))
    inside = (closeness >= 0.25 * threshold[..., None]) & (closeness < threshold[..., None])
    region = overlap.where(inside, 0)
    return region.amax(dim=-2) if region.shape[-2] else region.sum(dim=-2)


def box_mimic(
    student_boxes: Tensor, teacher_boxes: Tensor, weight: Tensor, kind: Literal["giou", "smooth_l1"] = "giou"
) -> Tensor:
    """Decoded boxes follow the teacher's, as in CrossKD (Wang 2024, arXiv 2306.11369).

    The weighted mean of 1 - GIoU, or of the smooth-L1 difference averaged over the four coordinates, quadratic below 1.
    Normalised by the sum of weights, averaged over ranks, at least 1e-6; CrossKD's code has no floor and no average.

    Args:
        student_boxes: (..., 4) xyxy; in any unit for GIoU, which smooth-L1 is measured in and bends at 1 of.
        teacher_boxes: the same shape and unit. Detached.
        weight: (...) the teacher's highest class score, or what else each box counts, not negative. Detached.
        kind: "giou" is free of scale; "smooth_l1" weighs large boxes more.

    Returns:
        The weighted mean; 0 for no boxes.

    Raises:
        ValueError: the boxes differ in shape or are not (..., 4), `weight` is not one number a box, or another `kind`.
    """
    require_same_shape("box_mimic(student, teacher)", student_boxes, teacher_boxes)
    if student_boxes.shape[-1] != 4:
        raise ValueError(f"box_mimic: boxes have shape {tuple(student_boxes.shape)}; they must be (..., 4), xyxy")
    require_weight("box_mimic", weight, student_boxes, item_dims=1)
    student, teacher = at_least_float32(student_boxes), at_least_float32(teacher_boxes.detach())
    if kind == "giou":
        difference = 1 - giou(student, teacher)
    elif kind == "smooth_l1":
        difference = F.smooth_l1_loss(student, teacher, reduction="none").mean(dim=-1)
    else:
        raise ValueError(f'box_mimic: kind is {kind!r}; it must be "giou" or "smooth_l1"')
    return weighted_mean(difference, weight)
