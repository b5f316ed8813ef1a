"""Knowledge in the head's outputs: class scores and boxes, location by location."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distill.terms.base import KnowledgeTerm, Targets, require_dense_heads
from losses import box_mimic, dense_sigmoid
from losses.precision import at_least_float32
from students import DenseOutput, Detector


class DenseSigmoidTerm(KnowledgeTerm):
    """Class scores of dense sigmoid heads; see `losses.dense_sigmoid`."""

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        beta: float = 1.0,
        temperature: float = 1.0,
    ):
        require_dense_heads("dense_sigmoid", student, teacher)
        super().__init__(student, teacher, levels)
        self.beta, self.temperature = beta, temperature

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        return dense_sigmoid(
            [student.class_logits[i] for i, _ in self.pairs],
            [teacher.class_logits[j] for _, j in self.pairs],
            self.beta,
            self.temperature,
        )


class BoxMimicTerm(KnowledgeTerm):
    """Boxes of dense heads, each counting as much as the teacher's highest class score there; see `losses.box_mimic`.

    A box is taken from its location and in strides, the same for both detectors at paired levels.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        kind: Literal["giou", "smooth_l1"] = "giou",
    ):
        require_dense_heads("box_mimic", student, teacher)
        super().__init__(student, teacher, levels)
        self.kind = kind

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        boxes = torch.cat([boxes_around_locations(student.box_distances[i]) for i, _ in self.pairs])
        wanted = torch.cat([boxes_around_locations(teacher.box_distances[j]) for _, j in self.pairs])
        scores = torch.cat([best_scores(teacher.class_logits[j]).flatten() for _, j in self.pairs])
        return box_mimic(boxes, wanted, scores, self.kind)


def best_scores(class_logits: Tensor) -> Tensor:
    """(B, K, H, W) before the sigmoid -> (B, H, W), the highest class probability at each location."""
    return at_least_float32(class_logits).sigmoid().amax(dim=1)


def boxes_around_locations(distances: Tensor) -> Tensor:
    """Distances (B, 4, H, W) to the left, top, right and bottom edge -> boxes (B*H*W, 4) xyxy around the location."""
    left_top, right_bottom = distances.chunk(2, dim=1)
    return torch.cat((-left_top, right_bottom), dim=1).permute(0, 2, 3, 1).reshape(-1, 4)
