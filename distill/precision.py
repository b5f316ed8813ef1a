"""`precision: auto`: the fastest way to run a network that is exact enough, found by trying for a moment."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from distill.data import Batch
from distill.distiller import Distiller
from distill.errors import UserError
from distill.factory import Data
from distill.footprint import human_seconds
from distill.report import Report
from distill.run_folder import RunFolder
from distill.schema import Config
from students import Detector
from students.folding import level_differences
from teachers import Teacher

OUTPUTS = 0.02  # of each of a teacher's maps, by its root mean square, that may be lost
LOSS = 0.01  # likewise of a student's loss
SECONDS, ROUNDS, HOPELESS = 1.0, 5, 2.0  # for all rounds; at most; times the fastest, from which none is tried again
FEW = 2  # images that are tried on, on a CPU


class Way(NamedTuple):
    """How a network runs.

    Attributes:
        precision: a key of `teachers.PRECISIONS`.
        channels_last: the memory format; contiguous otherwise.
    """

    precision: str = "float32"
    channels_last: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return f"{self.precision}{' channels_last' if self.channels_last else ''}"


@dataclass
class Trial:
    """What came of one way.

    Attributes:
        seconds: of a pass, the median; NaN where it cannot run.
        error: how far what it gives is from float32's, as a share.
        exact: whether that is close enough.
    """

    seconds: float
    error: float
    exact: bool


def ways(device: torch.device, train: bool) -> list[Way]:
    """What is tried: float32 as it is first, which all others are compared with. float16 asks for scaled gradients,
    which are Accelerate's business, so a student is not tried in it."""
    half = ["bfloat16"] + ["float16"] * (device.type == "cuda" and not train)
    return [Way(channels_last=False), Way(), *map(Way, half)]


def try_teacher(detector: Detector, device: torch.device, images: Tensor) -> dict[Way, Trial]:
    """Tries all ways to ask a teacher; the detector stays as it is."""
    images = few(images, device)
    passes: dict[Way, Callable[[], NamedTuple]] = {}
    for way in ways(device, train=False):
        one = copy.deepcopy(detector) if way.channels_last is False else detector
        teacher = Teacher(one, device, way.precision, channels_last=way.channels_last)
        passes[way] = lambda teacher=teacher: teacher(images)

    def distance(output: NamedTuple, expected: NamedTuple) -> float:
        return level_differences(output, expected, lambda x: x.square().mean().sqrt()).max().item()

    return try_all(passes, distance, OUTPUTS, device)


def try_student(
    unit: Distiller, teachers: Mapping[str, Teacher], device: torch.device, batch: Batch
) -> dict[Way, Trial]:
    """Tries all ways to train a student: its pass and its losses, forwards and back; the unit stays as it is."""
    images, targets = few(batch.images, device), batch.targets[:FEW] if device.type == "cpu" else batch.targets
    unit = copy.deepcopy(unit)
    unit.bind({name: teacher.detector for name, teacher in teachers.items()})
    lessons = unit.ask(teachers, images, targets)
    passes: dict[Way, Callable[[], float]] = {}
    for way in ways(device, train=True):
        learner = copy.deepcopy(unit).to(device, memory_format=way.memory_format).train()
        learner.bind({name: teacher.detector for name, teacher in teachers.items()})
        learner.run_as(way.precision, way.memory_format)

        def step(learner: Distiller = learner) -> float:
            torch.manual_seed(0)  # some losses draw
            loss, _ = learner(images, targets, lessons)
            loss.backward()
            learner.zero_grad()
            return loss.item()

        passes[way] = step
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        return try_all(passes, lambda loss, expected: abs(loss - expected) / (abs(expected) or 1.0), LOSS, device)


def try_all(
    passes: Mapping[Way, Callable[[], object]],
    distance: Callable[[object, object], float],
    tolerance: float,
    device: torch.device,
) -> dict[Way, Trial]:
    """Times passes in turns, for about `SECONDS`; each twice at least, and no more where it is hopeless.

    Args:
        passes: the first is exact by definition.
        distance: how far the result of a pass is from the first one's.
        tolerance: that it may be at most.
        device: waited for after each pass.
    """
    taken: dict[Way, list[float]] = {}
    errors: dict[Way, float] = {}
    expected = None

    def run(way: Way) -> object:
        began = time.perf_counter()
        result = passes[way]()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken[way].append(time.perf_counter() - began)
        return result

    for way in passes:
        taken[way] = []
        try:
            result = run(way)
        except RuntimeError:  # an operation that the device does not have in this precision
            if expected is None:
                raise
            taken[way], errors[way] = [float("nan")], float("inf")
            continue
        first, expected = expected is None, result if expected is None else expected
        errors[way] = 0.0 if first else distance(result, expected)  # a first loss may be NaN, which training names
    hopeful = [way for way in passes if errors[way] <= tolerance]
    began, rounds = time.perf_counter(), 0
    while rounds < 1 or (rounds < ROUNDS and time.perf_counter() - began < SECONDS):
        best = min(min(taken[way]) for way in hopeful)
        # the first pass is slow for many reasons, so only where it is so even against others' firsts
        hopeful = [way for way in hopeful if min(taken[way]) <= HOPELESS * best]
        for way in hopeful:
            run(way)
        rounds += 1
    return {
        way: Trial(median(values[1:] or values), errors[way], errors[way] <= tolerance) for way, values in taken.items()
    }


def fastest(trials: Mapping[Way, Trial]) -> Way:
    """Of those that are exact enough."""
    return min((way for way, trial in trials.items() if trial.exact), key=lambda way: trials[way].seconds)


def settle(
    key: str,
    attempt: Callable[[], dict[Way, Trial]],
    folder: RunFolder | None,
    accelerator: Accelerator,
    report: Report,
) -> Way:
    """The way that a run takes from its first start to its end: tried by the main process, and told to all.

    Args:
        key: of the setting that says auto.
        attempt: tries all ways.
        folder: where the choice is written down, and where it is taken from once it is; None only tries.
        accelerator: of all processes, which have to call together.
        report: is told what was found.
    """
    found: list[Way | None] = [None]
    if accelerator.is_main_process:
        found = [recorded(key, "auto", folder) if folder and key in folder.precisions else None]
        if found[0] is None:
            trials = attempt()
            found = [fastest(trials)]
            report.say(f"{key}: auto takes {found[0]}; {describe(trials)}")
            if folder:
                folder.write_precision(key, found[0]._asdict())
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def settle_student(
    config: Config,
    unit: Distiller,
    teachers: dict[str, Teacher],
    accelerator: Accelerator,
    folder: RunFolder | None,
    data: Data,
    report: Report,
) -> Way:
    """What the student is trained in, apart from Accelerate's mixed precision."""
    if config.train.precision is None:
        return Way()
    if accelerator.mixed_precision != "no":
        raise UserError(
            f"train.precision: auto chooses by itself, but Accelerate's settings say {accelerator.mixed_precision}; "
            "leave out one of them"
        )

    def attempt() -> dict[Way, Trial]:
        return try_student(unit.to(accelerator.device), teachers, accelerator.device, data.sample(accelerator.device))

    return settle("train.precision", attempt, folder, accelerator, report)


def recorded(key: str, setting: str, folder: RunFolder | None) -> Way:
    """What a setting says: itself, or what a run has chosen; float32 where it says auto and none has."""
    if setting != "auto":
        return Way(setting)
    return Way(**(folder.precisions.get(key, {}) if folder else {}))


def describe(trials: Mapping[Way, Trial]) -> str:
    """Such as 'float32 12 ms, float32 channels_last 10 ms, bfloat16 channels_last 90 ms (off by 0.4%)'."""
    parts = []
    for way, trial in trials.items():
        off = "" if trial.error < 1e-3 else f" (off by {trial.error:.1%}{'' if trial.exact else ', too much'})"
        parts.append(
            f"{way} {human_seconds(trial.seconds)}{off}" if trial.seconds == trial.seconds else f"{way} cannot run"
        )
    return ", ".join(parts)


def few(images: Tensor, device: torch.device) -> Tensor:
    return images[:FEW].to(device) if device.type == "cpu" else images.to(device)
