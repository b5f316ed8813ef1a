"""Decides what a student loses before which epoch, and takes it from everything that follows the student's shape."""

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.optim import Optimizer

from distill.distiller import Distiller
from distill.ema import EMA
from distill.errors import UserError
from distill.measure import count_macs
from distill.pruning.budget import meet_macs
from distill.pruning.graph import find_groups
from distill.pruning.importance import IMPORTANCES, rank_within_group
from distill.pruning.schedule import cubic_left, cuts_at
from students.plan import Plan, apply_plan, named_tensors


class Pruner:
    """Cuts channels between epochs until a share of the uncut student's MACs is left.

    Args:
        uncut_macs: MACs of the student before any cut.
        image_size: height and width, pixels, that MACs are counted and graphs traced at.
        target: share of `uncut_macs` that is left after the last cut.
        start: epoch before which the first cut is made, counted from 0.
        end: epoch before which the last cut is made.
        every: epochs between cuts.
        importance: name of a function in `distill.pruning.importance`.
        ranking: `uniform` takes the same share of every group, `global` the lowest scores wherever they are.
        round_to: widths become multiples of this.
    """

    def __init__(
        self,
        uncut_macs: int,
        image_size: tuple[int, int],
        target: float,
        start: int,
        end: int,
        every: int = 1,
        importance: str = "group_l1",
        ranking: str = "uniform",
        round_to: int = 8,
    ):
        self.uncut_macs = uncut_macs
        self.image_size = image_size
        self.target, self.start, self.end, self.every = target, start, end, every
        self.importance = IMPORTANCES[importance]
        self.ranking = ranking
        self.uncut_widths: dict[str, int] = {}  # by group, as `check` finds them
        self.round_to = round_to
        self.epochs = cuts_at(start, end, every)

    def check(self, unit: Distiller) -> None:
        """Looks at the uncut student, before anything else; later cuts are shares of what is found here.

        Raises:
            UserError: the student cannot be traced and cut, or no plan can reach the target.
        """
        try:
            least = self._plan(unit, 0.0)[1] / self.uncut_macs
        except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"pruning: the channels of student.backbone={unit.student.recipe['backbone']} cannot be cut "
                f"({reason}); choose another backbone, or leave pruning out (pruning=null)"
            ) from error
        if least > self.target:
            raise UserError(
                f"pruning.target: {self.target} cannot be reached; with every width cut to {self.round_to} this "
                f"student still has {least:.3f} of its MACs; raise the target, or lower pruning.round_to"
            )

    def plan(self, unit: Distiller, epoch: int) -> Plan:
        """The cut that is due before an epoch; empty if the student is small enough already."""
        left = cubic_left(epoch, self.start, self.end, self.every, self.target)
        return self._plan(unit, left * self.uncut_macs)[0]

    def _plan(self, unit: Distiller, macs: float) -> tuple[Plan, int]:
        groups = find_groups(unit, self.image_size)
        tensors = named_tensors(unit)
        scores = [self.importance(group, tensors) for group in groups]
        if self.ranking == "uniform":
            widths = [self.uncut_widths.setdefault(group.name, group.width) for group in groups]
            scores = [rank_within_group(score, width) for score, width in zip(scores, widths)]
        count = lambda student: count_macs(student, self.image_size)  # noqa: E731
        return meet_macs(unit, unit.student, groups, scores, macs, count, self.round_to)


def agree(accelerator: Accelerator, plan: Plan | None) -> Plan:
    """The main process's plan, on every process; the others may give None."""
    if accelerator.num_processes == 1:
        return plan
    shared = [plan.to_json() if accelerator.is_main_process else None]
    return Plan.from_json(broadcast_object_list(shared)[0])


def cut_everywhere(plan: Plan, unit: Distiller, ema: EMA | None, optimizer: Optimizer) -> None:
    """Applies a plan to student, adapters, averaged copy and optimizer state, or to none of them.

    The plan enters the history of the student and of its averaged copy.
    """
    of_student = plan.below("student.")
    targets = [(unit, plan)] + ([(ema.module, of_student)] if ema else [])
    apply_plan(targets, [optimizer])
    for detector in (unit.student, ema.module) if ema else (unit.student,):
        detector.plans.append(of_student)
