"""Does what `--dry-run` says of a step's memory and time hold?

    python benchmarks/scaling.py configs/quickstart.yaml "configs/quickstart.yaml data.batch_size=16"

For each config with its overrides: the estimate, then steps of training as train.py makes them, each in a process of
its own. Memory is the peak of what is resident beyond what was before anything was built, or that of the GPU's
allocator; time is that of the fastest step, as what else the machine does only adds to it. Prints a table and writes
--output/scaling.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from accelerate import Accelerator

from benchmarks.arms import markdown
from distill import build
from distill.config import load_config
from distill.distiller import Distiller
from distill.ema import EMA
from distill.footprint import blank, estimate, human_bytes, human_seconds
from distill.optimization import build_optimizer
from distill.schema import Config
from teachers import Teacher


def build_all(config: Config, class_names: list[str], device: torch.device) -> tuple[Distiller, dict[str, Teacher]]:
    """The untrained parts of a run; what a teacher has learnt changes neither memory nor time."""
    detectors = build.build_teachers(config, class_names)
    unit = build.build_unit(config, class_names, detectors)
    return unit, {name: Teacher(one, device, config.all_teachers[name].precision) for name, one in detectors.items()}


def resident(field: str) -> int:
    """Bytes: `VmRSS` at present, `VmHWM` at its peak since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(config: Config, class_names: list[str], steps: int) -> dict[str, float]:
    """Bytes and seconds of a step."""
    device, settings = Accelerator().device, config.train.optimizer
    on_gpu = device.type == "cuda"
    before = 0 if on_gpu else resident("VmRSS")
    unit, teachers = build_all(config, class_names, device)
    unit.to(device, memory_format=torch.channels_last).train()
    unit.bind({name: teacher.detector for name, teacher in teachers.items()})
    optimizer = build_optimizer(unit, settings.lr, settings.backbone_lr, settings.weight_decay)
    ema = EMA(unit.student, settings.ema) if settings.ema else None
    images, targets = blank(config.data.batch_size, config.data.image_size, device)
    seconds = []
    for step in range(steps):
        if step == 1 and not on_gpu:  # what the first step needed once is not what a step needs
            Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        unit.combiner.step = 11 + step
        loss, _ = unit(images, targets, unit.ask(teachers, images, targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update(unit.student)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before
    return {"memory": peak, "seconds": min(seconds[1:])}


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
            step = estimate(config, *build_all(config, names, device), device, 1, half=False)
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
