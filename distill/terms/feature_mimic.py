"""Knowledge in the pyramid's features: maps behind an adapter each, pulled towards the teacher's."""

from torch import Tensor

from distill.terms.base import FeatureTerm, Targets
from distill.terms.soft_label import best_scores
from losses import FGD, MGD, cwd, foreground_mask, masked_mimic, pkd, plain_mimic, score_weighted_mimic
from students import Detector


class PlainMimicTerm(FeatureTerm):
    """See `losses.plain_mimic`."""

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return plain_mimic(student, teacher)


class PKDTerm(FeatureTerm):
    """See `losses.pkd`."""

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return pkd(student, teacher)


class ScoreWeightedMimicTerm(FeatureTerm):
    """See `losses.score_weighted_mimic`; the weights are the teacher's highest class scores."""

    uses_classes = True

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return score_weighted_mimic(student, teacher, best_scores(teacher_logits))


class MaskedMimicTerm(FeatureTerm):
    """See `losses.masked_mimic`; the mask is where the ground truth has boxes."""

    uses_boxes = True

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        mask = foreground_mask(boxes_of(targets, student), image_size, tuple(student.shape[2:]))
        return masked_mimic(student, teacher, mask)


class CWDTerm(FeatureTerm):
    """See `losses.cwd`."""

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return cwd(student, teacher, **self.settings)


class MGDTerm(FeatureTerm):
    """See `losses.MGD`; each level has a generation block of its own."""

    def __init__(self, student: Detector, teacher: Detector, *arguments, **settings):
        super().__init__(student, teacher, *arguments, **settings)
        self.levels = self.at_each_level(MGD, teacher)

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return self.levels[name](student, teacher)


class FGDTerm(FeatureTerm):
    """See `losses.FGD`; each level has relation blocks of its own."""

    uses_boxes = True

    def __init__(self, student: Detector, teacher: Detector, *arguments, **settings):
        super().__init__(student, teacher, *arguments, **settings)
        self.levels = self.at_each_level(FGD, teacher)

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return self.levels[name](student, teacher, boxes_of(targets, student), image_size)


def boxes_of(targets: Targets, features: Tensor) -> list[Tensor]:
    """The ground truth's boxes, (N_i, 4) an image, where the features are."""
    return [target["boxes"].to(features.device) for target in targets]
