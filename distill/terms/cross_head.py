"""CrossKD: what the student's head has made so far goes on through the teacher's head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.terms.base import KnowledgeTerm, Targets
from distill.terms.soft_label import best_scores, boxes_around_locations
from losses import align_statistics, box_mimic, dense_sigmoid
from students import DenseOutput, Detector
from students.dense_head import DenseHead


class CrossKDTerm(KnowledgeTerm):
    """Cross-head distillation for two dense heads (Wang 2024, arXiv 2306.11369).

    The student's maps after some of its head's convolutions are brought to the teacher's statistics and go on through
    the rest of the teacher's frozen head. What comes out is compared with the teacher's own scores and boxes; so the
    student's own predictions are left to the ground truth, and the two do not pull against each other.

    Deviations: heads of unlike width meet through a 1x1 convolution a tower, shared by all levels like the towers; it
    starts as the identity where the widths agree. A head that ends in distances has the GIoU form for boxes.

    Args:
        student: a detector with a `DenseHead`.
        teacher: likewise, whose head is at least as deep as `depth`.
        levels: see `KnowledgeTerm`.
        depth: convolutions of the student's head before the crossing, and of the teacher's that are left out; one less
            than the shallower head has, and at least 1, if None. The authors take 3 of 4, for FCOS 2.
        class_weight: of the scores; the authors take 1, for FCOS 0.4.
        box_weight: of the boxes; the authors take 1.

    Raises:
        ValueError: another kind of head, or a depth that one of them does not have.
    """

    uses_classes = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        depth: int | None = None,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
    ):
        super().__init__(student, teacher, levels)
        ours, theirs = _head(student, "student"), _head(teacher, "teacher")
        shallower = min(ours.depth, theirs.depth)
        self.depth = depth or max(1, shallower - 1)
        if self.depth > shallower:
            raise ValueError(
                f"depth: {depth} is too deep; the student's head has {ours.depth} convolutions a tower, the teacher's "
                f"{theirs.depth}"
            )
        self.class_weight, self.box_weight = class_weight, box_weight
        widths = _width(ours, self.depth), _width(theirs, self.depth)
        self.adapters = nn.ModuleDict({name: _adapter(*widths) for name in ("class_tower", "box_tower")})
        self.bind(student, teacher)

    def bind(self, student: Detector, teacher: Detector) -> None:
        # in a list, so that the two are no part of this module: they are trained, moved and saved elsewhere
        self._heads = [_head(student, "student"), _head(teacher, "teacher")]

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        ours, theirs = self._heads
        logits, distances = [], []
        for i, j in self.pairs:
            with torch.no_grad():
                wanted = theirs.begin(teacher.features[j], j, self.depth)
            crossed = map(align_statistics, self._adapt(ours, student.features[i], i), wanted)
            level_logits, level_distances = theirs.finish(*crossed, j, self.depth)
            logits.append(level_logits)
            distances.append(level_distances)
        teacher_logits = [teacher.class_logits[j] for _, j in self.pairs]
        scores = torch.cat([best_scores(level).flatten() for level in teacher_logits])
        boxes = torch.cat([boxes_around_locations(level) for level in distances])
        teacher_boxes = torch.cat([boxes_around_locations(teacher.box_distances[j]) for _, j in self.pairs])
        classes = dense_sigmoid(logits, teacher_logits)
        return self.class_weight * classes + self.box_weight * box_mimic(boxes, teacher_boxes, scores)

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        return [x for i, _ in self.pairs for x in self._adapt(self._heads[0], features[i], i)]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.adapters.values())

    def _adapt(self, head: DenseHead, feature: Tensor, level: int) -> list[Tensor]:
        """The maps of both towers in the teacher's width."""
        return [adapter(x) for adapter, x in zip(self.adapters.values(), head.begin(feature, level, self.depth))]


def _head(detector: Detector, role: str) -> DenseHead:
    head = getattr(detector, "head", None)
    if not isinstance(head, DenseHead):
        raise ValueError(
            f"name: cross_kd sends features from one dense head through another; the {role} has {type(head).__name__}"
        )
    return head


def _width(head: DenseHead, depth: int) -> int:
    """Channels of a tower after `depth` convolutions."""
    return head.class_tower[depth - 1].conv.out_channels


def _adapter(student_channels: int, teacher_channels: int) -> nn.Conv2d:
    adapter = nn.Conv2d(student_channels, teacher_channels, 1)
    if student_channels == teacher_channels:
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    return adapter
