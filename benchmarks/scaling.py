"""Does what `--dry-run` says of a step's memory and time hold?

    python benchmarks/scaling.py configs/quickstart.yaml "configs/quickstart.yaml data.batch_size=16"

For each config with its overrides: the estimate, then steps of training as train.py makes them, each in a process of
its own. Memory is the peak of torch's allocator; time is that of the fastest step, as what else the machine does only
adds to it. Prints a table and writes --output/scaling.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator

from benchmarks.arms import markdown
from distill import factory
from distill.config import load_config
from distill.distiller import Distiller
from distill.ema import EMA
from distill.footprint import blank, estimate, fastest, human_bytes, human_seconds
from distill.optimization import build_optimizer
from distill.precision import recorded
from distill.schema import Config
from teachers import Teacher


def build_all(config: Config, class_names: list[str], device: torch.device) -> tuple[Distiller, dict[str, Teacher]]:
    """The untrained parts of a run; what a teacher has learnt changes neither memory nor time."""
    student = factory.build_student(config, class_names)
    detectors = factory.build_teachers(config, class_names, student)
    unit = factory.build_unit(config, student, detectors)
    ways = {name: recorded("", config.all_teachers[name].precision, None) for name in detectors}
    return unit, {name: Teacher(one, device, ways[name].precision) for name, one in detectors.items()}


def measure(config: Config, class_names: list[str], steps: int) -> dict[str, float]:
    """Bytes and seconds of a step."""
    device, settings = Accelerator().device, config.train.optimizer

    def build_step() -> Callable[[int], None]:
        unit, teachers = build_all(config, class_names, device)
        unit.to(device, memory_format=torch.channels_last).train()
        unit.bind({name: teacher.detector for name, teacher in teachers.items()})
        optimizer = build_optimizer(unit, settings.lr, settings.backbone_lr, settings.weight_decay)
        ema = EMA(unit.student, settings.ema) if settings.ema else None
        images, targets = blank(config.data.batch_size, config.data.image_size, device)

        def step(number: int) -> None:
            unit.combiner.step = unit.combiner.EAGER + 1 + number
            loss, _ = unit(images, targets, unit.ask(teachers, images, targets))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(unit.student)

        return step

    if device.type == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            step = build_step()
            for number in range(2):
                step(number)
        memory = peak(profiler)
    else:
        step = build_step()
        for number in range(2):
            step(number)
        memory = torch.cuda.max_memory_allocated()
    return {"memory": memory, "seconds": fastest(lambda: step(0), device, steps)}


def peak(profiler: torch.profiler.profile) -> int:
    """The most bytes that torch had at a time, since the profiler was started; there is no counter of it on a CPU."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="a config with its overrides, in one word")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--part", choices=["estimate", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        path, *overrides = args.runs[0].split()
        config, names = load_config(path, overrides), [str(n) for n in range(args.classes)]
        if args.part == "measure":
            found = measure(config, names, args.steps)
        else:
            device = Accelerator().device
            step = estimate(config, *build_all(config, names, device), device, 1, half=None)
            found = {"memory": sum(step.memory.values()), "seconds": sum(step.seconds.values()), "rows": step.rows()}
        print("FOUND" + json.dumps(found))
        return
    results = {}
    for run in args.runs:
        entry = results[run] = {}
        for part in ("estimate", "measure"):
            command = [sys.executable, __file__, run, "--part", part, f"--classes={args.classes}"]
            done = subprocess.run([*command, f"--steps={args.steps}"], stdout=subprocess.PIPE, text=True, check=True)
            entry[part] = json.loads(done.stdout.split("FOUND")[1])
        print("\n".join(f"{key}: {value}" for key, value in entry["estimate"]["rows"].items()), flush=True)
    rows = []
    for run, entry in results.items():
        ours, theirs = entry["estimate"], entry["measure"]
        cells = [run]
        for key, show in (("memory", human_bytes), ("seconds", human_seconds)):
            cells += [show(ours[key]), show(theirs[key]), f"{ours[key] / theirs[key] - 1:+.0%}"]
        rows.append(cells)
    print(markdown(["", "memory", "measured", "", "step", "measured", ""], rows))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "scaling.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
