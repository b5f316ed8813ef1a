"""What a run needs to go on from the end of an epoch, in files that are whole or not there."""

import os
from dataclasses import dataclass, field
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
from students import Plan

KEPT = 2  # the one before the last stays, in case the disk fills up while the last is written


@dataclass
class Progress:
    """Where a run stands; plain values, so that a checkpoint can be read without running code.

    Attributes:
        uncut_macs: MACs of the student before any cut.
        epoch: epochs done.
        cut_step: the training step before which the last cut was made.
        plans: every cut so far, of student and adapters, as JSON.
        before: results of the student just before its first cut.
    """

    uncut_macs: int
    epoch: int = 0
    cut_step: int | None = None
    plans: list[Any] = field(default_factory=list)
    before: dict[str, Any] | None = None

    def record_cut(self, plan: Plan, step: int) -> None:
        """Enters a cut that was made before a training step."""
        self.plans.append(plan.to_json())
        self.cut_step = step


def save_checkpoint(
    folder: Path, progress: Progress, unit: Distiller, ema: EMA | None, optimizer: Optimizer, accelerator: Accelerator
) -> None:
    """Writes `epoch_NNNN.pt` aside, renames it, and drops older ones. On the main process only."""
    if not accelerator.is_main_process:
        return
    state = {
        "progress": vars(progress),
        "unit": unit.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": {"module": ema.module.state_dict(), "updates": ema.updates} if ema else None,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }
    path = folder / f"epoch_{progress.epoch:04d}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    os.replace(aside, path)
    for old in sorted(folder.glob("epoch_*.pt"))[:-KEPT]:
        old.unlink()


def load_checkpoint(
    folder: Path, unit: Distiller, ema: EMA | None, optimizer: Optimizer, accelerator: Accelerator
) -> Progress:
    """Brings freshly built parts to where the newest checkpoint left them, its cuts replayed.

    Raises:
        UserError: no checkpoint, or one that belongs to other settings.
    """
    paths = sorted(folder.glob("epoch_*.pt"))
    if not paths:
        raise UserError(f"resume: {folder} holds no checkpoint; start the run anew")
    path, state = _read_newest(paths)
    progress = Progress(**state["progress"])
    try:
        for plan in progress.plans:
            cut_everywhere(Plan.from_json(plan), unit, ema, optimizer)
        unit.load_state_dict(state["unit"])
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.module.load_state_dict(state["ema"]["module"])
            ema.updates = state["ema"]["updates"]
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"resume: {path} does not fit this run's config.yaml ({reason})") from error
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return progress


def _read_newest(paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole: a crash of the machine may have cut the last one short."""
    for path in reversed(paths):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:  # noqa: PERF203, two files at most
            reason = type(error).__name__
    raise UserError(f"resume: {paths[-1]} cannot be read ({reason}), nor one before it; start the run anew")
