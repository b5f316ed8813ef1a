"""What every knowledge term is: two detectors' tensors brought together, level by level, and handed to one loss."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from losses.precision import at_least_float32
from students import DenseOutput, Detector

Targets = Sequence[dict[str, Tensor]]


def level_name(stride: int) -> str:
    """P3 for a stride of 8."""
    return f"P{int(math.log2(stride))}"


def match_levels(
    student_strides: tuple[int, ...], teacher_strides: tuple[int, ...], levels: Sequence[str] | None = None
) -> list[tuple[int, int]]:
    """Pairs (student level, teacher level) of equal stride, fine to coarse.

    Args:
        student_strides: pixels, fine to coarse.
        teacher_strides: likewise.
        levels: names of the student's levels to pair, such as P3; all that have a partner if None.

    Raises:
        ValueError: no stride in common, or a level that one of them does not have.
    """
    pairs = [
        (i, teacher_strides.index(stride))
        for i, stride in enumerate(student_strides)
        # of two levels as coarse as each other the later one, which has seen more, stands for both
        if stride in teacher_strides and stride not in student_strides[i + 1 :]
    ]
    if not pairs:
        raise ValueError(
            f"levels: the student's levels (strides {list(student_strides)}) and the teacher's "
            f"({list(teacher_strides)}) have none in common; change student.levels"
        )
    if levels is None:
        return pairs
    common = {level_name(student_strides[i]): (i, j) for i, j in pairs}
    for level in levels:
        if level not in common:
            raise ValueError(f"levels: {level} does not exist; student and teacher have {', '.join(common)} in common")
    return [pair for name, pair in common.items() if name in levels]


class KnowledgeTerm(nn.Module, ABC):
    """One loss between a student and a teacher; what it counts is the combiner's business.

    Args:
        student: read for its strides and widths; not kept.
        teacher: likewise.
        levels: names of the student's levels that take part; all that the teacher has too if None.

    Attributes:
        pairs: (student level, teacher level) of equal stride.
        level_names: the pairs' names, such as P3.
    """

    def __init__(self, student: Detector, teacher: Detector, levels: Sequence[str] | None = None):
        super().__init__()
        self.pairs = match_levels(student.strides, teacher.strides, levels)
        self.level_names = [level_name(student.strides[i]) for i, _ in self.pairs]

    def bind(self, student: Detector, teacher: Detector) -> None:
        """Is told who plays the two parts once both are ready; most terms need their outputs only."""

    @abstractmethod
    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        """The unweighted loss, a float32 scalar.

        Args:
            student: what the student made of a batch.
            teacher: what the teacher made of the same images.
            targets: the batch's ground truth, see `Detector.loss`.
            image_size: height and width of the batch, pixels.
        """

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """What the term's own layers make of the student's pyramid, for tracing; nothing if it has none."""
        return []

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """Layers whose outputs meet the teacher's, so that no pruner may narrow them."""
        return ()


class FeatureTerm(KnowledgeTerm):
    """A term over pyramid maps, summed over the levels, each behind an adapter to the teacher's width.

    Args:
        student: see `KnowledgeTerm`.
        teacher: likewise.
        levels: likewise.
        kernel: of the adapter, a convolution: 1 or 3.
        settings: the loss's own, handed on as they are.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        kernel: int = 1,
        **settings: float,
    ):
        super().__init__(student, teacher, levels)
        self.settings = settings
        self.adapters = nn.ModuleDict(
            {
                name: nn.Conv2d(student.feature_channels[i], teacher.feature_channels[j], kernel, padding=kernel // 2)
                for name, (i, j) in zip(self.level_names, self.pairs)
            }
        )

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        adapted = self.traced(student.features)
        return sum(
            self.level_loss(
                name, x, *(resize_like(y[j], x) for y in (teacher.features, teacher.class_logits)), targets, image_size
            )
            for name, x, (_, j) in zip(self.level_names, adapted, self.pairs)
        )

    @abstractmethod
    def level_loss(
        self,
        name: str,
        student: Tensor,
        teacher: Tensor,
        teacher_logits: Tensor,
        targets: Targets,
        image_size: tuple[int, int],
    ) -> Tensor:
        """The loss of one level, of two maps (B, C, H, W) of the same shape; other arguments as in `forward`."""

    def at_each_level(self, build: Callable[..., nn.Module], teacher: Detector) -> nn.ModuleDict:
        """A module of its own for each level, of the teacher's width and the term's settings."""
        widths = (teacher.feature_channels[j] for _, j in self.pairs)
        return nn.ModuleDict({name: build(c, **self.settings) for name, c in zip(self.level_names, widths)})

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        return [adapter(features[i]) for adapter, (i, _) in zip(self.adapters.values(), self.pairs)]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.adapters.values())


def require_dense_heads(name: str, student: Detector, teacher: Detector) -> None:
    """Refuses a pair that does not predict classes and boxes at every location.

    Args:
        name: the loss, as a config calls it.
        student: any detector.
        teacher: likewise.

    Raises:
        ValueError: one of them has no dense head with as many predictions at every location.
    """
    for detector, role in ((student, "student"), (teacher, "teacher")):
        if not detector.anchors:
            raise ValueError(
                f"name: {name} needs two dense heads, with as many predictions at every location; the {role}, "
                f"{detector.title}, has none; pseudo_label fits any pair, roi_kd two ROI heads"
            )


def resize_like(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's map (B, C, H, W) at the student's height and width; bilinear where they differ."""
    if teacher.shape[2:] == student.shape[2:]:
        return teacher
    return F.interpolate(at_least_float32(teacher), student.shape[2:], mode="bilinear", align_corners=False)
