"""What teaching costs a whole loop of training: images a second plain, with a teacher asked, and with one remembered.

    python benchmarks/throughput.py configs/bccd.yaml data.root=PATH teacher.path=runs/bccd/teacher

Three arms of one config on the same views of the same images: plain, online (each batch's teacher is asked) and cached
(everything that it says is on disk). They take turns in one process, each with a pass over the training images or
--steps of it: loading, asking, forwards and back, optimizer, average. Then the evaluation's pass. Medians over the
rounds; of a single thread on a CPU, the steps are compared by the processor's time, which other programs do not
lengthen. Memory is the peak of torch's allocator from building an arm to its second step. Prints a table and writes
--output/throughput.json.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator

from benchmarks.scaling import build_all, peak
from distill import factory
from distill.config import load_config
from distill.data import Batch, set_epoch
from distill.ema import EMA
from distill.errors import exit_status
from distill.evaluation import DetectionEvaluator, run_evaluation
from distill.footprint import human_bytes, human_seconds
from distill.optimization import build_optimizer
from distill.report import Report
from distill.schema import Config
from distill.teacher_cache import cost, open_caches, prepare_caches

ARMS = ("plain", "online", "cached")
PARTS = ("loading", "asking", "learning")


class Arm:
    """One way to train; all that a step needs."""

    def __init__(self, name: str, config: Config, data: factory.Data, accelerator: Accelerator):
        torch.manual_seed(0)
        self.data, self.device, settings = data, accelerator.device, config.train.optimizer
        self.clip_norm = settings.clip_norm
        if name == "plain":
            config = config.model_copy(update={"teacher": None, "teachers": {}, "losses": {}})
        self.unit, self.teachers = build_all(config, data.class_names, self.device)
        self.unit.to(self.device, memory_format=torch.channels_last).train()
        self.unit.bind({key: teacher.detector for key, teacher in self.teachers.items()})
        self.optimizer = build_optimizer(self.unit, settings.lr, settings.backbone_lr, settings.weight_decay)
        self.ema = EMA(self.unit.student, settings.ema) if settings.ema else None
        self.caches = {}
        if name == "cached":
            detectors = {key: teacher.detector for key, teacher in self.teachers.items()}
            self.caches = prepare_caches(config, data, self.unit, detectors, print)
            open_caches(config, self.caches, self.teachers, accelerator)
        self.seconds: list[dict[str, float]] = []  # of an image, by part and of a step, a round

    def step(self, batch: Batch, watch: Callable[[], None] = lambda: None) -> None:
        """One step of training; `watch` is called where another part begins."""
        images = batch.images.to(self.device, non_blocking=True)
        watch()
        lessons = self.unit.ask(self.teachers, images, batch.targets, batch.metas)
        watch()
        loss, _ = self.unit(images, batch.targets, lessons)
        loss.backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.unit.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.unit.student)
        watch()

    def turn(self, steps: int | None) -> None:
        """A pass over the training images, or so many steps of it."""
        loader, marks, seen = self.data.train.loader, [], 0
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1

        def watch() -> None:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            now = time.perf_counter()
            marks.append((now, time.process_time() if alone else now))

        set_epoch(loader, 0)
        watch()
        for batch in islice(loader, steps):
            self.step(batch, watch)
            seen += len(batch.images)
        taken = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(marks)]
        parts = {part: sum(wall for wall, _ in taken[n :: len(PARTS)]) / seen for n, part in enumerate(PARTS)}
        step = sum(own for n, (_, own) in enumerate(taken) if n % len(PARTS)) / seen
        self.seconds.append(parts | {"step": step})


def compare(args: argparse.Namespace) -> None:
    """Times all arms in turns, and prints a table."""
    config = load_config(args.config, args.overrides)
    augment = config.data.augment.model_copy(update={"views": 1})
    changes = {key: teacher.model_copy(update={"cache": str(args.output / f"cache_{key}")})
               for key, teacher in config.all_teachers.items()}  # fmt: skip
    config = config.model_copy(update={
        "data": config.data.model_copy(update={"augment": augment}),
        **({"teachers": changes} if config.teachers else {"teacher": next(iter(changes.values()))}),
    })  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    factory.draw_data(config.data)
    data = factory.build_data(config.data, config.seed)

    memory, arms = {}, {}
    for name in ARMS:  # in this order: an arm's cache is filled outside of what is measured
        if name == "cached":
            filled = fill(Arm(name, config, data, accelerator))
        gc.collect()
        with counting(accelerator.device) as count:
            arm = arms[name] = Arm(name, config, data, accelerator)
            for batch in islice(data.train.loader, 2):
                arm.step(batch)
        memory[name] = count()
    for _ in range(args.rounds + 1):  # the first does not count
        for arm in arms.values():
            arm.turn(args.steps)
    evaluated = evaluate(arms["plain"], 3)

    found = {name: summarize(arm, arms["plain"]) | {"memory": memory[name]} for name, arm in arms.items()}
    machine = {"device": accelerator.device.type, "threads": torch.get_num_threads(), "cores": os.cpu_count()}
    machine |= {"processor": platform.processor() or platform.machine(), "load": os.getloadavg()[0]}
    settings = {"config": args.config, "overrides": args.overrides, "rounds": args.rounds, "steps": args.steps}
    settings |= {"workers": config.data.workers, "batch_size": config.data.batch_size}
    cached = arms["cached"].caches
    disk = {"bytes": sum(cache.records * cache.record_bytes for cache in cached.values()), "filling": filled}
    held = sum(teacher.bytes_held for teacher in arms["online"].teachers.values())
    others = {"evaluation": evaluated, "cache": disk, "teacher_bytes": held}
    (args.output / "throughput.json").write_text(json.dumps({**machine, **settings, **others, "arms": found}, indent=2))
    rows = [
        [name, f"{e['images_per_second']:.1f}", f"{e['step']:.2f}x", *(human_seconds(e[part]) for part in PARTS),
         human_bytes(e["memory"]), f"{e['memory'] / (memory['plain'] + held * bool(arms[name].teachers)):.2f}x"]
        for name, e in found.items()
    ]  # fmt: skip
    report = Report()
    report.table(
        f"{args.config} on {machine['device']}, batches of {config.data.batch_size}, {config.data.workers} workers, "
        f"load of the machine {machine['load']:.1f}; medians of {args.rounds} rounds, times of an image",
        ("", "images/s", "step", *PARTS, "memory", "of plain and teacher"),
        rows,
    )
    report.say(f"evaluation: {human_seconds(evaluated)} an image, decoding, matching and loading included")
    for cache in cached.values():
        report.say(f"cache: {cost(cache)}" + (f"; filling it took {human_seconds(filled)} an image" if filled else ""))


def fill(arm: Arm) -> float | None:
    """Asks for every view once; seconds of an image, asking and writing. None where there were some from before."""
    empty, taken, seen = not any(cache.filled for cache in arm.caches.values()), 0.0, 0
    loader = arm.data.train.loader
    set_epoch(loader, 0)
    for batch in loader:
        images, began = batch.images.to(arm.device), time.perf_counter()
        arm.unit.ask(arm.teachers, images, batch.targets, batch.metas)
        taken, seen = taken + time.perf_counter() - began, seen + len(batch.images)
    return taken / seen if empty else None


def evaluate(arm: Arm, rounds: int) -> float:
    """Seconds of an image in the evaluation's pass."""
    split = arm.data.val
    evaluator = DetectionEvaluator(split.index.to_coco(), split.index.class_names)
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        run_evaluation(arm.unit.student, split.loader, evaluator)
        taken.append((time.perf_counter() - began) / len(split.index))
    return median(taken)


def summarize(arm: Arm, plain: Arm) -> dict[str, Any]:
    """Medians over the rounds; `step` is asking and learning against the plain arm's in the same round."""
    rounds, theirs = arm.seconds[1:], plain.seconds[1:]
    return {
        "images_per_second": 1 / median(sum(round_[part] for part in PARTS) for round_ in rounds),
        "step": median(ours["step"] / others["step"] for ours, others in zip(rounds, theirs)),
        **{part: median(round_[part] for round_ in rounds) for part in PARTS},
        "rounds": rounds,
    }


@contextmanager
def counting(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that tells, afterwards, the most bytes that torch had at a time within."""
    if device.type == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield lambda: peak(profiler)
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file with a teacher that is trained: teacher.path, or features")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="that count; 7 otherwise")
    parser.add_argument("--steps", type=int, metavar="N", help="of a turn; all of an epoch otherwise")
    parser.add_argument("--output", type=Path, default=Path("runs/throughput"), metavar="FOLDER")
    args = parser.parse_args()
    return exit_status(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
