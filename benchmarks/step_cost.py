"""What a teacher adds to a step of training: all ways in turns, with the peak of their memory.

    python benchmarks/step_cost.py configs/quickstart.yaml
    python benchmarks/step_cost.py "configs/quickstart.yaml data.batch_size=16" --losses pkd fgd

For each config with its overrides, its student, the teacher that it would train and its losses, untrained, on images of
noise: neither what they have learnt nor what they see changes the time of a step. A step is forward, losses, backward,
clipping and AdamW; loading and the averaged copy, the same for all, are left out. Arms take turns in one process; each
counts by the median of its time over that of the plain step in the same round. Memory is the peak of torch's allocator
in a process of its own. With torchdistill installed, its `DistillationBox` makes the same step with a mimic loss on the
same maps; otherwise a plain loop with forward hooks does.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in this folder, `losses` would be another file

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.arms import ROOT, markdown
from benchmarks.scaling import peak
from distill import factory
from distill.config import check_config, override, read_yaml
from distill.distiller import Distiller
from distill.errors import UserError
from distill.footprint import blank, human_bytes
from distill.measure import count_macs
from distill.optimization import build_optimizer
from distill.precision import recorded
from distill.report import human_macs
from distill.schema import Config
from distill.terms import TERMS
from students import Detector
from teachers import Teacher, freeze

CLASSES = [str(n) for n in range(10)]
PLAIN, NAIVE, FAST, OURS, EVERY, PEER = "plain", "+ teacher", "+ fast teacher", "distilled", "every loss", "peer"
CLIP = 10.0
# what a step is to cost at most: see `judge`
BARS = {"overhead": 0.05, "online": 1.35, "memory": 1.15}

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="a config with its overrides, in one word")
    parser.add_argument(
        "--losses",
        nargs="*",
        choices=TERMS,
        metavar="LOSS",
        help="arms of one loss; the peer comes with plain_mimic",
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds that count")
    parser.add_argument("--output", type=Path, default=Path("runs/step_cost"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # one arm, in a process of its own
    args = parser.parse_args()
    if args.memory_of:
        print("FOUND" + json.dumps(measure_memory(load(args.runs[0]), args.memory_of)))
        return
    results = {run: measure(run, args.losses, args.repeats) for run in args.runs}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "step_cost.json").write_text(json.dumps(results, indent=2) + "\n")


def load(run: str) -> Config:
    """The settings of a config and its overrides; the teacher is the one that it would train first."""
    path, *overrides = run.split()
    return check_config(override(read_yaml(ROOT / path), overrides), path)


def measure(run: str, losses: list[str] | None, repeats: int) -> dict[str, Any]:
    """Time and memory of all arms of one config; prints its tables."""
    config, device = load(run), Accelerator().device
    arms, refused = build_arms(config, losses, device)
    seconds = take_turns(arms, repeats, device)
    shares = {arm: [a / b for a, b in zip(taken, seconds[PLAIN])] for arm, taken in seconds.items()}
    memory = {arm: memory_of(run, arm) for arm in (PLAIN, OURS)}
    student = factory.build_student(config, CLASSES)
    detector = next(iter(factory.build_teachers(config, CLASSES, student).values()))
    size, batch = config.data.image_size, config.data.batch_size
    weights = sum(4 * p.numel() for p in detector.parameters())
    found = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "batch": batch,
        "macs": {"student": count_macs(student, size), "teacher": count_macs(detector, size)},
        "milliseconds": {arm: 1e3 * median(taken) for arm, taken in seconds.items()},
        "shares": {arm: quartiles(values) for arm, values in shares.items()},
        "memory": memory,
        "teacher_bytes": weights,
        "refused": refused,
        "peer": describe_peer(),
        "bars": judge(seconds, shares, memory, weights),
        "parts": time_parts(config, device),
        "all_milliseconds": {arm: [1e3 * value for value in taken] for arm, taken in seconds.items()},
    }
    macs = found["macs"]
    print(
        f"\n{run}\nstudent {human_macs(macs['student'])}, teacher {human_macs(macs['teacher'])} MACs "
        f"({macs['teacher'] / macs['student']:.1f}x); {batch} images a step, {found['device']}\n"
    )
    rows = []
    for arm, ms in found["milliseconds"].items():
        low, middle, high = found["shares"][arm]
        kept = human_bytes(memory[arm]) if arm in memory else ""
        rows.append(
            [arm, f"{ms:.1f} ms", f"{middle:.3f}x", f"{low:.3f} to {high:.3f}", f"{batch / ms * 1e3:.1f}", kept]
        )
    print(markdown(("", "step", "of plain", "middle half", "images/s", "peak memory"), rows))
    print(markdown(("bar", "found", "at most", ""), [bar_row(*item) for item in found["bars"].items()]))
    print(markdown(("part of a distilled step", "ms"), [[k, f"{v:.2f}"] for k, v in found["parts"].items()]))
    return found


def build_arms(config: Config, losses: list[str] | None, device: torch.device) -> tuple[dict[str, Step], list[str]]:
    """A step an arm, and the losses that do not fit this pair.

    An arm that is taught from kept outputs in place of a teacher goes in here: another `taught_step`, given what stands
    for `teachers`.
    """
    own = {name: loss.model_dump(mode="json") for name, loss in config.losses.items()}
    alone = {name: {name: {"name": name}} for name in (TERMS if losses is None else losses)}
    arms: dict[str, Step] = {PLAIN: taught_step(config, {}, device)}
    arms[NAIVE] = and_then(naive_teacher(config, device), taught_step(config, {}, device))
    arms[FAST] = and_then(fast_teacher(config, device), taught_step(config, {}, device))
    arms[OURS] = taught_step(config, own, device)
    refused = []
    for name, section in alone.items():
        try:
            arms[name] = taught_step(config, section, device)
        except UserError:  # noqa: PERF203  (a loss that does not fit is found by building it)
            refused.append(name)
    fitting = {name: section[name] for name, section in alone.items() if name in arms}
    if len(fitting) > 1:
        arms[EVERY] = taught_step(config, fitting, device)
    if "plain_mimic" in arms:
        for channels_last in (False, True):
            arms[f"{PEER}, channels_last" if channels_last else PEER] = peer_step(config, device, channels_last)
    return arms, refused


def taught_step(config: Config, losses: Mapping[str, Any], device: torch.device) -> Step:
    """A step of the student as train.py makes it, with these losses."""
    unit, teachers = build_unit(config, losses, device)
    optimizer = build_optimizer(unit, 1e-5, 1.0, 0.05)
    images, targets = blank(config.data.batch_size, config.data.image_size, device)
    unit.combiner.step = unit.combiner.EAGER + 1  # as most steps are: without measuring gradients

    def step() -> None:
        loss, _ = unit(images, targets, unit.ask(teachers, images, targets))
        loss.backward()
        nn.utils.clip_grad_norm_(unit.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_unit(config: Config, losses: Mapping[str, Any], device: torch.device) -> tuple[Distiller, dict[str, Teacher]]:
    """Student with losses, and teachers, on the device; no teacher where there is no loss."""
    settings = config.model_dump(mode="json") | {"losses": dict(losses), "pruning": None}
    settings |= {} if losses else {"teacher": None, "teachers": {}, "balance": "none"}
    config = check_config(settings, "an arm")
    torch.manual_seed(0)
    student = factory.build_student(config, CLASSES)
    detectors = factory.build_teachers(config, CLASSES, student)
    unit = factory.build_unit(config, student, detectors)
    unit.to(device, memory_format=torch.channels_last).train()
    ways = {name: recorded("", config.all_teachers[name].precision, None) for name in detectors}
    teachers = {name: Teacher(detector, device, ways[name].precision) for name, detector in detectors.items()}
    unit.bind(detectors)
    return unit, teachers


def naive_teacher(config: Config, device: torch.device) -> Step:
    """The teacher's pass as a plain loop makes it: eval mode, no gradients, as it was trained."""
    detector, images = untrained_teacher(config, device)

    def ask() -> None:
        with torch.no_grad():
            detector(images)

    return ask


def fast_teacher(config: Config, device: torch.device) -> Step:
    """The same as ours makes it."""
    detector, images = untrained_teacher(config, device)
    teacher = Teacher(detector, device)
    return lambda: teacher(images)


def untrained_teacher(config: Config, device: torch.device) -> tuple[Detector, Tensor]:
    detectors = factory.build_teachers(config, CLASSES, factory.build_student(config, CLASSES))
    detector = freeze(next(iter(detectors.values()))).to(device, memory_format=torch.channels_last)
    return detector, blank(config.data.batch_size, config.data.image_size, device)[0]


def and_then(first: Step, second: Step) -> Step:
    def both() -> None:
        first()
        second()

    return both


class PeerStudent(nn.Module):
    """A student as torchvision's detectors are called in training, its adapters within the reach of hooks."""

    def __init__(self, student: Detector, widths: tuple[int, ...]):
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in zip(student.feature_channels, widths))

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        output = self.student(images)
        for adapter, feature in zip(self.adapters, output.features):
            adapter(feature)
        return self.student.loss(output, targets)


class PeerTeacher(nn.Module):
    """A teacher whose maps are within the reach of hooks, however its pyramid is built."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        self.levels = nn.ModuleList(nn.Identity() for _ in detector.strides)

    def forward(self, images: Tensor) -> None:
        for level, feature in zip(self.levels, self.detector(images).features):
            level(feature)


def peer_step(config: Config, device: torch.device, channels_last: bool) -> Step:
    """A step with the mean squared difference of all pyramid maps that both have, through 1x1 adapters."""
    student = factory.build_student(config, CLASSES).train()
    detector = freeze(next(iter(factory.build_teachers(config, CLASSES, student).values())))
    learner, expert = PeerStudent(student, detector.feature_channels), PeerTeacher(detector)
    images, targets = blank(config.data.batch_size, config.data.image_size, device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    for module in (learner, expert):
        module.to(device, memory_format=layout)
    levels = range(len(learner.adapters))
    try:
        from torchdistill.core.distillation import DistillationBox
        from torchdistill.losses.registry import register_mid_level_loss  # noqa: F401  (fills the registries)
    except ImportError:
        return hooked_step(learner, expert, images, targets)
    terms = {
        f"level{n}": {
            "criterion": {"key": "MSELoss", "kwargs": {}},
            "criterion_wrapper": {
                "key": "SimpleLossWrapper",
                "kwargs": {
                    "input": {"is_from_teacher": False, "module_path": f"adapters.{n}", "io": "output"},
                    "target": {"is_from_teacher": True, "module_path": f"levels.{n}", "io": "output"},
                },
            },
            "weight": 1.0,
        }
        for n in levels
    }
    settings = {
        "num_epochs": 1,
        "teacher": {
            "forward_proc": "forward_batch_only",
            "requires_grad": False,
            "forward_hook": {"output": [f"levels.{n}" for n in levels]},
        },
        "student": {
            "forward_proc": "forward_batch_target",
            "forward_hook": {"output": [f"adapters.{n}" for n in levels]},
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"model_term": {"weight": 1.0}, "sub_terms": terms},
            "func2extract_model_loss": "extract_model_loss_dict",
        },
        "optimizer": {"key": "AdamW", "kwargs": {"lr": 1e-5, "weight_decay": 0.05}, "max_grad_norm": CLIP},
    }
    box = DistillationBox(expert.eval(), learner, {}, settings, device, None, False, 1.0)
    box.pre_epoch_process(epoch=0)
    return lambda: box.post_forward_process(box.forward_process(images, targets))


def hooked_step(learner: PeerStudent, expert: PeerTeacher, images: Tensor, targets: list[dict[str, Tensor]]) -> Step:
    """The same by a plain loop with forward hooks."""
    ours: dict[int, Tensor] = {}
    theirs: dict[int, Tensor] = {}
    for maps, layers in ((ours, learner.adapters), (theirs, expert.levels)):
        for n, layer in enumerate(layers):
            layer.register_forward_hook(lambda module, inputs, output, n=n, maps=maps: maps.__setitem__(n, output))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-5, weight_decay=0.05)

    def step() -> None:
        with torch.no_grad():
            expert(images)
        losses = sum(learner(images, targets).values())
        (losses + sum(nn.functional.mse_loss(ours[n], theirs[n]) for n in ours)).backward()
        nn.utils.clip_grad_norm_(learner.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def describe_peer() -> str:
    try:
        import torchdistill
    except ImportError:
        return "a loop with forward hooks"
    return f"torchdistill {torchdistill.__version__}"


def take_turns(arms: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round of each arm; the first rounds warm up."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(-2, repeats):
        for arm, step in arms.items():
            began = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            if number >= 0:
                seconds[arm].append(time.perf_counter() - began)
    return seconds


def judge(
    seconds: Mapping[str, list[float]], shares: Mapping[str, list[float]], memory: Mapping[str, int], weights: int
) -> dict[str, tuple[float, float]]:
    """What was found and what it may be at most, by the name of the bar."""
    overheads = [ours / floor - 1 for ours, floor in zip(seconds[OURS], seconds[FAST])]
    bars = {
        "losses and bookkeeping, over fast teacher + student step": (median(overheads), BARS["overhead"]),
        "distilled step, of the plain one": (median(shares[OURS]), BARS["online"]),
        "peak memory, of plain training's + the teacher's weights": (
            memory[OURS] / (memory[PLAIN] + weights),
            BARS["memory"],
        ),
    }
    for peer in (arm for arm in seconds if arm.startswith(PEER)):
        ratios = [ours / theirs for ours, theirs in zip(seconds["plain_mimic"], seconds[peer])]
        bars[f"plain_mimic's step, of the {peer}'s"] = (median(ratios), 1.0)
    return bars


def bar_row(name: str, values: tuple[float, float]) -> list[str]:
    found, most = values
    return [name, f"{found:.3f}", f"{most:.2f}", "met" if found <= most else "not met"]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[len(values) // 4], median(values), ordered[-1 - len(values) // 4]


def time_parts(config: Config, device: torch.device, repeats: int = 7) -> dict[str, float]:
    """Milliseconds of the parts of a distilled step, medians; on a GPU each part is waited for."""
    losses = {name: loss.model_dump(mode="json") for name, loss in config.losses.items()}
    unit, teachers = build_unit(config, losses, device)
    optimizer = build_optimizer(unit, 1e-5, 1.0, 0.05)
    images, targets = blank(config.data.batch_size, config.data.image_size, device)
    unit.combiner.step = unit.combiner.EAGER + 1
    taken: dict[str, list[float]] = {}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken.setdefault(part, []).append(1e3 * (time.perf_counter() - began))
            return result

        return call

    unit.student.forward = timed("student, forward", unit.student.forward)
    unit.task_loss = timed("task's loss", unit.task_loss)
    for name, term in unit.terms.items():
        term.forward = timed(f"loss: {name}", term.forward)
    for _ in range(2 + repeats):
        lessons = timed("teacher", unit.ask)(teachers, images, targets)
        loss, _ = timed("student and losses", unit)(images, targets, lessons)
        timed("backward", loss.backward)()
        timed("clipping", nn.utils.clip_grad_norm_)(unit.parameters(), CLIP)
        timed("AdamW", optimizer.step)()
        optimizer.zero_grad()
    parts = {part: median(values[2:]) for part, values in taken.items()}
    inner = [part for part in parts if part.startswith(("student, ", "task", "loss: "))]
    parts["bookkeeping"] = parts.pop("student and losses") - sum(parts[part] for part in inner)
    return parts


def memory_of(run: str, arm: str) -> int:
    command = [sys.executable, __file__, run, "--memory-of", arm]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.split("FOUND")[1])


def measure_memory(config: Config, arm: str) -> int:
    """Bytes that a few steps of an arm take at most."""
    device = Accelerator().device
    losses = {} if arm == PLAIN else {name: loss.model_dump(mode="json") for name, loss in config.losses.items()}
    if device.type == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            step = taught_step(config, losses, device)
            for _ in range(3):
                step()
        return peak(profiler)
    step = taught_step(config, losses, device)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
