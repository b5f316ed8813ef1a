"""What one cut costs in time, part by part, and in loss right after it, with and without what makes up for it.

    python benchmarks/cut.py --threads 2
    python benchmarks/cut.py --parts loss pruning=null  # any setting of train.py, for the student that is cut

Writes --output/cut.json.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in this folder, `losses` would be a benchmark

import students
from benchmarks.arms import interval, markdown, run_arm
from benchmarks.importance import mean_loss
from distill import factory
from distill.config import check_config, read_yaml
from distill.distiller import Distiller
from distill.ema import EMA
from distill.optimization import build_optimizer
from distill.pruning.folding import add_offsets, measure_offsets
from distill.pruning.pruner import Pruner, cut_everywhere
from distill.pruning.recalibrate import (
    batches_needed,
    calibration_batches,
    recalibrate_batch_norms,
    share_statistics,
)
from students import Plan

DETECTORS = {
    "dense, resnet50, 96 channels": {"name": "dense", "backbone": "resnet50"},
    "retinanet, resnet50, 256 channels": {"name": "retinanet", "backbone": "resnet50"},
}
PARTS = ("trace", "score and plan", "fold", "slice", "re-estimate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of the student whose loss is measured"
    )
    parser.add_argument("--parts", nargs="+", choices=("time", "loss"), default=["time", "loss"])
    parser.add_argument("--size", type=int, default=640, help="of square images, pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="of training before the cut whose loss is measured")
    parser.add_argument("--output", type=Path, default=Path("runs/cut"))
    args = parser.parse_intermixed_args()
    torch.set_num_threads(args.threads)
    output, results = args.output.resolve(), {}
    output.mkdir(parents=True, exist_ok=True)
    if "time" in args.parts:
        results["seconds"] = {name: time_cut(settings, args.size) for name, settings in DETECTORS.items()}
        print(time_table(results["seconds"], args.size, args.threads))
    if "loss" in args.parts:
        plain = ["teacher=null", "losses={}", "pruning=null", f"train.epochs={args.epochs}", *args.overrides]
        entries = []
        for seed in range(args.seeds):
            run_arm(output / f"seed{seed}", args.config, [*plain, f"seed={seed}"])
            entries.append(losses_after(output / f"seed{seed}"))
        results["loss"] = {key: [entry[key] for entry in entries] for key in entries[0]}
        print(loss_table(results["loss"]))
    (output / "cut.json").write_text(json.dumps(results, indent=2) + "\n")


def time_cut(settings: dict[str, Any], size: int, batch_size: int = 8) -> dict[str, dict[str, float]]:
    """Seconds of each part of a cut to half the MACs, on the clock and of the processor, with its averaged copy."""
    torch.manual_seed(0)
    student = students.build(class_names=["a", "b"], weights="none", **settings)
    unit = Distiller(student).to(memory_format=torch.channels_last)
    ema, optimizer = EMA(student, 0.998), build_optimizer(unit, 1e-3, 1.0, 0.05)
    sum(p.sum() for p in unit.parameters()).backward()
    optimizer.step()  # so that there is a state to slice
    images = [torch.rand(batch_size, 3, size, size)] * batches_needed(batch_size, (size, size))
    pruner = Pruner((size, size), 0.5, [0], importance="group_l2", ranking="global", per="macs", floor=0.25)
    pruner.check(unit)
    pruner._traced = None  # as if it had been cut since
    seconds: dict[str, dict[str, float]] = {}
    with measured(seconds, "trace"):
        pruner.trace(unit)
    with measured(seconds, "score and plan"):
        plan = pruner.plan(unit, 0)
    with measured(seconds, "fold"):
        offsets = measure_offsets(ema.module, plan.below("student."), images)
    with measured(seconds, "slice"):
        cut_everywhere(plan, unit, ema, optimizer)
        for detector in (student, ema.module):
            add_offsets(detector, plan.below("student."), offsets)
    with measured(seconds, "re-estimate"):
        recalibrate_batch_norms(ema.module, images)
        share_statistics(ema.module, student)
    return seconds


@contextmanager
def measured(seconds: dict[str, dict[str, float]], part: str) -> Iterator[None]:
    clock, processor = time.perf_counter(), time.process_time()
    yield
    seconds[part] = {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


def losses_after(folder: Path) -> dict[str, float]:
    """The task's loss on val of a trained student: uncut, and right after a cut to half the MACs by its BN scales."""
    config = check_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    data = factory.build_data(config.data.model_copy(update={"workers": 0}), config.seed)
    size, batch_size = config.data.image_size, config.data.batch_size
    student = students.load(folder / "student")
    pruner = Pruner(size, 0.5, [0], importance="bn_scale", ranking="global", floor=0.1)
    unit = Distiller(student)
    pruner.check(unit)
    plan = pruner.plan(unit, 0)
    shown = calibration_batches(
        data.train.loader.dataset, batch_size, torch.device("cpu"), batches_needed(batch_size, size)
    )
    images = [batch.images for batch in shown]
    offsets = measure_offsets(student, plan.below("student."), images)
    val = list(data.val.loader)

    def loss(change: Callable[[Distiller], None]) -> float:
        trial = copy.deepcopy(unit)
        change(trial)
        return mean_loss(trial, val).task

    return {
        "uncut": mean_loss(unit, val).task,
        "cut": loss(lambda trial: cut(trial, plan, {})),
        "cut, folded": loss(lambda trial: cut(trial, plan, offsets)),
        "cut, re-estimated": loss(lambda trial: cut(trial, plan, {}, images)),
        "cut, folded and re-estimated": loss(lambda trial: cut(trial, plan, offsets, images)),
    }


def cut(unit: Distiller, plan: Plan, offsets: dict[str, Tensor], images: Sequence[Tensor] = ()) -> None:
    cut_everywhere(plan, unit, None, torch.optim.SGD(unit.parameters(), lr=0.1))
    add_offsets(unit.student, plan.below("student."), offsets)
    if images:
        recalibrate_batch_norms(unit.student, images)


def time_table(seconds: dict[str, dict[str, dict[str, float]]], size: int, threads: int) -> str:
    """Seconds on the clock and, in brackets, of the processor."""
    rows = []
    for name, parts in seconds.items():
        whole = {kind: sum(part[kind] for part in parts.values()) for kind in ("clock", "processor")}
        cells = [f"{part['clock']:.1f} ({part['processor']:.1f})" for part in (*(parts[p] for p in PARTS), whole)]
        rows.append([f"{name}, {size}x{size} px, {threads} threads", *cells])
    return markdown(["", *PARTS, "all"], rows)


def loss_table(losses: dict[str, list[float]]) -> str:
    """The mean over seeds and its 95% interval."""
    rows = []
    for name, values in losses.items():
        _, half = interval(values)
        rows.append([name, f"{mean(values):.3f}" + (f" +- {half:.3f}" if len(values) > 1 else "")])
    return markdown(["", "the task's loss on val"], rows)


if __name__ == "__main__":
    main()
