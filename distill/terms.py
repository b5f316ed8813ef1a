"""Knowledge terms: each brings the tensors of two detectors together and hands them to one loss of `losses`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from losses import attention_transfer, box_mimic, dense_sigmoid, pkd, plain_mimic
from losses.precision import at_least_float32
from students import DenseOutput, Detector


def match_levels(student_strides: tuple[int, ...], teacher_strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs (student level, teacher level) of equal stride, fine to coarse.

    Raises:
        ValueError: no stride in common.
    """
    pairs = [(i, teacher_strides.index(s)) for i, s in enumerate(student_strides) if s in teacher_strides]
    if not pairs:
        raise ValueError(
            f"losses: the student's levels (strides {list(student_strides)}) and the teacher's "
            f"({list(teacher_strides)}) have none in common; change student.levels"
        )
    return pairs


class KnowledgeTerm(nn.Module, ABC):
    """One loss between a student and a teacher; what it counts is the combiner's business.

    Args:
        student: read for its strides and widths; not kept.
        teacher: likewise.
    """

    def __init__(self, student: Detector, teacher: Detector):
        super().__init__()
        self.pairs = match_levels(student.strides, teacher.strides)

    @abstractmethod
    def forward(self, student: DenseOutput, teacher: DenseOutput) -> Tensor:
        """The unweighted loss, a float32 scalar."""

    def adapt(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """What the term's own layers make of the student's pyramid, for tracing; nothing if it has none."""
        return []

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """Layers whose outputs meet the teacher's, so that no pruner may narrow them."""
        return ()


class SoftLabelTerm(KnowledgeTerm):
    """Class scores of dense sigmoid heads, location by location; `loss` takes lists of (B, K, H, W) logits."""

    def __init__(self, student: Detector, teacher: Detector, beta: float = 1.0):
        super().__init__(student, teacher)
        self.beta = beta

    def forward(self, student: DenseOutput, teacher: DenseOutput) -> Tensor:
        return dense_sigmoid(
            [student.class_logits[i] for i, _ in self.pairs],
            [teacher.class_logits[j] for _, j in self.pairs],
            self.beta,
        )


class BoxMimicTerm(KnowledgeTerm):
    """Boxes of dense heads, location by location, each counting as much as the teacher's highest class score there.

    A box is taken from its location and in strides, the same for both detectors at paired levels.
    """

    def __init__(self, student: Detector, teacher: Detector, kind: Literal["giou", "smooth_l1"] = "giou"):
        super().__init__(student, teacher)
        self.kind = kind

    def forward(self, student: DenseOutput, teacher: DenseOutput) -> Tensor:
        boxes = torch.cat([boxes_around_locations(student.box_distances[i]) for i, _ in self.pairs])
        wanted = torch.cat([boxes_around_locations(teacher.box_distances[j]) for _, j in self.pairs])
        scores = [at_least_float32(teacher.class_logits[j]).sigmoid().amax(dim=1).flatten() for _, j in self.pairs]
        return box_mimic(boxes, wanted, torch.cat(scores), self.kind)


def boxes_around_locations(distances: Tensor) -> Tensor:
    """Distances (B, 4, H, W) to the left, top, right and bottom edge -> boxes (B*H*W, 4) xyxy around the location."""
    left_top, right_bottom = distances.chunk(2, dim=1)
    return torch.cat((-left_top, right_bottom), dim=1).permute(0, 2, 3, 1).reshape(-1, 4)


class FeatureMimicTerm(KnowledgeTerm):
    """Pyramid maps, level by level, behind a 1x1 convolution each that brings the student's width to the teacher's."""

    def __init__(self, student: Detector, teacher: Detector, loss: Callable[[Tensor, Tensor], Tensor] = pkd):
        super().__init__(student, teacher)
        self.loss = loss
        widths, wanted = student.feature_channels, teacher.feature_channels
        self.adapters = nn.ModuleDict(
            {f"P{int(math.log2(student.strides[i]))}": nn.Conv2d(widths[i], wanted[j], 1) for i, j in self.pairs}
        )

    def forward(self, student: DenseOutput, teacher: DenseOutput) -> Tensor:
        adapted = self.adapt(student.features)
        return sum(self.loss(x, teacher.features[j]) for x, (_, j) in zip(adapted, self.pairs))

    def adapt(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        return [adapter(features[i]) for adapter, (i, _) in zip(self.adapters.values(), self.pairs)]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.adapters.values())


class FPNAttentionTerm(KnowledgeTerm):
    """Where the pyramid is strong, level by level; widths may differ, so there is nothing to adapt."""

    def forward(self, student: DenseOutput, teacher: DenseOutput) -> Tensor:
        return sum(attention_transfer(student.features[i], teacher.features[j]) for i, j in self.pairs)


MIMIC_LOSSES = {"plain_mimic": plain_mimic, "pkd": pkd}
