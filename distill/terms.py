"""Knowledge terms: each brings the tensors of two detectors together and hands them to one loss of `losses`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from losses import attention_transfer, dense_sigmoid, pkd, plain_mimic
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
