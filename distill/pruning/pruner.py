"""Decides what a student loses before which epoch, and takes it from everything that follows the student's shape."""

import math

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer

from distill.distiller import Distiller
from distill.ema import EMA
from distill.errors import UserError
from distill.measure import count_macs, count_uses
from distill.pruning.budget import meet_macs
from distill.pruning.graph import ChannelGroup, find_groups, trace_channels
from distill.pruning.importance import IMPORTANCES, NEED_SALIENCY, Saliency, macs_by_channel, rank_within_group
from distill.pruning.schedule import cuts_at, share_left
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
        schedule: how much each cut takes, see `distill.pruning.schedule.share_left`.
        importance: name of a function in `distill.pruning.importance`.
        ranking: `uniform` takes the same share of every group, `global` the lowest scores wherever they are.
        per_macs: scores are divided by the multiply-accumulates that go with a channel, so that what is dear and of
            little use goes first; it makes a difference to `global` ranking only.
        floor: share of its uncut width that every group keeps.
        round_to: widths become multiples of this.

    Attributes:
        epochs: before which cuts are made.
        needs_saliency: whether `plan` wants to know what each parameter adds to the loss.
    """

    def __init__(
        self,
        uncut_macs: int,
        image_size: tuple[int, int],
        target: float,
        start: int,
        end: int,
        every: int = 1,
        schedule: str = "cubic",
        importance: str = "group_l1",
        ranking: str = "uniform",
        per_macs: bool = False,
        floor: float = 0.0,
        round_to: int = 8,
    ):
        self.uncut_macs = uncut_macs
        self.image_size = image_size
        self.target, self.schedule = target, schedule
        self.importance = IMPORTANCES[importance]
        self.needs_saliency = importance in NEED_SALIENCY
        self.ranking, self.per_macs, self.floor = ranking, per_macs, floor
        self.uncut_widths: dict[str, int] = {}  # by group, as `check` finds them
        self.round_to = round_to
        self.epochs = cuts_at(start, end, every)

    def check(self, unit: Distiller) -> None:
        """Looks at the uncut student, before anything else; later cuts are shares of what is found here.

        Raises:
            UserError: the student cannot be traced and cut, has nothing for this importance to go by, or no plan can
                reach the target.
        """
        try:
            graph = trace_channels(unit, self.image_size)
            groups = graph.groups
            least = self._least(unit, groups) / self.uncut_macs
        except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"pruning: the channels of student.backbone={unit.student.recipe['backbone']} cannot be cut "
                f"({reason}); choose another backbone, or leave pruning out (pruning=null)"
            ) from error
        if not self.needs_saliency:
            try:
                for group in groups:
                    self.importance(group, named_tensors(unit), None)
            except ValueError as error:
                raise UserError(f"pruning.importance: {error}") from None
        if least > self.target:
            raise UserError(
                f"pruning.target: {self.target} cannot be reached; with every width cut to "
                f"{f'{self.floor:g} of itself or ' if self.floor else ''}{self.round_to} this student still has "
                f"{least:.3f} of its MACs{_told(graph.whole)}; raise the target, or lower pruning.round_to or "
                "pruning.floor"
            )

    def plan(self, unit: Distiller, epoch: int, saliency: Saliency | None = None) -> Plan:
        """The cut that is due before an epoch; empty if the student is small enough already.

        Args:
            unit: the student with its adapters.
            epoch: counted from 0.
            saliency: of the unit's parameters as they are now, for an importance that needs it.
        """
        done = sum(1 for cut in self.epochs if cut <= epoch) / len(self.epochs)
        left = share_left(self.schedule, done, self.target)
        groups, tensors = find_groups(unit, self.image_size), named_tensors(unit)
        scores = [self.importance(group, tensors, saliency) for group in groups]
        if self.per_macs:
            uses = {f"student.{name}": n for name, n in count_uses(unit.student, self.image_size).items()}
            # adapters are not deployed, so what they compute costs nothing; what costs nothing must not go for free
            costs = [macs_by_channel(group, tensors, uses).clamp(min=1) for group in groups]
            scores = [score / cost for score, cost in zip(scores, costs)]
        if self.ranking == "uniform":
            scores = [rank_within_group(score, self._uncut_width(group)) for score, group in zip(scores, groups)]
        return self._meet(unit, groups, scores, left * self.uncut_macs)[0]

    def _least(self, unit: Distiller, groups: list[ChannelGroup]) -> int:
        """MACs when every group is cut as far as may be; which channels they lose does not matter."""
        return self._meet(unit, groups, [torch.zeros(group.width) for group in groups], 0.0)[1]

    def _meet(self, unit: Distiller, groups: list[ChannelGroup], scores: list[Tensor], macs: float) -> tuple[Plan, int]:
        floors = [max(self.round_to, math.ceil(self.floor * self._uncut_width(group) * group.size)) for group in groups]
        count = lambda student: count_macs(student, self.image_size)  # noqa: E731
        return meet_macs(unit, unit.student, groups, scores, macs, count, self.round_to, floors)

    def _uncut_width(self, group: ChannelGroup) -> int:
        return self.uncut_widths.setdefault(group.name, group.width)


def _told(whole: dict[str, str]) -> str:
    """How many layers stay whole, and why the first of them does."""
    if not whole:
        return ""
    layer, reason = next(iter(whole.items()))
    return f" ({len(whole)} layers stay whole, first {layer}: {reason})"


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
