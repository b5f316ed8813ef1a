"""The unit of training: a student, the adapters that its teacher needs, and the sum of all their losses."""

from collections import Counter

from torch import Tensor, nn

from distill.combiner import Combiner
from distill.terms import KnowledgeTerm
from students import DenseOutput, Detector


class Distiller(nn.Module):
    """Student and knowledge terms as one module, so that they are wrapped, optimised, cut and saved together.

    The teacher stays outside: it is asked beforehand and only its tensors come in.

    Args:
        student: the detector that learns.
        terms: knowledge terms by the name they are logged under; none trains the student plainly.
        combiner: what they count; each 1 where left out.
        skip_bad: leave a term out of a step where it is no number, which a GPU has to wait for.

    Attributes:
        skipped: how often each term was left out so.
    """

    def __init__(
        self,
        student: Detector,
        terms: dict[str, KnowledgeTerm] | None = None,
        combiner: Combiner | None = None,
        skip_bad: bool = False,
    ):
        super().__init__()
        self.student = student
        self.terms = nn.ModuleDict(terms or {})
        self.combiner = combiner or Combiner(dict.fromkeys(self.terms, 1.0))
        self.skip_bad = skip_bad
        self.skipped: Counter[str] = Counter()

    def forward(
        self, images: Tensor, targets: list[dict[str, Tensor]], teacher_output: DenseOutput | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts: `task` and each term weighted as it enters the sum, detached.

        Args:
            images: (B, 3, H, W) in [0, 1].
            targets: see `Detector.loss`.
            teacher_output: the teacher's output for the same images; not needed where there are no terms.
        """
        return self.combiner(*self.losses(images, targets, teacher_output))

    def losses(
        self, images: Tensor, targets: list[dict[str, Tensor]], teacher_output: DenseOutput | None = None
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """The task's loss, each term's, unweighted, and the pyramid they come from; arguments as in `forward`."""
        output, image_size = self.student(images), tuple(images.shape[-2:])
        task = sum(self.student.loss(output, targets).values())
        terms = {}
        for name, term in self.terms.items():
            value = term(output, teacher_output, targets, image_size) if self.combiner.weight(name) else None
            if value is not None and self.skip_bad and not value.isfinite():
                self.skipped[name] += 1
                value = None
            # what counts nothing keeps its adapters in the graph, so that ranks stay in step
            terms[name] = sum_of_nothing(term, task) if value is None else value
        return task, terms, output.features

    def bind(self, teacher: Detector) -> None:
        """Tells the terms who teaches, once the teacher is trained and on its device."""
        for term in self.terms.values():
            term.bind(self.student, teacher)

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


def sum_of_nothing(module: nn.Module, like: Tensor) -> Tensor:
    """A zero whose gradient is zero for every parameter of the module."""
    return sum((parameter.sum() for parameter in module.parameters()), like.new_zeros(())) * 0.0
