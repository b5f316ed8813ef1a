"""Latency as a budget: students are timed beside the uncut one, in turns, so that whatever else runs slows both."""

import copy
from collections.abc import Callable
from statistics import median

import torch

from distill.distiller import Distiller
from distill.exported import DeployedDetector, run_in_onnx
from distill.measure import pass_of, time_in_turns
from students import Detector
from students.plan import Plan, apply_plan

WARMUP, REPEATS = 5, 30


class Stopwatch:
    """Measures what one image takes a student, as a share of what it takes the uncut one at that time.

    Args:
        uncut: a copy is kept.
        image_size: height and width, pixels.
        device: where to measure; None: where the student is.
        runtime: `eager` mode, in the student's own precision, or `onnx` for ONNX Runtime.
    """

    def __init__(
        self,
        uncut: Detector,
        image_size: tuple[int, int],
        device: torch.device | str | None = None,
        runtime: str = "eager",
    ):
        home = next(uncut.parameters()).device if device is None else torch.device(device)
        self.image_size, self.runtime = image_size, runtime
        self.device = torch.device("cpu") if runtime == "onnx" else home  # it is ONNX Runtime that chooses
        self._uncut = self._pass_of(uncut)

    def share(self, student: Detector) -> float:
        """Median over pairs of passes: the student's time by the uncut one's."""
        uncut, cut = time_in_turns([self._uncut, self._pass_of(student)], WARMUP, REPEATS, self.device)
        return median(after / before for before, after in zip(uncut, cut))

    def _pass_of(self, student: Detector) -> Callable[[], object]:
        student = copy.deepcopy(student).eval().to(self.device)
        if self.runtime == "eager":
            return pass_of(student, self.image_size)
        deployed = DeployedDetector(student, "network")
        exported = run_in_onnx(deployed, self.image_size, threads=torch.get_num_threads())
        return lambda: exported(torch.zeros(1, 3, *self.image_size))


class MeasuredCost:
    """What the student of a unit takes, as it is at present, in shares of the uncut one's time; see `Cost`."""

    def __init__(self, unit: Distiller, stopwatch: Stopwatch):
        self._student, self._stopwatch = unit.student, stopwatch

    def now(self) -> float:
        """As it is."""
        return self._stopwatch.share(self._student)

    def after(self, plan: Plan) -> float:
        """As the plan, made for the unit, would leave it."""
        trial = copy.deepcopy(self._student)
        apply_plan([(trial, plan.below("student."))])
        return self._stopwatch.share(trial)
