"""What every knowledge term is: two detectors' tensors brought together, level by level, and handed to one loss."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from distill.terms.adapter import ChannelSelection, build_adapter
from losses import fuse_levels
from losses.precision import at_least_float32
from students import DenseOutput, Detector

Targets = Sequence[dict[str, Tensor]]


def level_name(stride: float) -> str:
    """P3 for a stride of 8; one that is no power of two is called by itself."""
    exponent = math.log2(stride)
    return f"P{exponent:.0f}" if exponent.is_integer() else f"stride {stride:.3g}"


def match_levels(
    student_strides: Sequence[float],
    teacher_strides: Sequence[float],
    levels: Sequence[str] | None = None,
    interpolate: bool = False,
) -> list[tuple[int, int]]:
    """Pairs (student level, teacher level) by stride, fine to coarse.

    Args:
        student_strides: pixels of the student's image, fine to coarse.
        teacher_strides: likewise, of the same pixels.
        levels: names of the student's levels to pair, such as P3; all that find a partner if None.
        interpolate: a level without a partner of equal stride takes the nearest within a factor of 2, of two equally
            near ones the finer; otherwise it has none.

    Raises:
        ValueError: no level finds a partner, or one of `levels` does not.
    """
    pairs = []
    for i, stride in enumerate(student_strides):
        nearest = min(teacher_strides, key=lambda other: (abs(math.log2(other / stride)), other))
        # of two levels as coarse as each other the later one, which has seen more, stands for both
        if stride in student_strides[i + 1 :]:
            continue
        if nearest == stride or (interpolate and max(nearest / stride, stride / nearest) <= 2):
            pairs.append((i, teacher_strides.index(nearest)))
    if not pairs:
        raise ValueError(
            f"{'name: this loss compares maps, and ' if levels is None else 'levels: '}the student's levels (strides "
            f"{list(student_strides)}) and the teacher's "
            f"({list(teacher_strides)}) have none in common{' and none within a factor of 2' if interpolate else ''}; "
            "change student.levels, or the size that the teacher sees images at (its image_size)"
        )
    if levels is None:
        return pairs
    found = {level_name(student_strides[i]): (i, j) for i, j in pairs}
    for level in levels:
        if level not in found:
            rule = "a stride within a factor of 2" if interpolate else "an equal stride, location by location"
            raise ValueError(f"levels: {level} finds no partner; this loss needs {rule}, as have {', '.join(found)}")
    return [pair for name, pair in found.items() if name in levels]


def describe_pairs(
    pairs: Sequence[tuple[int, int]],
    student_strides: Sequence[float],
    teacher_strides: Sequence[float],
    everything: bool = True,
) -> str:
    """Such as 'P3-P5 by stride; P6 from the teacher's P5, interpolated; P7 without a partner'.

    Args:
        pairs: (student level, teacher level).
        student_strides: pixels.
        teacher_strides: likewise, of the same pixels.
        everything: whether all levels were to be paired, so that those which are not are told.
    """
    equal = [i for i, j in pairs if student_strides[i] == teacher_strides[j]]
    names = [level_name(student_strides[i]) for i in equal]
    if len(equal) > 2 and equal == list(range(equal[0], equal[-1] + 1)):
        names = [f"{names[0]}-{names[-1]}"]
    parts = [f"{', '.join(names)} by stride"] if names else []
    parts += [
        f"{level_name(student_strides[i])} from the teacher's {level_name(teacher_strides[j])}, interpolated"
        for i, j in pairs
        if i not in equal
    ]
    met = {student_strides[i] for i, _ in pairs}
    alone = [level_name(stride) for stride in student_strides if stride not in met]
    parts += [f"{', '.join(alone)} without a partner"] if everything and alone else []
    return "; ".join(parts)


class KnowledgeTerm(nn.Module, ABC):
    """One loss between a student and a teacher; what it counts is the combiner's business.

    Args:
        student: read for its strides and widths; not kept.
        teacher: likewise.
        levels: names of the student's levels that take part; all that find a partner if None, see `match_levels`.

    Attributes:
        interpolates: whether levels of unlike stride may meet; sound for maps, not for what is said of each location.
        fields: of the teacher's output, what it goes by.
        uses_head: whether it goes by more of the teacher than its pyramid.
        uses_classes: whether it goes by the teacher's class scores, which must be of classes that the student has.
        uses_boxes: whether it goes by the ground truth's boxes; where there are none, a teacher's detections stand in.
        score_threshold: of the teacher's detections that it learns from; None where it learns from none.
        pairs: (student level, teacher level).
        pairing: the same in words; empty where levels do not matter.
        level_names: the pairs' names, such as P3.
    """

    interpolates: ClassVar[bool] = False
    fields: ClassVar[tuple[str, ...]]
    uses_head: ClassVar[bool] = True
    uses_classes: ClassVar[bool] = False
    uses_boxes: ClassVar[bool] = False
    score_threshold: float | None = None

    def __init__(self, student: Detector, teacher: Detector, levels: Sequence[str] | None = None):
        super().__init__()
        self.pairs = match_levels(student.strides, teacher.strides, levels, self.interpolates)
        self.pairing = describe_pairs(self.pairs, student.strides, teacher.strides, everything=levels is None)
        self.level_names = [level_name(student.strides[i]) for i, _ in self.pairs]

    @property
    def silent_because(self) -> str:
        """What to look at where it has no gradient, in brackets; empty where nothing is known."""
        return ""

    def bind(self, student: Detector, teacher: Detector) -> None:
        """Is told who plays the two parts once both are ready; most terms need their outputs only."""

    def reads(self, teacher: Detector) -> set[tuple[str, int]]:
        """(field, level) of all that it goes by of the teacher's output."""
        return {(field, level) for field in self.fields for _, level in self.pairs}

    @abstractmethod
    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        """The unweighted loss, a float32 scalar.

        Args:
            student: what the student made of a batch.
            teacher: what the teacher made of the same images.
            targets: the batch's ground truth, see `Detector.loss`; of images without it, see `Lesson.targets`.
            image_size: height and width of the batch, pixels.
        """

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """What the term's own layers make of the student's pyramid, for tracing; nothing if it has none."""
        return []

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """Layers whose outputs meet the teacher's, so that no pruner may narrow them."""
        return ()


class Level(NamedTuple):
    """One pyramid level of both detectors, or the mean of all, brought together.

    Attributes:
        name: the student's, such as P3, or `fused`.
        student: (B, C, H, W) behind its adapter.
        teacher: the same shape.
        teacher_logits: (B, A*K, H, W) class scores of the teacher's head there, before the sigmoid; None for terms that
            do not use them.
        boxes: (N_i, 4) xyxy in pixels for each image, the ground truth.
        image_size: height and width of the batch, pixels.
    """

    name: str
    student: Tensor
    teacher: Tensor
    teacher_logits: Tensor | None
    boxes: list[Tensor]
    image_size: tuple[int, int]


class PyramidTerm(KnowledgeTerm):
    """A term over the maps of two pyramids and nothing else of them.

    Args:
        student: see `KnowledgeTerm`.
        teacher: likewise.
        levels: likewise.
        match: `levels` compares level with level; `fused` the mean of all of them with that of the teacher's, see
            `losses.fuse_levels`.

    Attributes:
        map_names: of what is compared: the levels', or `fused`.

    Raises:
        ValueError: no levels to pair, or some of unlike widths that would be fused.
    """

    interpolates = True
    fields = ("features",)
    uses_head = False

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        match: Literal["levels", "fused"] = "levels",
    ):
        super().__init__(student, teacher, levels)
        self.match = match
        self.map_names = ["fused"] if match == "fused" else self.level_names
        for side, (detector, role) in enumerate(((student, "student"), (teacher, "teacher"))):
            widths = [detector.feature_channels[pair[side]] for pair in self.pairs]
            if match == "fused" and len(set(widths)) > 1:
                raise ValueError(
                    f"match: fused takes the mean of levels of equal width, but the {role}'s, which meet at "
                    f"{', '.join(self.level_names)}, have {', '.join(map(str, widths))} channels; choose levels"
                )

    def student_maps(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """What is compared of the student's pyramid, a map for each of `map_names`."""
        maps = [features[i] for i, _ in self.pairs]
        return [fuse_levels(maps)] if self.match == "fused" else maps

    def teacher_maps(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """Likewise of the teacher's."""
        if self.match == "fused":
            once = dict.fromkeys(j for _, j in self.pairs)  # a level may be the nearest of two
            return [fuse_levels([features[j] for j in once])]
        return [features[j] for _, j in self.pairs]

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        # levels with a mean keep a common width
        return self.student_maps(features) if self.match == "fused" else []


class FeatureTerm(PyramidTerm):
    """A term over pyramid maps, each behind an adapter to the teacher's width, summed over them.

    Args:
        student: see `KnowledgeTerm`.
        teacher: likewise.
        levels: likewise.
        adapter: see `build_adapter`.
        match: see `PyramidTerm`; `levels` for a loss that goes by the class scores of each.
        settings: the loss's own, handed on as they are.

    Raises:
        ValueError: no levels to pair, or widths that the adapter cannot bring together or that differ under a mean.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        adapter: str = "conv1",
        match: Literal["levels", "fused"] = "levels",
        **settings: float,
    ):
        super().__init__(student, teacher, levels, match)
        self.settings = settings
        self._holds_widths = adapter != "select"
        self.adapters = nn.ModuleDict(
            {
                name: build_adapter(adapter, student.feature_channels[i], teacher.feature_channels[j], name)
                for name, (i, j) in zip(self.map_names, self.pairs)
            }
        )

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        adapted, theirs = self.adapt(student.features), self.teacher_maps(teacher.features)
        boxes = [target["boxes"].to(adapted[0].device) for target in targets]
        losses = []
        for (name, adapter), x, y, (_, j) in zip(self.adapters.items(), adapted, theirs, self.pairs):
            logits = resize_like(teacher.class_logits[j], x) if self.uses_classes else None
            if isinstance(adapter, ChannelSelection):
                y = adapter.select(y)
            losses.append(self.level_loss(Level(name, x, resize_like(y, x), logits, boxes, image_size)))
        return sum(losses)

    @abstractmethod
    def level_loss(self, level: Level) -> Tensor:
        """The loss of one level."""

    def adapt(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        """The student's maps behind their adapters."""
        return [adapter(x) for adapter, x in zip(self.adapters.values(), self.student_maps(features))]

    def at_each_level(self, build: Callable[..., nn.Module], teacher: Detector) -> nn.ModuleDict:
        """A module of its own for each two maps, of the teacher's width and the term's settings."""
        widths = (teacher.feature_channels[j] for _, j in self.pairs)
        return nn.ModuleDict({name: build(c, **self.settings) for name, c in zip(self.map_names, widths)})

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        return self.adapt(features)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.adapters.values()) if self._holds_widths else ()


def decoded(teacher: Detector) -> set[tuple[str, int]]:
    """(field, level) of all that a teacher's detections are made of."""
    return {(field, level) for field in teacher.decoded_fields for level in range(len(teacher.strides))}


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
