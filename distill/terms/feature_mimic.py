"""Knowledge in the pyramid's features: maps behind an adapter each, pulled towards the teacher's."""

from collections.abc import Sequence

from torch import Tensor, nn

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

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return score_weighted_mimic(student, teacher, best_scores(teacher_logits))


class MaskedMimicTerm(FeatureTerm):
    """See `losses.masked_mimic`; the mask is where the ground truth has boxes."""

    needs_targets = True

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        mask = foreground_mask(boxes_of(targets, student), image_size, tuple(student.shape[2:]))
        return masked_mimic(student, teacher, mask)


class CWDTerm(FeatureTerm):
    """See `losses.cwd`."""

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        kernel: int = 1,
        temperature: float = 1.0,
    ):
        super().__init__(student, teacher, levels, kernel)
        self.temperature = temperature

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return cwd(student, teacher, self.temperature)


class MGDTerm(FeatureTerm):
    """See `losses.MGD`; each level has a generation block of its own."""

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        kernel: int = 1,
        mask_ratio: float = 0.65,
    ):
        super().__init__(student, teacher, levels, kernel)
        widths = [teacher.feature_channels[j] for _, j in self.pairs]
        self.levels = nn.ModuleDict({name: MGD(c, mask_ratio) for name, c in zip(self.level_names, widths)})

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return self.levels[name](student, teacher)


class FGDTerm(FeatureTerm):
    """See `losses.FGD`; each level has relation blocks of its own."""

    needs_targets = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        kernel: int = 1,
        **weights: float,
    ):
        super().__init__(student, teacher, levels, kernel)
        widths = [teacher.feature_channels[j] for _, j in self.pairs]
        self.levels = nn.ModuleDict({name: FGD(c, **weights) for name, c in zip(self.level_names, widths)})

    def level_loss(self, name, student, teacher, teacher_logits, targets, image_size) -> Tensor:
        return self.levels[name](student, teacher, boxes_of(targets, student), image_size)


def boxes_of(targets: Targets, features: Tensor) -> list[Tensor]:
    """The ground truth's boxes, (N_i, 4) an image, where the features are."""
    return [target["boxes"].to(features.device) for target in targets]
