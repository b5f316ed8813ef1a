"""What a run needs to go on, in files that are whole or not there."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from distill.distiller import Distiller
from distill.ema import EMA
from distill.errors import UserError
from distill.pruning.pruner import cut_everywhere
from distill.run_folder import RunFolder
from students import Plan

BEFORE_CUT = "before_cut.pt"  # what a cut that is still to be judged goes back to
KEPT = 2  # the one before the last stays, in case the disk fills up while the last is written


@dataclass
class EpochProgress:
    """How far an epoch has come.

    Attributes:
        step: batches that each process has been through.
        sums: of each weighted loss over these steps, the mean over all processes.
        unreadable: files that were left out.
        seconds: spent.
        ap_after_cut: AP right after the epoch's cut, where it was evaluated.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ap_after_cut: float | None = None


@dataclass
class Progress:
    """Where a run stands; plain values, so that a checkpoint can be read without running code.

    Attributes:
        uncut_macs: MACs of the student before any cut.
        epoch: epochs done.
        cut_epoch: the epoch before which the last cut was made.
        plans: every cut so far, of student and adapters, as JSON.
        before: results of the student just before its first cut.
        within: how far the epoch after these has come; None between two epochs.
        processes: that it was made on.
        left: share of the budget that the last cut left; None before the first, or where there is no budget.
        cuts: what each cut took, an entry of `BlockPruner.explain` a block and of `Pruner.explain` a group, and what of
            the budget was due and is left; the main process's alone.
        retreats: the cuts that were taken back, see `distill.pruning.guard`.
        best: epoch and AP of the best student within the budget, where one is kept.
        left_out: losses that are left out until the guard's next look.
    """

    uncut_macs: int
    epoch: int = 0
    cut_epoch: int | None = None
    plans: list[Any] = field(default_factory=list)
    before: dict[str, Any] | None = None
    within: EpochProgress | None = None
    processes: int = 1
    left: float | None = None
    cuts: list[dict[str, Any]] = field(default_factory=list)
    retreats: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)

    def record_cut(
        self,
        plan: Plan,
        due: float | None,
        left: float | None,
        blocks: list[dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        """Enters a cut that was made before the present epoch: what it was to leave and leaves, and what is gone."""
        self.plans.append(plan.to_json())
        self.cut_epoch, self.left = self.epoch, left
        self.cuts.append({"epoch": self.epoch, "due": due, "left": left, "blocks": blocks, "groups": groups})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """What `asdict` took apart."""
        within = values["within"] and EpochProgress(**values["within"])
        return cls(**values | {"within": within})


def save_checkpoint(
    folder: Path,
    progress: Progress,
    unit: Distiller,
    ema: EMA | None,
    optimizer: Optimizer,
    accelerator: Accelerator,
    name: str | None = None,
) -> None:
    """Writes `epoch_NNNN.pt`, or `epoch_NNNN_step_NNNNNN.pt` within the next one, and drops what is no longer needed.

    On the main process only. It is written aside, and renamed once it is whole. With a `name` it is another file, that
    is not gone on from by itself.

    Raises:
        UserError: it cannot be written; the ones before it are as they were.
    """
    if not accelerator.is_main_process:
        return
    state = {
        "progress": asdict(progress),
        "unit": unit.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": {"module": ema.module.state_dict(), "updates": ema.updates} if ema else None,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    step = f"_step_{progress.within.step:06d}" if progress.within else ""
    _write(folder / (name or f"epoch_{progress.epoch:04d}{step}.pt"), state)
    _drop_older(folder)


def go_back(folder: Path, retreat: dict[str, Any], accelerator: Accelerator) -> None:
    """Makes the state before the last cut the newest checkpoint, with the retreat entered; all processes wait for it.

    Newer ones go last: a run that is killed on the way comes to the same point again.
    """
    if accelerator.is_main_process:
        state = torch.load(folder / BEFORE_CUT, map_location="cpu", weights_only=True)
        state["progress"]["within"] = None
        state["progress"]["retreats"].append(retreat)
        path = folder / f"epoch_{state['progress']['epoch']:04d}.pt"
        _write(path, state)
        for newer in find_checkpoints(folder):
            if newer > path:
                newer.unlink()
    accelerator.wait_for_everyone()


def _write(path: Path, state: dict[str, Any]) -> None:
    folder, aside = path.parent, path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine could leave half a file under the new name
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter where the disk is full
        aside.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({_first_line(error)}); make room, or mend the folder's rights, and go on from "
            f"the checkpoint before it: train.py --resume {RunFolder(folder.parent).outermost}"
        ) from error


def find_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("epoch_*.pt"))  # "epoch_0001.pt" comes before "epoch_0001_step_000100.pt"


def _drop_older(folder: Path) -> None:
    """Keeps the newest ones, and the newest that was made between two epochs: it serves any number of processes."""
    paths = find_checkpoints(folder)
    between = [path for path in paths if "step" not in path.stem][-1:]
    for path in paths[:-KEPT]:
        if path not in between:
            path.unlink()
    for path in folder.glob("epoch_*.tmp"):  # of a run that was killed while it wrote
        path.unlink()


def load_checkpoint(
    folder: Path, unit: Distiller, ema: EMA | None, optimizer: Optimizer, accelerator: Accelerator
) -> tuple[Progress, list[str]]:
    """Brings freshly built parts to where the newest checkpoint left them, its cuts replayed.

    Returns:
        Where the run stands, and of each newer checkpoint that could not be taken, why.

    Raises:
        UserError: no checkpoint, or one that belongs to other settings.
    """
    path, state, refused = _read_newest(folder, accelerator.num_processes)
    progress = Progress.from_dict(state["progress"])
    progress.processes = accelerator.num_processes
    try:
        for plan in progress.plans:
            cut_everywhere(Plan.from_json(plan), unit, ema, optimizer)
        unit.load_state_dict(state["unit"])
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.module.load_state_dict(state["ema"]["module"])
            ema.updates = state["ema"]["updates"]
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"resume: {path} does not fit these settings ({_first_line(error)}); student, balance and the losses' "
            "names and adapters stay as they were when it was made, and a loss is left out by losses.NAME.weight=0"
        ) from error
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return progress, refused


def _read_newest(folder: Path, processes: int) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint that is whole, as a crash of the machine may have cut the last one short, and that fits.

    One made within an epoch fits as many processes as it was made on: with others, the batches would be other ones.
    """
    refused = []
    for path in reversed(find_checkpoints(folder)):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            made_on = state["progress"]["processes"] if state["progress"]["within"] else processes
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, UnpicklingError) as error:
            refused.append(f"{path} cannot be read ({type(error).__name__})")
            continue
        if made_on == processes:
            return path, state, refused
        refused.append(f"{path} was made within an epoch on {made_on} processes, this run has {processes}")
    if not refused:
        raise UserError(f"resume: {folder} holds no checkpoint; start the run anew")
    elsewhere = ", or on as many processes as before" if any(" processes" in reason for reason in refused) else ""
    raise UserError(f"resume: {'; '.join(refused)}; start the run anew{elsewhere}")


def _first_line(error: Exception) -> str:
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return others[0].strip() if first.endswith(":") and others else first  # torch begins with a heading
