"""Decides which whole residual branches a student loses before which epoch."""

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from statistics import fmean as mean
from typing import Any

import torch

from distill.data import Batch
from distill.distiller import Distiller
from distill.errors import UserError
from distill.measure import count_macs, eval_mode
from distill.pruning.residual import Block, find_blocks, without
from distill.pruning.saliency import measure_saliency, trained_loss
from students import Plan
from students.plan import apply_plan
from teachers import Teacher


class BlockPruner:
    """Takes residual branches out between epochs, those first that matter least.

    Args:
        image_size: height and width, pixels, to find the blocks with.
        count: how many go in all.
        epochs: before which they go, as equal a number each time as may be, counted from 0.
        importance: `loss` is what the loss becomes without the block, measured anew after each that goes; `taylor` the
            sum over its weights of (w dL/dw)^2 (Molchanov 2019, arXiv 1906.10771), measured once for all that go.
        keep: patterns, such as `backbone.body.layer1.*`, of blocks that stay.

    Attributes:
        may_go: by name, whether each block of the uncut student may go, as `check` finds them.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        count: int,
        epochs: Sequence[int],
        importance: str = "loss",
        keep: Sequence[str] = (),
    ):
        self.image_size, self.count, self.epochs = image_size, count, sorted(set(epochs))
        self.importance, self.keep = importance, tuple(keep)
        self.may_go: dict[str, bool] = {}
        self._harm: dict[str, float] = {}  # of the last plan's blocks

    def check(self, unit: Distiller) -> None:
        """Looks at the student before anything is taken from it.

        Raises:
            UserError: it has fewer blocks than are to go, or a pattern matches none.
        """
        names = [block.name for block in find_blocks(unit.student, self.image_size)]
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, 1, cutoff=0.0)
                such = f", such as {near[0]}" if near else ""
                raise UserError(f"pruning.blocks.keep: {pattern!r} matches none of the {len(names)} blocks{such}")
        self.may_go = {name: not self._stays(name) for name in names}
        free = [name for name in names if self.may_go[name]]
        if self.count > len(free):
            raise UserError(
                f"pruning.blocks.count: {self.count} are to go, but {unit.student.title} has {len(free)} residual "
                f"branches that can ({', '.join(free) or 'none gives its input plus something'}); lower "
                "pruning.blocks.count or leave pruning.blocks out (pruning.blocks=null)"
            )

    def plan(
        self,
        unit: Distiller,
        epoch: int,
        teachers: Mapping[str, Teacher],
        batches: Iterable[Batch],
        step: float = 1.0,
    ) -> Plan:
        """The blocks that are due before an epoch; empty where as many are gone.

        Every rank must be given the same batches; the unit is not touched.

        Args:
            unit: the student with its terms, as it is now.
            epoch: counted from 0.
            teachers: those of its terms, by name.
            batches: of training images.
            step: share of what is due that is taken; a block that it would halve stays.
        """
        gone = sum(len(plan.blocks) for plan in unit.student.plans)
        due = round(self.count * sum(1 for cut in self.epochs if cut <= epoch) / len(self.epochs)) - gone
        due = int(step * due)
        if due <= 0:
            return Plan(())
        blocks = [block for block in find_blocks(unit.student, self.image_size) if not self._stays(block.name)]
        if self.importance == "taylor":
            saliency = measure_saliency(unit, (), batches, lambda batch: trained_loss(unit, teachers, batch))
            sums = {name: float(value.sum()) for name, value in saliency.items()}
            harm = {b: sum(v for name, v in sums.items() if name.startswith(f"student.{b.name}.")) for b in blocks}
            harm = {block: harm[block] for block in sorted(blocks, key=harm.__getitem__)[:due]}
        else:
            harm = _least_missed(unit, blocks, due, teachers, list(batches))
        chosen, self._harm = list(harm), {block.name: value for block, value in harm.items()}
        plan = without(chosen)
        return Plan((), blocks=tuple((f"student.{name}", stays) for name, stays in plan.blocks))

    def explain(self, unit: Distiller, plan: Plan) -> list[dict[str, Any]]:
        """What a plan's blocks are, before they go: `name`, `importance` and, each once those before it are gone,
        `macs_saved`."""
        trial, entries = copy.deepcopy(unit.student), []
        for block in plan.below("student.").blocks:
            before = count_macs(trial, self.image_size)
            apply_plan([(trial, Plan((), blocks=(block,)))])
            saved = before - count_macs(trial, self.image_size)
            entries.append({"name": block[0], "importance": self._harm[block[0]], "macs_saved": saved})
        return entries

    def _stays(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.keep)


@torch.no_grad()
def _least_missed(
    unit: Distiller, blocks: list[Block], count: int, teachers: Mapping[str, Teacher], batches: list[Batch]
) -> dict[Block, float]:
    """One after the other the block without which the loss is lowest, those before it gone already; and by how much it
    then rises, the mean over batches."""
    lessons = [unit.ask(teachers, batch.images, batch.targets) for batch in batches]

    def loss_without(gone: list[Block]) -> float:
        trial = copy.deepcopy(unit)
        apply_plan([(trial.student, without(gone))])
        with eval_mode(trial):
            return mean(float(trial(b.images, b.targets, lesson)[0]) for b, lesson in zip(batches, lessons))

    harm: dict[Block, float] = {}
    before = loss_without([])
    while len(harm) < count:
        losses = {block: loss_without([*harm, block]) for block in blocks if block not in harm}
        least = min(losses, key=losses.__getitem__)
        harm[least], before = losses[least] - before, losses[least]
    return harm
