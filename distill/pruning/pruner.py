"""Decides what a student loses before which epoch, and takes it from everything that follows the student's shape."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer

from distill.data import Batch
from distill.distiller import Distiller
from distill.ema import EMA
from distill.errors import UserError
from distill.pruning.account import account
from distill.pruning.budget import meet_budget, meet_measured
from distill.pruning.cost import BUDGETS, Cost
from distill.pruning.graph import OUTPUT, ChannelGraph, ChannelGroup, trace_channels
from distill.pruning.importance import IMPORTANCES, Evidence
from distill.pruning.limits import Limits, layers_of
from distill.pruning.ranking import Curve, rank_by_harm, rank_by_structure, rank_together, score_greedily
from distill.pruning.saliency import trained_loss
from distill.pruning.schedule import share_left
from distill.pruning.stopwatch import MeasuredCost, Stopwatch
from distill.terms.adapter import ChannelSelection
from students.plan import Plan, apply_plan, named_tensors
from teachers import Teacher


class Pruner:
    """Cuts channels between epochs until a share of what the uncut student costs is left.

    Args:
        image_size: height and width, pixels, that costs are counted and graphs traced at.
        target: share of the uncut student's cost that is left after the last cut.
        epochs: before which cuts are made, counted from 0.
        budget: what costs are counted in, see `distill.pruning.cost.Cost`.
        method: `cut`, or `soft`, which at all `epochs` but the last only chooses channels to be set to 0, see
            `distill.pruning.soft`.
        schedule: how much each cut takes, see `distill.pruning.schedule.share_left`.
        importance: a name in `distill.pruning.importance`.
        knowledge: whether the knowledge terms count where an importance goes by gradients, or the task alone.
        greedy: score anew after each step of `round_to` channels within a group, without those that went.
        ranking: `uniform` takes the same share of every group, `isomorphic` of every set of groups of one structure,
            `global` the lowest scores wherever they are, `sensitivity` what `curves` say does the least harm.
        curves: by the first of a group's layers, see `distill.pruning.sensitivity.read_curves`.
        per: divides scores by what goes with a channel in this currency, so that what is dear and of little use goes
            first; `none`, or a key of `BUDGETS` but latency.
        floor: share of its uncut width that every group keeps.
        keep: see `distill.pruning.limits.Limits`.
        limits: likewise.
        round_to: widths become multiples of this.
        device: where latency is measured; None: where the student is.
        runtime: in what it is measured, see `Stopwatch`.

    Attributes:
        soft_epochs: before which channels are set to 0 instead of cut.
        uncut: what the student costs before any cut, as `check` finds it; 1 where it is measured by shares of that.
        uncut_widths: likewise, of the narrowest group that runs through each dimension of each tensor: a group may be
            named otherwise once blocks are gone.
        uncut_groups: likewise, the layers of each group and their width.
        whole: why other layers stay as wide as they are, by name, likewise.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        target: float,
        epochs: Sequence[int],
        budget: str = "macs",
        method: str = "cut",
        schedule: str = "cubic",
        importance: str = "group_l1",
        knowledge: bool = True,
        greedy: bool = False,
        ranking: str = "uniform",
        curves: Mapping[str, Curve] | None = None,
        per: str = "none",
        floor: float = 0.0,
        keep: Sequence[str] = (),
        limits: Mapping[str, tuple[float, float]] | None = None,
        round_to: int = 8,
        device: torch.device | str | None = None,
        runtime: str = "eager",
    ):
        self.image_size, self.device, self.runtime = image_size, device, runtime
        self.target, self.epochs, self.budget, self.schedule = target, sorted(set(epochs)), budget, schedule
        self.soft_epochs = self.epochs[:-1] if method == "soft" else []
        self.importance, self.knowledge, self.greedy = IMPORTANCES[importance], knowledge, greedy
        self.ranking, self.curves, self.per = ranking, curves or {}, per
        self.limits, self.round_to = Limits(floor, keep, limits), round_to
        self.uncut = 0.0
        self.uncut_widths: dict[tuple[str, int], int] = {}
        self.uncut_groups: list[tuple[list[str], int]] = []
        self.whole: dict[str, str] = {}
        self._stopwatch: Stopwatch | None = None
        self._traced: tuple[list[tuple[str, torch.Size]], ChannelGraph] | None = None

    def check(self, unit: Distiller) -> None:
        """Looks at the uncut student, before anything else; later cuts are shares of what is found here.

        Raises:
            UserError: the student cannot be traced and cut, has nothing for this importance to go by, a pattern
                matches nothing, a curve is missing, or no plan can reach the target.
        """
        try:
            graph = self.trace(unit)
            groups = graph.groups
            if self.budget == "latency":
                self._stopwatch = Stopwatch(unit.student, self.image_size, self.device, self.runtime)
            cost = self._cost(unit)
            self.uncut, self.uncut_widths = cost.now() if isinstance(cost, Cost) else 1.0, {}
            for group in sorted(groups, key=lambda group: group.width, reverse=True):
                self.uncut_widths |= {(member.name, member.dim): group.width for member in group.members}
            least = min(1.0, self._least(unit, groups) / self.uncut)
        except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"pruning: the channels of the student, {unit.student.title}, cannot be cut "
                f"({reason}); choose another detector or backbone, or leave pruning out (pruning=null)"
            ) from error
        try:
            self.limits.check(groups)
        except ValueError as error:
            raise UserError(f"pruning.{error}") from None
        self.uncut_groups = [(layers_of(group), group.width * group.size) for group in groups]
        self.whole = {name.removeprefix("student."): reason for name, reason in graph.whole.items()}
        for layer in (layer for group in groups if self.limits.keeps(group) for layer in layers_of(group)):
            self.whole[layer] = "a pattern of pruning.keep"
        of_outputs = {id(layer) for layer in unit.student.output_layers}
        self.whole |= {name: OUTPUT for name, layer in unit.student.named_modules() if id(layer) in of_outputs}
        if self.ranking == "sensitivity":
            self._check_curves(groups)
        self._scores(unit, groups, self._measure(unit, groups, {}, ()))
        if least > self.target:
            named = [key for key in ("floor", "keep", "limits") if getattr(self.limits, key)]
            held = any(isinstance(layer, ChannelSelection) for layer in unit.output_layers)
            raise UserError(
                f"pruning.target: {self.target} cannot be reached; cut as far as may be this student still has "
                f"{least:.3f} of its {BUDGETS[self.budget]}{_told(graph.whole)}; raise the target, or lower "
                f"pruning.round_to ({self.round_to}){''.join(f' or pruning.{name}' for name in named)}"
                f"{', or choose another adapter than identity, which holds the pyramid at its width' if held else ''}"
            )

    def _check_curves(self, groups: Sequence[ChannelGroup]) -> None:
        way_out = "scan this student anew with python -m distill.sensitivity"
        unknown = [name for name in (layers_of(group)[0] for group in groups) if name not in self.curves]
        if unknown:
            raise UserError(
                f"pruning.sensitivity: the file says nothing of {unknown[0]} ({len(unknown)} of {len(groups)} groups "
                f"are missing); {way_out}"
            )
        for group in groups:
            layer = layers_of(group)[0]
            if self.curves[layer].width != group.width:
                raise UserError(
                    f"pruning.sensitivity: the file is of another student, whose {layer} has "
                    f"{self.curves[layer].width} channels where this one has {group.width}; {way_out}"
                )

    def measure(self, unit: Distiller, teachers: Mapping[str, Teacher], batches: Iterable[Batch]) -> Evidence | None:
        """What the importance goes by, where weights do not say it all; every rank must be given the same batches.

        Args:
            unit: the student with its terms.
            teachers: those of its terms, by name.
            batches: of training images; none is drawn where nothing needs to be measured.
        """
        return self._measure(unit, self.trace(unit).groups, teachers, batches)

    def plan(
        self, unit: Distiller, epoch: int, evidence: Evidence | None = None, step: float = 1.0, left: float = 1.0
    ) -> Plan:
        """The cut that is due before an epoch; empty if the student is small enough already. After `check`.

        Args:
            unit: the student with its adapters.
            epoch: counted from 0.
            evidence: of `measure`, of the unit as it is now.
            step: share of what is due that is taken.
            left: share of the uncut cost that there is.
        """
        assert self.uncut, "check first: cuts are shares of what is found then"
        groups, tensors = self.trace(unit).groups, named_tensors(unit)
        scores, widths = self._scores(unit, groups, evidence), [self._uncut_width(group) for group in groups]
        if self.per != "none":
            # adapters are not deployed, so what they compute costs nothing; what costs nothing must not go for free
            costs = Cost(unit, self.per, self.image_size)
            scores = [score / costs.by_channel(group).clamp(min=1) for score, group in zip(scores, groups)]
        match self.ranking:
            case "uniform":
                scores = [rank_together([score], [width])[0] for score, width in zip(scores, widths)]
            case "isomorphic":
                scores = rank_by_structure(groups, scores, widths, tensors)
            case "sensitivity":
                curves = [self.curves[layers_of(group)[0]] for group in groups]
                scores = [rank_by_harm(*of_group) for of_group in zip(scores, curves)]
        budget = self.due(epoch, step, left) * self.uncut
        return self._meet(unit, groups, scores, budget, left * self.uncut, step * self._done(epoch))[0]

    def explain(self, unit: Distiller, plan: Plan, evidence: Evidence | None = None) -> list[dict[str, Any]]:
        """What a plan takes from each group, see `distill.pruning.account`; arguments as in `plan`, before the cut."""
        groups = self.trace(unit).groups
        macs = Cost(unit, "macs", self.image_size)
        return account(groups, self._scores(unit, groups, evidence), plan, named_tensors(unit), macs)

    def trace(self, unit: Distiller) -> ChannelGraph:
        """What of a unit may be narrowed; traced anew only when its shapes have changed since the last time."""
        shapes = [(name, tensor.shape) for name, tensor in named_tensors(unit).items()]
        if self._traced is None or self._traced[0] != shapes:
            self._traced = (shapes, trace_channels(unit, self.image_size))
        return self._traced[1]

    @property
    def counted_in(self) -> str:
        """The budget in words."""
        return BUDGETS[self.budget] + (" in ONNX Runtime" if self._stopwatch and self.runtime == "onnx" else "")

    def cuts_before(self, epoch: int) -> bool:
        """Whether channels are to be cut then, not only set to 0."""
        return epoch in self.epochs and epoch not in self.soft_epochs

    def is_behind(self, epoch: int, left: float) -> bool:
        """Whether more is left than may be from an epoch on, and is not to be set to 0 only."""
        return (not self.soft_epochs or epoch >= self.epochs[-1]) and left > self.due(epoch)

    def due(self, epoch: int, step: float = 1.0, left: float = 1.0) -> float:
        """Share of the uncut cost that may be left from an epoch on; or after a part of the way there from what is."""
        due = share_left(self.schedule, self._done(epoch), self.target)
        return due if step == 1 else left - step * max(0.0, left - due)

    def left(self, unit: Distiller) -> float:
        """Share of the uncut cost that is left."""
        return self._cost(unit).now() / self.uncut

    def _done(self, epoch: int) -> float:
        return sum(1 for cut in self.epochs if cut <= epoch) / len(self.epochs)

    def _uncut_width(self, group: ChannelGroup) -> int:
        found = [
            self.uncut_widths[spot]
            for member in group.members
            if (spot := (member.name, member.dim)) in self.uncut_widths
        ]
        return max(group.width, *found)

    def _cost(self, unit: Distiller) -> Cost | MeasuredCost:
        return MeasuredCost(unit, self._stopwatch) if self._stopwatch else Cost(unit, self.budget, self.image_size)

    def _measure(
        self, unit: Distiller, groups: list[ChannelGroup], teachers: Mapping[str, Teacher], batches: Iterable[Batch]
    ) -> Evidence | None:
        if self.importance.measure is None:
            return None
        try:
            return self.importance.measure(
                unit, groups, batches, lambda batch: trained_loss(unit, teachers, batch, self.knowledge)
            )
        except UserError:  # of the data
            raise
        except ValueError as error:
            raise UserError(f"pruning.importance: {error}") from error

    def _scores(self, unit: Distiller, groups: list[ChannelGroup], evidence: Evidence | None) -> list[Tensor]:
        tensors = named_tensors(unit)
        if self.importance.measure is None:
            # an adapter's weights say nothing of the student, and those of a loss that counts nothing must not matter
            groups = [
                replace(group, members=tuple(m for m in group.members if m.name.startswith("student.")))
                for group in groups
            ]

        def score(group: ChannelGroup) -> Tensor:
            try:
                if self.greedy:
                    return score_greedily(self.importance, group, tensors, group.step(self.round_to))
                return self.importance.score(group, tensors, evidence)
            except ValueError as error:
                if self.limits.keeps(group):  # whatever it is worth
                    return torch.zeros(group.width)
                raise UserError(
                    f"pruning.importance: {str(error).replace('student.', '')}, or leave it as wide as it is by a "
                    "pattern in pruning.keep"
                ) from error

        return [score(group) for group in groups]

    def _least(self, unit: Distiller, groups: list[ChannelGroup]) -> float:
        """The cost when every group is cut as far as may be; which channels they lose does not matter."""
        return self._meet(unit, groups, [torch.zeros(group.width) for group in groups], 0.0, self.uncut, 1.0)[1]

    def _meet(
        self,
        unit: Distiller,
        groups: list[ChannelGroup],
        scores: list[Tensor],
        budget: float,
        now: float,
        done: float,
    ) -> tuple[Plan, float]:
        cost = self._cost(unit)
        steps = [group.step(self.round_to) for group in groups]
        bounds = [self.limits.of(group, self._uncut_width(group), step, done) for group, step in zip(groups, steps)]
        floors, caps = [low for low, _ in bounds], [high for _, high in bounds]
        tensors = named_tensors(unit)
        if isinstance(cost, Cost):
            return meet_budget(groups, scores, tensors, budget, cost.after, steps, floors, caps)
        macs = Cost(unit, "macs", self.image_size)

        def plan_at(share: float) -> Plan:
            return meet_budget(groups, scores, tensors, share * macs.now(), macs.after, steps, floors, caps)[0]

        return meet_measured(plan_at, cost.after, budget, now, tries=8 if budget else 0)


def _told(whole: Mapping[str, str]) -> str:
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

    Args:
        plan: of the unit.
        unit: the student with its adapters, bare of any wrapper.
        ema: its averaged copy.
        optimizer: of the unit's parameters.

    Raises:
        ValueError, RuntimeError: see `students.apply_plan`; nothing has changed then.
    """
    of_student = plan.below("student.")
    targets = [(unit, plan)] + ([(ema.module, of_student)] if ema else [])
    apply_plan(targets, [optimizer])
    for detector in (unit.student, ema.module) if ema else (unit.student,):
        detector.plans.append(of_student)
