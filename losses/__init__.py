"""Detection and knowledge losses: tensors in, one unweighted float32 scalar out.

Every loss detaches its teacher or target and computes in float32, also under autocast. Weights and schedules belong to
whoever combines the losses.
"""

from losses.attention_guided import AttentionGuided, NonLocal, NonLocalRelation, attention_guided
from losses.box_iou import giou, pairwise_iou
from losses.detection import giou_loss, quality_focal_loss
from losses.feature_mimic import cwd, masked_mimic, pkd, plain_mimic, score_weighted_mimic
from losses.focal_global import FGD, FGDGlobal, fgd_focal
from losses.fpn_attention import attention_transfer, fgd_attention, fuse_levels
from losses.masked_generation import MGD
from losses.normalizer import average_across_ranks
from losses.region import fgd_masks, foreground_mask
from losses.soft_label import dense_sigmoid

__all__ = [
    "FGD",
    "MGD",
    "AttentionGuided",
    "FGDGlobal",
    "NonLocal",
    "NonLocalRelation",
    "attention_guided",
    "attention_transfer",
    "average_across_ranks",
    "cwd",
    "dense_sigmoid",
    "fgd_attention",
    "fgd_focal",
    "fgd_masks",
    "foreground_mask",
    "fuse_levels",
    "giou",
    "giou_loss",
    "masked_mimic",
    "pairwise_iou",
    "pkd",
    "plain_mimic",
    "quality_focal_loss",
    "score_weighted_mimic",
]
