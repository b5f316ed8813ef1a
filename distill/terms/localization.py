"""LD: where the teacher thinks that each edge of a box lies, and how sure it is of that."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.terms.base import KnowledgeTerm, Targets
from distill.terms.soft_label import prediction_scores
from losses import localization_distillation, valuable_region
from students import DenseOutput, Detector
from students.assignment import assign_atss, pad_targets
from students.locations import flatten_levels, grid_locations, map_shapes, square_anchors


class LDTerm(KnowledgeTerm):
    """Localization distillation on two regions (Zheng 2022, arXiv 2102.12252); see `losses.localization_distillation`.

    The main region are ATSS's positives, each counting as much as the student's highest class score there; the
    valuable localization region is what lies close around them, see `losses.valuable_region`. A deviation: each is a
    weighted mean, where the authors' code has sums, a quarter as large for the second.

    Args:
        student: a detector with distributions over distances, one prediction a location.
        teacher: likewise, with as many bins.
        levels: see `KnowledgeTerm`.
        temperature: softens both distributions.
        region_weight: of the valuable region against the main one.

    Raises:
        ValueError: no distributions, or unlike numbers of bins.
    """

    fields = ("box_logits",)
    uses_boxes = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        temperature: float = 10.0,
        region_weight: float = 1.0,
    ):
        bins, anchors = (student.box_bins, teacher.box_bins), (student.anchors, teacher.anchors)
        if anchors != (1, 1) or bins[0] != bins[1] or not bins[0]:
            fits = "box_mimic" if anchors[0] == anchors[1] > 0 else "pseudo_label"
            raise ValueError(
                "name: ld needs dense heads with equally long distributions over the place of each edge, such as two "
                f"gfl heads; the student's have {bins[0]} bins, the teacher's {bins[1]}; choose {fits}"
            )
        super().__init__(student, teacher, levels)
        self.strides = student.strides
        self.temperature, self.region_weight = temperature, region_weight

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        bins = [flatten_levels([student.box_logits[i] for i, _ in self.pairs])]
        bins += [flatten_levels([teacher.box_logits[j] for _, j in self.pairs])]
        bins = [logits.unflatten(-1, (4, -1)) for logits in bins]
        positive, region = self._regions(student, targets)
        scores = prediction_scores([student.class_logits[i] for i, _ in self.pairs], anchors=1)
        main = localization_distillation(*bins, scores * positive, self.temperature)
        return main + self.region_weight * localization_distillation(*bins, region * ~positive, self.temperature)

    def _regions(self, student: DenseOutput, targets: Targets) -> tuple[Tensor, Tensor]:
        """(B, N) the positives, bool, and the weights of the valuable region, on the levels that take part."""
        shapes, device = map_shapes(student.class_logits), student.class_logits[0].device
        sizes = [height * width for height, width in shapes]
        locations, strides = grid_locations(shapes, self.strides, device)
        anchors, objects = square_anchors(locations, strides), pad_targets(targets, device)
        _, positive = assign_atss(anchors, strides, sizes, objects.boxes, objects.mask)
        region = valuable_region(anchors.split(sizes), objects.boxes)
        # all levels have their say in what is near an object, also where not all take part
        picked = [[x.split(sizes, dim=1)[i] for i, _ in self.pairs] for x in (positive, region)]
        return tuple(torch.cat(levels, dim=1) for levels in picked)
