"""Detection and knowledge losses: tensors in, one unweighted float32 scalar out.

Every loss detaches its teacher or target and computes in float32, also under autocast; float64 inputs stay float64.
Weights and schedules belong to whoever combines the losses.
"""

from losses.adaptive_threshold import adaptive_threshold
from losses.attention_guided import AttentionGuided, NonLocal, NonLocalRelation, attention_guided
from losses.box_iou import ciou, giou, iou, pairwise_diou, pairwise_iou
from losses.cross_head import align_statistics
from losses.detection import distribution_focal_loss, focal_loss, giou_loss, quality_focal_loss
from losses.feature_mimic import cwd, masked_mimic, pkd, plain_mimic, score_weighted_mimic
from losses.focal_global import FGD, FGDGlobal, fgd_focal
from losses.fpn_attention import attention_transfer, fgd_attention, fuse_levels
from losses.localization import box_mimic, localization_distillation, valuable_region
from losses.masked_generation import MGD
from losses.normalizer import average_across_ranks
from losses.query import query_distillation
from losses.region import fgd_masks, foreground_mask
from losses.roi_head import bounded_regression, class_deltas, roi_classification, roi_regression
from losses.soft_label import dense_sigmoid, dist, dkd, kd

__all__ = [
    "FGD",
    "MGD",
    "AttentionGuided",
    "FGDGlobal",
    "NonLocal",
    "NonLocalRelation",
    "adaptive_threshold",
    "align_statistics",
    "attention_guided",
    "attention_transfer",
    "average_across_ranks",
    "bounded_regression",
    "box_mimic",
    "ciou",
    "class_deltas",
    "cwd",
    "dense_sigmoid",
    "dist",
    "distribution_focal_loss",
    "dkd",
    "fgd_attention",
    "fgd_focal",
    "fgd_masks",
    "focal_loss",
    "foreground_mask",
    "fuse_levels",
    "giou",
    "giou_loss",
    "iou",
    "kd",
    "localization_distillation",
    "masked_mimic",
    "pairwise_diou",
    "pairwise_iou",
    "pkd",
    "plain_mimic",
    "quality_focal_loss",
    "query_distillation",
    "roi_classification",
    "roi_regression",
    "score_weighted_mimic",
    "valuable_region",
]
