"""Knowledge in the pyramid's features: maps behind an adapter each, pulled towards the teacher's."""

from torch import Tensor

from distill.terms.base import FeatureTerm, Level
from distill.terms.soft_label import best_scores
from losses import FGD, MGD, cwd, foreground_mask, masked_mimic, pkd, plain_mimic, score_weighted_mimic
from losses.focal_global import GlobalContext
from students import Detector


class PlainMimicTerm(FeatureTerm):
    """See `losses.plain_mimic`."""

    def level_loss(self, level: Level) -> Tensor:
        return plain_mimic(level.student, level.teacher)


class PKDTerm(FeatureTerm):
    """See `losses.pkd`."""

    def level_loss(self, level: Level) -> Tensor:
        return pkd(level.student, level.teacher)


class ScoreWeightedMimicTerm(FeatureTerm):
    """See `losses.score_weighted_mimic`; the weights are the teacher's highest class scores.

    Raises:
        ValueError: a teacher that has no such scores.
    """

    fields = ("features", "class_logits")
    uses_head = uses_classes = True

    def __init__(self, student: Detector, teacher: Detector, *arguments, **settings):
        if not teacher.scores_locations:
            raise ValueError(
                f"name: score_weighted_mimic goes by class scores at every location, and the teacher, {teacher.title}, "
                "tells detections only; choose masked_mimic, which goes by the ground truth's boxes"
            )
        super().__init__(student, teacher, *arguments, **settings)

    def level_loss(self, level: Level) -> Tensor:
        return score_weighted_mimic(level.student, level.teacher, best_scores(level.teacher_logits))


class MaskedMimicTerm(FeatureTerm):
    """See `losses.masked_mimic`; the mask is where the ground truth has boxes."""

    uses_boxes = True

    def level_loss(self, level: Level) -> Tensor:
        mask = foreground_mask(level.boxes, level.image_size, tuple(level.student.shape[2:]))
        return masked_mimic(level.student, level.teacher, mask)


class CWDTerm(FeatureTerm):
    """See `losses.cwd`."""

    def level_loss(self, level: Level) -> Tensor:
        return cwd(level.student, level.teacher, **self.settings)


class MGDTerm(FeatureTerm):
    """See `losses.MGD`; each level has a generation block of its own."""

    def __init__(self, student: Detector, teacher: Detector, *arguments, **settings):
        super().__init__(student, teacher, *arguments, **settings)
        self.levels = self.at_each_level(MGD, teacher)

    def level_loss(self, level: Level) -> Tensor:
        return self.levels[level.name](level.student, level.teacher)

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        # what comes out meets the teacher's map channel by channel, as what goes in would
        return [x + level.generation(x) for x, level in zip(self.adapt(features), self.levels.values())]


class FGDTerm(FeatureTerm):
    """See `losses.FGD`; each level has relation blocks of its own."""

    uses_boxes = True

    def __init__(self, student: Detector, teacher: Detector, *arguments, **settings):
        super().__init__(student, teacher, *arguments, **settings)
        self.levels = self.at_each_level(FGD, teacher)

    def level_loss(self, level: Level) -> Tensor:
        return self.levels[level.name](level.student, level.teacher, level.boxes, level.image_size)

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        pairs = zip(self.adapt(features), self.levels.values())
        return [y for x, level in pairs for block in level.relation.children() for y in _outputs(block, x)]


def _outputs(block: GlobalContext, features: Tensor) -> list[Tensor]:
    """All that the channels run through. The matrix product that pools by attention mixes locations, not channels; a
    tracer cannot know, so the block is shown without it."""
    context = features.mean(dim=(2, 3), keepdim=True)
    return [block.attention(features), features + block.transform(context)]
