"""A few more epochs for a trained student, with its run's own teachers and losses, while its numbers are restrained."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from distill import factory
from distill.checkpoint import find_checkpoints
from distill.data import set_epoch
from distill.distiller import Distiller
from distill.ema import EMA
from distill.errors import UserError
from distill.optimization import build_optimizer, rate_at, set_rate
from distill.precision import recorded
from distill.report import Report
from distill.run_folder import RunFolder
from distill.schema import Config
from students import Detector
from teachers import Teacher

DECAY = 0.99  # of the averaged copy, over so few steps


class FineTuning:
    """What it takes to go on training a run's student.

    Losses count what they did at the run's end, adapters come from its last checkpoint, and the learning rate starts at
    a share of the run's and falls to 0. One process only.

    Args:
        run: the folder of the run; where it trained teachers first, they are in it.
        config: its settings.
        student: the trained student; stays as it is.
        report: is told what the user should know.

    Raises:
        UserError: a teacher that is not there, or data that cannot be read.
    """

    def __init__(self, run: Path, config: Config, student: Detector, report: Report):
        self.config, self.student, self.report = config, student, report
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # labels in the student's order
        self.data = factory.build_data(
            config.data.model_copy(update={"classes": list(student.class_names)}), config.seed
        )
        self.folder = RunFolder(run)
        detectors = factory.build_teachers(_with_own_teachers(config, self.folder), self.data.class_names, student)
        self.teachers = {}
        for name, detector in detectors.items():
            key = f"{config.teacher_key(name)}.precision"
            way = recorded(key, config.all_teachers[name].precision, self.folder)
            self.teachers[name] = Teacher(detector, self.device, way.precision, channels_last=way.channels_last)

    def train(self, restrain: Callable[[Detector], Detector], epochs: int, rate: float) -> Detector:
        """Trains a copy of the student under a restraint.

        Args:
            restrain: gives the student to train from the copy, on the training's device; with the same parameters,
                such as a `QuantizedDetector` of it, or with others in their place.
            epochs: passes over the training data.
            rate: share of the run's learning rate that this starts with.

        Returns:
            The average over the last steps, on the CPU and in eval mode.

        Raises:
            UserError: a loss is no longer a number.
        """
        torch.manual_seed(self.config.seed)
        unit = self._unit(copy.deepcopy(self.student))
        unit.student = restrain(unit.student)
        settings = self.config.train.optimizer
        optimizer = build_optimizer(unit, settings.lr * rate, settings.backbone_lr, settings.weight_decay)
        ema = EMA(unit.student, DECAY)
        loader = self.data.train.loader
        total = epochs * len(loader)
        unit.train()
        for epoch in range(epochs):
            set_epoch(loader, epoch)
            sums: dict[str, float] = {}
            with self.report.progress(len(loader), f"epoch {epoch + 1}/{epochs}") as bar:
                for step, batch in enumerate(loader, epoch * len(loader)):
                    if not len(batch.images):
                        continue
                    set_rate(optimizer, rate_at(step, total, warmup=0, final=0.0))
                    unit.combiner.step = step
                    images = batch.images.to(self.device)
                    loss, parts = unit(images, batch.targets, unit.ask(self.teachers, images, batch.targets))
                    values = {name: float(value) for name, value in parts.items()}
                    if not loss.isfinite():
                        raise UserError(f"--rate: a loss is no number any more ({values}); say less than {rate:g}")
                    loss.backward()
                    if settings.clip_norm:
                        torch.nn.utils.clip_grad_norm_(unit.parameters(), settings.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                    ema.update(unit.student)
                    sums = {name: value + sums.get(name, 0.0) for name, value in values.items()}
                    bar.advance(values)
            means = ", ".join(f"{name} {value / len(loader):.3f}" for name, value in sums.items())
            self.report.say(f"epoch {epoch + 1}/{epochs}: {means}")
        return ema.module.cpu().eval()

    def _unit(self, student: Detector) -> Distiller:
        """The student with its losses, bound to the teachers."""
        detectors = {name: teacher.detector for name, teacher in self.teachers.items()}
        # what it once started with from its teacher it has built on since
        unit = factory.build_unit(self.config.model_copy(update={"inherit": []}), student, detectors)
        unit.combiner.epoch = self.config.train.epochs
        self._load_adapters(unit)
        unit.to(self.device, memory_format=torch.channels_last)
        unit.bind(detectors)
        return unit

    def _load_adapters(self, unit: Distiller) -> None:
        """The adapters as the run left them; new ones would have to learn first, and the features with them."""
        if not unit.terms.state_dict():
            return
        paths = find_checkpoints(self.folder.checkpoints)
        if paths:
            state = torch.load(paths[-1], map_location="cpu", weights_only=True)["unit"]
            of_terms = {key.removeprefix("terms."): value for key, value in state.items() if key.startswith("terms.")}
            try:
                unit.terms.load_state_dict(of_terms)
                return
            except RuntimeError:  # of other settings than the present ones
                pass
        self.report.warn(f"{self.folder.checkpoints}: has no adapters that fit; those of the losses start anew")


def _with_own_teachers(config: Config, folder: RunFolder) -> Config:
    """The settings with the paths of the teachers that the run trained first, or kept of its student."""
    paths = {}
    for name, teacher in config.all_teachers.items():
        if teacher.is_built or teacher.itself == "original":
            own = folder.teacher(name)
            if not own.is_dir():
                key = config.teacher_key(name)
                raise UserError(f"{own}: the run's own teacher is not there; give one by {key}.path=PATH")
            paths[name] = teacher.model_copy(update={"path": str(own), "itself": None})
        else:
            paths[name] = teacher
    changed = {"teachers": paths} if config.teachers else {"teacher": next(iter(paths.values()), None)}
    return config.model_copy(update=changed)
