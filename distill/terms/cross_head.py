"""CrossKD: what the student's head has made so far goes on through the teacher's head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.terms.base import KnowledgeTerm, Targets
from distill.terms.soft_label import boxes_around_locations, prediction_scores, split_anchors
from losses import align_statistics, box_mimic, dense_sigmoid, localization_distillation
from students import DenseOutput, Detector
from students.dense_head import DenseHead
from students.locations import flatten_levels


class CrossKDTerm(KnowledgeTerm):
    """Cross-head distillation for two dense heads of one kind (Wang 2024, arXiv 2306.11369).

    The student's maps after some of its head's convolutions are brought to the teacher's statistics and go on through
    the rest of the teacher's frozen head. What comes out is compared with the teacher's own scores and boxes; so the
    student's own predictions are left to the ground truth, and the two do not pull against each other.

    Deviation: heads of unlike width meet through a 1x1 convolution a tower, shared by all levels like the towers; it
    starts as the identity where the widths agree.

    Args:
        student: a detector with a `DenseHead`.
        teacher: likewise, whose head is of the same kind and at least as deep as `depth`.
        levels: see `KnowledgeTerm`.
        depth: convolutions of the student's head before the crossing, and of the teacher's that are left out; one less
            than the shallower head has, and at least 1, if None. The authors take 3 of 4, for FCOS 2.
        class_weight: of the scores; the authors take 1, for FCOS 0.4.
        box_weight: of the boxes; what the authors take if None, 1, or 4 for distributions.

    Raises:
        ValueError: no dense heads of one kind, or a depth that one of them does not have.
    """

    fields = ("features", "class_logits", "box_distances", "box_logits")
    uses_classes = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        depth: int | None = None,
        class_weight: float = 1.0,
        box_weight: float | None = None,
    ):
        super().__init__(student, teacher, levels)
        self.bind(student, teacher)
        ours, theirs = self._heads
        shallower = min(ours.depth, theirs.depth)
        self.depth = depth or max(1, shallower - 1)
        if self.depth > shallower:
            raise ValueError(
                f"depth: {depth} is too deep; the student's head has {ours.depth} convolutions a tower, the teacher's "
                f"{theirs.depth}"
            )
        self.class_weight = class_weight
        self.box_weight = box_weight if box_weight is not None else 4.0 if theirs.box_bins else 1.0
        widths = _width(ours, self.depth), _width(theirs, self.depth)
        self.adapters = nn.ModuleDict({name: _adapter(*widths) for name in ("class_tower", "box_tower")})

    def bind(self, student: Detector, teacher: Detector) -> None:
        # in a list, so that the two are no part of this module: they are trained, moved and saved elsewhere
        self._heads = _like_heads(student, teacher)

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        ours, theirs = self._heads
        crossed = []
        for i, j in self.pairs:
            with torch.no_grad():
                wanted = theirs.begin(teacher.features[j], j, self.depth)
            aligned = map(align_statistics, self._adapt(ours, student.features[i], i), wanted)
            crossed.append(theirs.finish(*aligned, j, self.depth))
        # class logits, box distances and, where there are any, box logits; each with an entry a level
        found = list(zip(*crossed))
        wanted = [[levels[j] for _, j in self.pairs] for levels in teacher[1 : 1 + len(found)]]

        anchors = theirs.anchors
        split = [[split_anchors(level, anchors) for level in levels] for levels in (found[0], wanted[0])]
        scores = prediction_scores(wanted[0], anchors)
        if theirs.box_bins:
            bins = [flatten_levels(x[2], anchors).unflatten(-1, (4, theirs.box_bins)) for x in (found, wanted)]
            boxes = theirs.box_bins * localization_distillation(*bins, scores, temperature=1.0)
        else:
            boxes = box_mimic(*(boxes_around_locations(x[1], anchors) for x in (found, wanted)), scores)
        return self.class_weight * dense_sigmoid(*split) + self.box_weight * boxes

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        return [x for i, _ in self.pairs for x in self._adapt(self._heads[0], features[i], i)]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.adapters.values())

    def _adapt(self, head: DenseHead, feature: Tensor, level: int) -> list[Tensor]:
        """The maps of both towers in the teacher's width."""
        return [adapter(x) for adapter, x in zip(self.adapters.values(), head.begin(feature, level, self.depth))]


def _like_heads(student: Detector, teacher: Detector) -> list[DenseHead]:
    heads = [getattr(detector, "head", None) for detector in (student, teacher)]
    ours, theirs = (type(head) for head in heads)
    if ours is not theirs or not issubclass(ours, DenseHead):
        has, have = (kind.__name__ if issubclass(kind, DenseHead) else "none" for kind in (ours, theirs))
        raise ValueError(
            f"name: cross_kd sends features from one head of students.dense_head through another of its kind; the "
            f"student has {has}, the teacher {have}; choose dense_sigmoid and box_mimic where both predict at the "
            "same places, or pseudo_label, which fits any pair"
        )
    return heads


def _width(head: DenseHead, depth: int) -> int:
    """Channels of a tower after `depth` convolutions."""
    return head.class_tower[depth - 1].conv.out_channels


def _adapter(student_channels: int, teacher_channels: int) -> nn.Conv2d:
    adapter = nn.Conv2d(student_channels, teacher_channels, 1)
    if student_channels == teacher_channels:
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    return adapter
