"""The unit of training: a student, the adapters that its teacher needs, and the sum of all their losses."""

from torch import Tensor, nn

from distill.terms import KnowledgeTerm
from students import DenseOutput, Detector


class Distiller(nn.Module):
    """Student and knowledge terms as one module, so that they are wrapped, optimised, cut and saved together.

    The teacher stays outside: it is asked beforehand and only its tensors come in.

    Args:
        student: the detector that learns.
        terms: knowledge terms by the name they are logged under; none trains the student plainly.
    """

    def __init__(self, student: Detector, terms: dict[str, KnowledgeTerm] | None = None):
        super().__init__()
        self.student = student
        self.terms = nn.ModuleDict(terms or {})

    def forward(
        self, images: Tensor, targets: list[dict[str, Tensor]], teacher_output: DenseOutput | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and its parts: `task` and each term weighted as it enters the sum, detached.

        Args:
            images: (B, 3, H, W) in [0, 1].
            targets: see `Detector.loss`.
            teacher_output: the teacher's output for the same images; not needed where there are no terms.
        """
        output = self.student(images)
        task = sum(self.student.loss(output, targets).values())
        knowledge = {name: term.weight * term(output, teacher_output) for name, term in self.terms.items()}
        total = sum(knowledge.values(), task)
        return total, {name: value.detach() for name, value in {"task": task, **knowledge}.items()}

    def traced_outputs(self, images: Tensor) -> list[Tensor]:
        """All tensors that leave the student or an adapter: what a dependency graph has to see."""
        output = self.student(images)
        adapted = [x for term in self.terms.values() for x in term.adapt(output.features)]
        return [level for levels in output for level in levels] + adapted

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        """Layers whose outputs keep their width, whatever is cut."""
        return (*self.student.output_layers, *(x for term in self.terms.values() for x in term.output_layers))
