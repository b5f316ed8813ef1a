"""The teacher's detections as ground truth: the one term that asks nothing of how the two detectors are built."""

from collections.abc import Sequence

from torch import Tensor

from distill.terms.base import KnowledgeTerm, Targets, decoded
from students import DenseOutput, Detector
from teachers import label_images


class PseudoLabelTerm(KnowledgeTerm):
    """The student's own loss on what the teacher detects, each object as probable as the teacher is sure of it.

    The student's own assigner says which location answers for which detection, so heads, strides and levels of the two
    need have nothing in common. Soft in every family here: at what is assigned to a detection of score s, the class
    score, or objectness where it is apart from classes, should be s times what a true object would ask for; in a
    softmax the background gets the rest. Boxes count s times too, but for the dense family's, of which each counts in
    full. What goes over are detections: of each box its top class and that one's score, not the distribution over all
    classes, after the teacher's NMS and from `score_threshold` on.

    Args:
        student: any detector.
        teacher: likewise.
        levels: must be None; detections belong to no level.
        score_threshold: lower detections are left out.

    Raises:
        ValueError: `levels` are given; or the teacher does not know all classes, and the student cannot leave them out.
    """

    uses_classes = True

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        score_threshold: float = 0.3,
    ):
        super().__init__(student, student)  # it pairs with whatever there is
        self.pairing = ""
        if levels is not None:
            raise ValueError("levels: detections belong to no level; leave it out")
        if teacher.unknown and not student.separate_classes:
            names = ", ".join(teacher.class_names[label] for label in teacher.unknown)
            raise ValueError(
                f"name: pseudo_label would teach {student.title}, which tells objects from background before it tells "
                f"classes, that {names} are background, as the teacher does not know them; learn from its maps, such "
                "as by fgd, or from a teacher that knows them"
            )
        self.score_threshold = score_threshold
        self.bind(student, teacher)

    def bind(self, student: Detector, teacher: Detector) -> None:
        # in a list, so that the two are no part of this module: they are trained, moved and saved elsewhere
        self._detectors = [student, teacher]

    @property
    def silent_because(self) -> str:
        return f" (its teacher may be sure of nothing here: lower score_threshold, {self.score_threshold:g}, then)"

    def reads(self, teacher: Detector) -> set[tuple[str, int]]:
        return decoded(teacher)

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        learner, expert = self._detectors
        return sum(learner.loss(student, label_images(expert, teacher, image_size, self.score_threshold)).values())
