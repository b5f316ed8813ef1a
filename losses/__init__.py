"""Detection and knowledge losses: tensors in, one unweighted float32 scalar out.

Every loss detaches its teacher or target and computes in float32, also under autocast; float64 inputs stay float64.
Weights and schedules belong to whoever combines the losses.
"""

from losses.box_iou import giou, pairwise_diou, pairwise_iou
from losses.cross_head import align_statistics
from losses.detection import giou_loss, quality_focal_loss
from losses.feature_mimic import pkd, plain_mimic
from losses.fpn_attention import attention_transfer
from losses.localization import box_mimic, localization_distillation, valuable_region
from losses.normalizer import average_across_ranks
from losses.query import query_distillation
from losses.roi_head import bounded_regression, class_deltas, roi_classification, roi_regression
from losses.soft_label import dense_sigmoid, dist, dkd, kd

__all__ = [
    "align_statistics",
    "attention_transfer",
    "average_across_ranks",
    "bounded_regression",
    "box_mimic",
    "class_deltas",
    "dense_sigmoid",
    "dist",
    "dkd",
    "giou",
    "giou_loss",
    "kd",
    "localization_distillation",
    "pairwise_diou",
    "pairwise_iou",
    "pkd",
    "plain_mimic",
    "quality_focal_loss",
    "query_distillation",
    "roi_classification",
    "roi_regression",
    "valuable_region",
]
