"""What a two-stage detector finds on its way, in tensors of fixed shape: as many proposals of every image, padded."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, roi_align

from students.nms import clip, survivors
from students.two_stage import TwoStageOutput


def propose_padded(
    rpn: RegionProposalNetwork, output: TwoStageOutput, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What torchvision's `filter_proposals` lets through in evaluation, where all of each image is valid.

    Args:
        rpn: with its thresholds and numbers.
        output: of the detector.
        image_size: (height, width) in pixels; boxes are clipped to it.

    Returns:
        Boxes (B, P, 4) xyxy in pixels, best first, and which of them are any, (B, P) bool; the rest are zeros.
    """
    levels = []
    for logits, deltas, anchors in zip(output.objectness, output.box_deltas, output.anchor_boxes):
        logits = logits.float().permute(0, 2, 3, 1).flatten(1)
        deltas = deltas.float().unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        logits, order = logits.topk(torch.sym_min(rpn._pre_nms_top_n["testing"], logits.shape[1]), dim=1)
        deltas = deltas.gather(1, order[..., None].expand(-1, -1, 4))
        boxes, scores = clip(decode_boxes(rpn.box_coder, deltas, anchors[order]), image_size), logits.sigmoid()
        counts = (boxes[..., 2:] - boxes[..., :2] >= rpn.min_size).all(dim=-1) & (scores >= rpn.score_thresh)
        # an NMS a level: they are short, and round no box of the first image, as moving levels apart would
        left = survivors(boxes, scores, counts, 0, 1, image_size, rpn.nms_thresh)
        levels.append((boxes, torch.where(left, scores, -1.0)))
    boxes, scores = (torch.cat(parts, dim=1) for parts in zip(*levels))
    scores, order = scores.topk(torch.sym_min(rpn._post_nms_top_n["testing"], scores.shape[1]), dim=1)
    found = scores >= 0
    return boxes.gather(1, order[..., None].expand(-1, -1, 4)) * found[..., None], found


def pool_padded(pool: MultiScaleRoIAlign, levels: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """What torchvision's pooling gives of boxes (B, P, 4): (B*P, C, 7, 7).

    How many boxes are a level's depends on the image, and so do shapes within. To look at each box on every level and
    choose afterwards would take several times as long.
    """
    images = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    rois = torch.cat((images[:, None, None].expand(-1, boxes.shape[1], 1), boxes), dim=-1).flatten(0, 1)
    own = pool.map_levels([boxes.flatten(0, 1)])
    pooled = boxes.new_zeros(rois.shape[0], levels[0].shape[1], *pool.output_size)
    for number, (level, scale) in enumerate(zip(levels, pool.scales)):
        rows = torch.nonzero(own == number).squeeze(1)
        here = roi_align(level.float(), rois[rows], pool.output_size, scale, pool.sampling_ratio)
        pooled = pooled.index_copy(0, rows, here)
    return pooled


def decode_boxes(box_coder: Callable, deltas: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (B, N, 4) from what is said of boxes (B, N, 4), one box each."""
    return box_coder.decode_single(deltas.flatten(0, 1), boxes.flatten(0, 1)).view_as(boxes)
