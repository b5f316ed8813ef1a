"""Knowledge in the head's outputs: class scores and boxes, location by location."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distill.terms.base import KnowledgeTerm, Targets, require_dense_heads
from losses import box_mimic, dense_sigmoid
from losses.precision import at_least_float32
from students import DenseOutput, Detector
from students.locations import flatten_levels


class DenseSigmoidTerm(KnowledgeTerm):
    """Class scores of dense sigmoid heads, prediction by prediction; see `losses.dense_sigmoid`.

    Each class is a binary question of its own, as the heads are trained: a softmax over the classes, which KD, DKD and
    DIST stand on, would leave out how sure of an object the teacher is at all (BCKD, Yang 2023, arXiv 2308.14286).

    Raises:
        ValueError: heads that do not make equally many predictions at each location.
    """

    fields = ("class_logits",)
    uses_classes = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        beta: float = 1.0,
        temperature: float = 1.0,
    ):
        require_same_anchors("dense_sigmoid", student, teacher)
        super().__init__(student, teacher, levels)
        self.anchors = student.anchors
        self.beta, self.temperature = beta, temperature

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        return dense_sigmoid(
            [split_anchors(student.class_logits[i], self.anchors) for i, _ in self.pairs],
            [split_anchors(teacher.class_logits[j], self.anchors) for _, j in self.pairs],
            self.beta,
            self.temperature,
        )


class BoxMimicTerm(KnowledgeTerm):
    """Boxes of dense heads, each counting as much as the teacher's highest class score there; see `losses.box_mimic`.

    A box is taken from its location and in strides, the same for both detectors at paired levels.

    Raises:
        ValueError: heads that do not make equally many predictions at each location.
    """

    fields = ("class_logits", "box_distances")
    uses_classes = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        kind: Literal["giou", "smooth_l1"] = "giou",
    ):
        require_same_anchors("box_mimic", student, teacher)
        super().__init__(student, teacher, levels)
        self.anchors = student.anchors
        self.kind = kind

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        boxes = boxes_around_locations([student.box_distances[i] for i, _ in self.pairs], self.anchors)
        wanted = boxes_around_locations([teacher.box_distances[j] for _, j in self.pairs], self.anchors)
        scores = prediction_scores([teacher.class_logits[j] for _, j in self.pairs], self.anchors)
        return box_mimic(boxes, wanted, scores, self.kind)


def require_same_anchors(name: str, student: Detector, teacher: Detector) -> None:
    """Refuses heads whose predictions are no counterparts of each other.

    Raises:
        ValueError: unlike numbers of predictions at a location, or no dense head.
    """
    require_dense_heads(name, student, teacher)
    if student.anchors != teacher.anchors:
        raise ValueError(
            f"name: {name} needs dense heads with equally many predictions at each location; the student makes "
            f"{student.anchors}, the teacher {teacher.anchors}; choose pseudo_label, which fits any pair"
        )


def split_anchors(level: Tensor, anchors: int) -> Tensor:
    """(B, A*C, H, W) -> (B*A, C, H, W): each anchor's predictions as a map of their own."""
    return level.unflatten(1, (anchors, -1)).flatten(0, 1)


def best_scores(class_logits: Tensor) -> Tensor:
    """(B, K, H, W) before the sigmoid -> (B, H, W), the highest class probability at each location."""
    return at_least_float32(class_logits).sigmoid().amax(dim=1)


def prediction_scores(class_logits: Sequence[Tensor], anchors: int) -> Tensor:
    """(B, A*K, H, W) a level -> (B, N), the highest class probability of each prediction."""
    return at_least_float32(flatten_levels(class_logits, anchors)).sigmoid().amax(dim=-1)


def boxes_around_locations(distances: Sequence[Tensor], anchors: int) -> Tensor:
    """Distances (B, A*4, H, W) a level -> boxes (B, N, 4) xyxy, in strides, seen from their location."""
    left_top, right_bottom = flatten_levels(distances, anchors).chunk(2, dim=-1)
    return torch.cat((-left_top, right_bottom), dim=-1)
