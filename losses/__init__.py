"""Detection and knowledge losses: tensors in, one unweighted float32 scalar out.

Every loss detaches its teacher or target and computes in float32, also under autocast. Weights and schedules belong to
whoever combines the losses.
"""

from losses.box_iou import giou, pairwise_iou
from losses.detection import giou_loss, quality_focal_loss
from losses.feature_mimic import pkd, plain_mimic
from losses.fpn_attention import attention_transfer
from losses.normalizer import average_across_ranks
from losses.soft_label import dense_sigmoid

__all__ = [
    "attention_transfer",
    "average_across_ranks",
    "dense_sigmoid",
    "giou",
    "giou_loss",
    "pairwise_iou",
    "pkd",
    "plain_mimic",
    "quality_focal_loss",
]
