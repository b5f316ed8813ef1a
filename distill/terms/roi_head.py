"""Knowledge in the second stage: what both ROI heads say of the student's proposals."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distill.terms.base import KnowledgeTerm, Targets
from losses import bounded_regression, class_deltas, dist, dkd, roi_classification, roi_regression
from students import Detector, RoiOutput, TwoStageDetector, TwoStageOutput


class RoiKDTerm(KnowledgeTerm):
    """Class scores and boxes of two ROI heads (Chen 2017, NIPS), each on its own detector's features.

    The boxes are the student's proposals, sampled against the ground truth as for its own loss (once more: it is
    another sample). The background is one of the classes. Only what is no background has a box to learn. Classes that
    the teacher does not know are left out on both sides, and proposals on their objects with them.

    Args:
        student: a two-stage detector.
        teacher: likewise.
        levels: must be None; a proposal belongs to no pair of levels.
        classes: `kl`, see `losses.roi_classification`; `dkd`, see `losses.dkd`, on the proposals' true classes; or
            `dist`, see `losses.dist`, whose rows are the proposals.
        boxes: `bounded`, see `losses.bounded_regression`, which asks for the true box where the teacher is closer to
            it; `smooth_l1`, see `losses.roi_regression`, which asks for the teacher's; or `none`.
        temperature: of the class scores.
        alpha: of `dkd`.
        beta: likewise.
        margin: of `bounded`.
        class_weight: of the class scores.
        box_weight: of the boxes; 0.5 is Chen's.

    Raises:
        ValueError: a detector without an ROI head, or `levels` are given.
    """

    uses_boxes = uses_classes = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        classes: Literal["kl", "dkd", "dist"] = "kl",
        boxes: Literal["bounded", "smooth_l1", "none"] = "bounded",
        temperature: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.25,
        margin: float = 0.0,
        class_weight: float = 1.0,
        box_weight: float = 0.5,
    ):
        super().__init__(student, student)  # whatever the two pyramids' levels
        if levels is not None:
            raise ValueError("levels: a proposal belongs to no pair of levels; leave it out")
        for detector, role in ((student, "student"), (teacher, "teacher")):
            if not isinstance(detector, TwoStageDetector):
                raise ValueError(
                    f"name: roi_kd needs two ROI heads; the {role}, {detector.title}, has none; pseudo_label fits any "
                    "pair, dense_sigmoid and box_mimic two dense heads"
                )
        self.classes, self.boxes = classes, boxes
        self.temperature, self.alpha, self.beta, self.margin = temperature, alpha, beta, margin
        self.class_weight, self.box_weight = class_weight, box_weight
        self.bind(student, teacher)

    def bind(self, student: Detector, teacher: Detector) -> None:
        # in a list, so that the two are no part of this module: they are trained, moved and saved elsewhere
        self._detectors = [student, teacher]

    def reads(self, teacher: Detector) -> set[tuple[str, int]]:
        return {("features", level) for level in range(len(teacher.strides))}

    def forward(
        self, student: TwoStageOutput, teacher: TwoStageOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        learner, expert = self._detectors
        proposals = learner.propose(student, [image_size] * len(targets))
        samples = learner.sample(proposals, targets)
        ours = learner.roi(student.features, samples.boxes)
        with torch.no_grad():
            theirs = expert.roi(teacher.features, samples.boxes)
        labels, wanted = samples.labels, samples.box_deltas
        if expert.unknown:
            known = _known(labels, expert.unknown)
            labels, wanted = labels[known], wanted[known]
            ours, theirs = (RoiOutput(said.class_logits[known], said.box_deltas[known]) for said in (ours, theirs))
        logits, numbers = (ours.class_logits, theirs.class_logits), labels
        if expert.unknown:
            columns = torch.arange(logits[0].shape[1], device=labels.device)
            columns = columns[_known(columns, expert.unknown)]
            logits, numbers = [one[:, columns] for one in logits], torch.searchsorted(columns, labels)
        if self.classes == "dkd":
            loss = dkd(*logits, numbers, self.alpha, self.beta, self.temperature)
        else:
            loss = {"kl": roi_classification, "dist": dist}[self.classes](*logits, self.temperature)
        loss = self.class_weight * loss
        if self.boxes == "none":
            return loss
        foreground = labels < len(learner.class_names)
        deltas, shown = (class_deltas(output.box_deltas, labels) for output in (ours, theirs))
        if self.boxes == "bounded":
            box_loss = bounded_regression(deltas, shown, wanted, foreground, self.margin)
        else:
            box_loss = roi_regression(deltas, shown, foreground)
        return loss + self.box_weight * box_loss


def _known(labels: Tensor, unknown: tuple[int, ...]) -> Tensor:
    return ~torch.isin(labels, torch.tensor(unknown, device=labels.device))
