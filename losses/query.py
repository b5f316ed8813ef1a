"""Query outputs of DETR-like heads: sets without an order, so a matching says which query learns from which."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from losses.box_iou import giou
from losses.detection import giou_loss, quality_focal_loss
from losses.normalizer import average_across_ranks
from losses.precision import at_least_float32


def query_distillation(
    student_logits: Tensor,
    student_boxes: Tensor,
    teacher_logits: Tensor,
    teacher_boxes: Tensor,
    beta: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
) -> Tensor:
    """Each teacher query teaches the student query that is matched to it (DETRDistill 2211.10156, KD-DETR 2211.08071).

    sum over pairs of [QFL(s, sigmoid(t)) + c * (5 * |b_S - b_T|_1 + 2 * (1 - GIoU))] / N, where c is the teacher
    query's highest class score. So every query learns the teacher's scores, background too, but boxes only where the
    teacher sees something. N is the sum of c over the pairs, averaged over ranks, at least 1. 5 and 2 are DETR's
    weights, which KD-DETR keeps.

    The pairs minimise the same sum with binary cross-entropy for QFL (Hungarian matching, image by image). Where the
    teacher has more queries than the student, its most confident ones take part; where it has fewer, the student's
    others learn nothing here.

    Deviations, each a choice where the two papers differ or are silent: DETRDistill matches likewise but does not
    weight the matching's box costs by c, and its class loss is plain cross-entropy; KD-DETR feeds both decoders the
    same queries instead of matching, has KL over the classes in place of QFL, and averages the four coordinates of L1,
    which are summed here as in DETR and DETRDistill.

    Args:
        student_logits: (B, Q_S, K) before the sigmoid.
        student_boxes: (B, Q_S, 4) cxcywh in [0, 1], in shares of the image.
        teacher_logits: (B, Q_T, K), with the same classes in the same order. Detached.
        teacher_boxes: (B, Q_T, 4) cxcywh in [0, 1], in shares of the same image. Detached.
        beta: exponent of the quality focal loss; 0 is plain binary cross-entropy, whose minimum is the entropy of the
            teacher's scores.
        l1_weight: of L1 against a class weight of 1.
        giou_weight: of GIoU against a class weight of 1.

    Returns:
        The normalised sum; 0 without queries, and where the student's queries are the teacher's in any order.

    Raises:
        ValueError: shapes other than these.
    """
    _require_queries("student", student_logits, student_boxes)
    _require_queries("teacher", teacher_logits, teacher_boxes)
    if student_logits.shape[::2] != teacher_logits.shape[::2]:
        raise ValueError(
            f"query_distillation: student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} "
            "logits must agree in batch and classes; only the number of queries may differ"
        )
    student_logits, student_boxes = at_least_float32(student_logits), at_least_float32(student_boxes)
    teacher_logits, teacher_boxes = at_least_float32(teacher_logits.detach()), at_least_float32(teacher_boxes.detach())

    confidence = teacher_logits.sigmoid().amax(dim=2)
    confidence, kept = confidence.topk(min(student_logits.shape[1], teacher_logits.shape[1]), dim=1)
    teacher_logits, teacher_boxes = _take(teacher_logits, kept), _take(teacher_boxes, kept)

    box_costs = _pairwise_box_loss(student_boxes.detach(), teacher_boxes, l1_weight, giou_weight)
    costs = _pairwise_cross_entropy(student_logits.detach(), teacher_logits) + confidence[..., None] * box_costs
    matched = _match(costs)
    student_logits, student_boxes = _take(student_logits, matched), _take(student_boxes, matched)

    class_loss = quality_focal_loss(student_logits, teacher_logits.sigmoid(), beta)
    l1_loss = (confidence[..., None] * (student_boxes - teacher_boxes).abs()).sum()
    overlap_loss = giou_loss(_to_xyxy(student_boxes), _to_xyxy(teacher_boxes), confidence)
    normalizer = average_across_ranks(confidence.sum()).clamp(min=1)
    return (class_loss + l1_weight * l1_loss + giou_weight * overlap_loss) / normalizer


def _pairwise_cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """BCE(sigmoid(s), sigmoid(t)) summed over classes, of every pair: (B, Q, K) and (B, P, K) -> (B, P, Q).

    BCE is softplus(s) - sigmoid(t) * s, so a matrix product does it without a tensor of all pairs and classes.
    """
    with torch.autocast(student_logits.device.type, enabled=False):  # it would multiply in half precision
        agreement = teacher_logits.sigmoid() @ student_logits.mT
    return F.softplus(student_logits).sum(dim=2)[:, None] - agreement


def _pairwise_box_loss(student_boxes: Tensor, teacher_boxes: Tensor, l1_weight: float, giou_weight: float) -> Tensor:
    """Weighted L1 and GIoU loss of every pair of cxcywh boxes: (B, Q, 4) and (B, P, 4) -> (B, P, Q)."""
    pairs = torch.broadcast_tensors(teacher_boxes[:, :, None], student_boxes[:, None])
    l1 = (pairs[0] - pairs[1]).abs().sum(dim=3)
    return l1_weight * l1 + giou_weight * (1 - giou(*map(_to_xyxy, pairs)))


def _match(costs: Tensor) -> Tensor:
    """The student query for each teacher query, each at most once, at the least total cost: (B, P, Q) -> (B, P)."""
    # a student that diverged is to show as a loss of NaN, not as an error of the matching
    on_cpu = costs.nan_to_num().cpu()
    matched = torch.zeros(costs.shape[:2], dtype=torch.long)
    for image, cost in enumerate(on_cpu):
        matched[image] = torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
    return matched.to(costs.device)


def _take(queries: Tensor, indices: Tensor) -> Tensor:
    """Each image's queries in another order: (B, Q, D) and (B, P) -> (B, P, D)."""
    return queries.gather(1, indices[..., None].expand(-1, -1, queries.shape[2]))


def _to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> (..., 4) xyxy."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def _require_queries(name: str, logits: Tensor, boxes: Tensor) -> None:
    if logits.dim() != 3 or not logits.shape[2] or boxes.shape != (*logits.shape[:2], 4):
        raise ValueError(
            f"query_distillation: the {name}'s logits have shape {tuple(logits.shape)} and its boxes "
            f"{tuple(boxes.shape)}; they must be (B, Q, K) and (B, Q, 4)"
        )
