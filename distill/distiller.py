"""The unit of training: a student, the adapters that its teachers need, and the sum of all their losses."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.combiner import Combiner
from distill.data import ImageMeta
from distill.terms import KnowledgeTerm, decoded
from students import DenseOutput, Detector, of_images
from teachers import PRECISIONS, FeatureOutput, Teacher, label_images, wait_for

Targets = Sequence[dict[str, Tensor] | None]  # as in `Batch.targets`: those of unlabelled images are None and come last


class Lesson(NamedTuple):
    """What a teacher has to say about a batch.

    Attributes:
        output: its raw output for the images.
        targets: the ground truth, one dict an image. Images without it have what the teacher detects, if one of its
            losses goes by boxes, else nothing.
        unknown: labels that it does not know.
        stream: of a GPU that its output is still being made on, see `teachers.wait_for`; None where it is there.
    """

    output: DenseOutput | FeatureOutput
    targets: Sequence[dict[str, Tensor]]
    unknown: tuple[int, ...] = ()
    stream: torch.cuda.Stream | None = None


class Distiller(nn.Module):
    """Student and knowledge terms as one module, so that they are wrapped, optimised, cut and saved together.

    The teachers stay outside: they are asked beforehand and only their tensors come in.

    Args:
        student: the detector that learns.
        terms: knowledge terms by the name they are logged under; none trains the student plainly.
        combiner: what they count; each 1 where left out.
        skip_bad: leave a term out of a step where it is no number, which a GPU has to wait for.
        taught_by: the teacher of each term; where left out, all have one that is called `teacher`.
        score_threshold: how sure a teacher must be of a detection that stands in for ground truth.

    Attributes:
        skipped: how often each term was left out so.
        half: precision that student and losses run in where that is not float32, nor Accelerate's business.
        memory_format: that images come in.
    """

    def __init__(
        self,
        student: Detector,
        terms: dict[str, KnowledgeTerm] | None = None,
        combiner: Combiner | None = None,
        skip_bad: bool = False,
        taught_by: Mapping[str, str] | None = None,
        score_threshold: float = 0.3,
    ):
        super().__init__()
        self.student = student
        self.terms = nn.ModuleDict(terms or {})
        self.combiner = combiner or Combiner(dict.fromkeys(self.terms, 1.0))
        self.skip_bad = skip_bad
        self.taught_by = dict(taught_by) if taught_by else dict.fromkeys(self.terms, "teacher")
        self.score_threshold = score_threshold
        self.skipped: Counter[str] = Counter()
        self.half: torch.dtype | None = None
        self.memory_format = torch.channels_last

    @torch.no_grad()
    def ask(
        self,
        teachers: Mapping[str, Teacher],
        images: Tensor,
        targets: Targets,
        metas: Sequence[ImageMeta] | None = None,
    ) -> dict[str, Lesson]:
        """The lessons of a batch, by teacher; one whose terms all count nothing at present is left in peace, and one
        that is asked for its pyramid only does not run its head.

        Args:
            teachers: by name.
            images: (B, 3, H, W) in [0, 1].
            targets: one an image.
            metas: likewise; with them a teacher that has a cache goes by it.
        """
        counting = {name: term for name, term in self.terms.items() if self.combiner.weight(name)}
        lessons = {}
        labelled = count_labelled(targets)
        for name in dict.fromkeys(self.taught_by[term] for term in counting):
            teacher = teachers[name]
            terms = [term for key, term in counting.items() if self.taught_by[key] == name]
            labels = labelled < len(targets) and any(term.uses_boxes for term in terms)
            output = teacher.begin(images, labels or any(term.uses_head for term in terms), metas)
            complete = targets
            if labelled < len(targets):
                rest = [nothing(images)] * (len(targets) - labelled)
                if labels:
                    wait_for(teacher.stream, output)
                    unlabelled = of_images(output, slice(labelled, None))
                    rest = label_images(teacher.detector, unlabelled, tuple(images.shape[-2:]), self.score_threshold)
                complete = [*targets[:labelled], *rest]
            lessons[name] = Lesson(output, complete, teacher.detector.unknown, teacher.stream)
        return lessons

    def forward(
        self, images: Tensor, targets: Targets, lessons: Mapping[str, Lesson] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts: `task` and each term weighted as it enters the sum, detached.

        Args:
            images: (B, 3, H, W) in [0, 1].
            targets: one an image, see `Detector.loss`.
            lessons: what `ask` gave for them; not needed where there are no terms.
        """
        images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(images.device.type, self.half) if self.half else nullcontext():
            return self.combiner(*self.losses(images, targets, lessons))

    def losses(
        self, images: Tensor, targets: Targets, lessons: Mapping[str, Lesson] | None = None
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """The task's loss, each term's, unweighted, and the pyramid they come from; arguments as in `forward`."""
        output, image_size = self.student(images), tuple(images.shape[-2:])
        task = self.task_loss(output, targets)
        for lesson in (lessons or {}).values():
            wait_for(lesson.stream, lesson.output)
        terms = {}
        for name, term in self.terms.items():
            value, weight = None, self.combiner.weight(name)
            if weight:
                lesson = lessons[self.taught_by[name]]
                judged = self.student.hide_classes(output, lesson.unknown)
                value = term(judged, lesson.output, lesson.targets, image_size)
            if value is not None and self.skip_bad and not (weight * value).isfinite():
                self.skipped[name] += 1
                value = None
            # what counts nothing keeps its adapters in the graph, so that ranks stay in step
            terms[name] = sum_of_nothing(term, task) if value is None else value
        return task, terms, output.features

    def task_loss(self, output: DenseOutput, targets: Targets) -> Tensor:
        """The student's own loss on the labelled images of a batch; 0 where there are none."""
        labelled = count_labelled(targets)
        if labelled == len(targets):
            return sum(self.student.loss(output, targets).values())
        if labelled:
            return sum(self.student.loss(of_images(output, slice(labelled)), targets[:labelled]).values())
        # computed all the same: other ranks may have labelled images, and wait for this one's share of the normalisers
        empty = [nothing(output.features[0])]
        return sum(self.student.loss(of_images(output, slice(1)), empty).values()) * 0.0

    def reads(self, name: str, teacher: Detector, unlabelled: bool) -> set[tuple[str, int]]:
        """(field, level) of all that is gone by of a teacher's output.

        Args:
            name: the teacher's.
            teacher: the detector.
            unlabelled: whether there are images that its detections may have to stand in for.
        """
        terms = [term for key, term in self.terms.items() if self.taught_by[key] == name]
        found = {part for term in terms for part in term.reads(teacher)}
        return found | (decoded(teacher) if unlabelled and any(term.uses_boxes for term in terms) else set())

    def bind(self, teachers: Mapping[str, Detector]) -> None:
        """Tells the terms who teaches, once the teachers are trained and on their device."""
        for name, term in self.terms.items():
            term.bind(self.student, teachers[self.taught_by[name]])

    def run_as(self, precision: str, memory_format: torch.memory_format) -> None:
        """Says what `forward` runs in; weights are moved by whoever moves the module.

        Args:
            precision: a key of `teachers.PRECISIONS`; float32 leaves the caller's own autocast as it is.
            memory_format: of images.
        """
        self.half = None if precision == "float32" else PRECISIONS[precision]
        self.memory_format = memory_format

    def silence(self, teachers: Collection[str]) -> None:
        """Lets the terms of some teachers, by name, count nothing; all others count."""
        self.combiner.silent = frozenset(name for name, teacher in self.taught_by.items() if teacher in teachers)

    def traced_outputs(self, images: Tensor) -> list[Tensor]:
        """All tensors that leave the student or an adapter: what a dependency graph has to see."""
        output = self.student(images)
        adapted = [x for term in self.terms.values() for x in term.traced(output.features)]
        # two boxes a level show where they go as well as many
        return self.student.traced(output, num_boxes=2 * len(output.features)) + adapted

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """Layers whose outputs keep their width, whatever is cut."""
        return (*self.student.output_layers, *(x for term in self.terms.values() for x in term.output_layers))


def count_labelled(targets: Targets) -> int:
    """How many images of a batch have ground truth; they come first."""
    return next((position for position, target in enumerate(targets) if target is None), len(targets))


def nothing(like: Tensor) -> dict[str, Tensor]:
    """The target of an image without objects, on the device of a tensor."""
    device = like.device
    return {"boxes": torch.zeros(0, 4, device=device), "labels": torch.zeros(0, dtype=torch.long, device=device)}


def sum_of_nothing(module: nn.Module, like: Tensor) -> Tensor:
    """A zero whose gradient is zero for every parameter of the module."""
    return sum((parameter.sum() for parameter in module.parameters()), like.new_zeros(())) * 0.0
