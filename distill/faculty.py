"""The teachers of a run: frozen, kept in its folder, compared, and there once they have something to teach."""

from collections.abc import Callable, Iterable, Sequence

from accelerate import Accelerator

import students
from distill import factory
from distill.checkpoint import Progress
from distill.distributed import compile_options
from distill.evaluation import EvaluationResult
from distill.guards import check_unchanged, fingerprint
from distill.pictures import Album
from distill.precision import Trial, Way, recorded, settle, try_teacher
from distill.report import Report
from distill.run import Run
from distill.run_folder import RunFolder
from distill.schema import ArtifactConfig, Config
from distill.summary import best, teacher_title
from students import Detector
from teachers import Teacher


def freeze(
    config: Config,
    detectors: dict[str, Detector],
    accelerator: Accelerator,
    folder: RunFolder | None,
    data: factory.Data,
    report: Report,
) -> dict[str, Teacher]:
    """Detectors as teachers, each on this process's device and in the precision that its settings say."""
    teachers, device = {}, accelerator.device
    for name, detector in detectors.items():
        settings, key = config.all_teachers[name], f"{config.teacher_key(name)}.precision"
        way = recorded(key, settings.precision, None)
        if settings.precision == "auto":

            def attempt(detector: Detector = detector) -> dict[Way, Trial]:
                return try_teacher(detector, device, data.sample(device).images)

            way = settle(key, attempt, folder, accelerator, report)
        teachers[name] = Teacher(detector, device, way.precision, settings.shard, compile_options(), way.channels_last)
    return teachers


def keep_published(config: Config, detectors: dict[str, Detector], folder: RunFolder, accelerator: Accelerator) -> None:
    """Puts teachers that are as their published weights are into the run folder."""
    for name, teacher in config.all_teachers.items():
        if teacher.as_its_weights_are and accelerator.is_main_process:
            detector = detectors[name].detector if teacher.image_size else detectors[name]
            info = {"image_size": list(teacher.image_size or config.data.image_size), "resize": config.data.resize}
            students.save(detector, folder.teacher(name), info)


class Faculty:
    """Who teaches in a run that has begun, what each is worth on val, and that none of them changes.

    A teacher that is the student as it was before its first cut sleeps until then, and its losses count nothing. One
    that is the student's own average changes with it, and is neither compared nor looked after.

    Args:
        run: whose teachers they are.
        progress: of the run; tells whether the student was cut before.
        resumes: whether the run goes on, with what it kept of its teachers.
        evaluate: on val.
        album: shows what each teacher detects.

    Attributes:
        aps: of each that detects and is there, by name.
        compares: whether there is one that detects, now or later.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        resumes: bool,
        evaluate: Callable[[Detector], EvaluationResult],
        album: Album,
    ):
        self._run, self._evaluate, self._album = run, evaluate, album
        self.aps: dict[str, float | None] = {}
        self._fingerprints: dict[str, str] = {}
        others = [name for name, teacher in run.config.all_teachers.items() if teacher.itself != "ema"]
        self.compares = any(run.teachers[name].detector.detects for name in others)
        originals = run.config.teachers_itself("original")
        is_cut = progress.before is not None or isinstance(run.config.student, ArtifactConfig)
        self._asleep = [] if is_cut else originals
        run.unit.silence(self._asleep)
        if is_cut and resumes:
            self._fetch(originals)
        elif is_cut:
            self._keep(originals)
        self._meet(name for name in others if name not in self._asleep)

    @property
    def compared(self) -> list[str]:
        """Who has an AP, in the settings' order."""
        return [name for name in self._run.config.all_teachers if name in self.aps]

    @property
    def ap(self) -> float | None:
        """That of the best; None where none was measured."""
        return self.aps.get(best(self.aps))

    def wake(self, student: Detector) -> bool:
        """Those that sleep become the student as it is, right before its first cut; whether there were any.

        Args:
            student: the same on all processes, as it is when it has just been evaluated.
        """
        names, self._asleep = self._asleep, []
        for name in names:
            self._run.teachers[name].detector.load_state_dict(student.state_dict())
        self._keep(names)
        self._meet(names)
        self._run.unit.silence(())
        return bool(names)

    def check(self) -> None:
        """Raises a UserError if a teacher has changed."""
        check_unchanged(self._run.teachers, self._fingerprints)

    def _meet(self, names: Iterable[str]) -> None:
        for name in names:
            teacher = self._run.teachers[name]
            self._fingerprints[name] = fingerprint(teacher.detector)
            if teacher.detector.detects:
                self.aps[name] = self._evaluate(teacher.detector).ap
                if not teacher.sharded:  # what needs all processes cannot be asked by the one that draws
                    self._album.show(teacher_title(name), teacher.detector)

    def _keep(self, names: Sequence[str]) -> None:
        """Puts teachers that are the student as it was into the run folder."""
        data = self._run.config.data
        if self._run.accelerator.is_main_process:
            for name in names:
                info = {"image_size": list(data.image_size), "resize": data.resize}
                students.save(self._run.teachers[name].detector, self._run.folder.teacher(name), info)

    def _fetch(self, names: Sequence[str]) -> None:
        """Takes them from there."""
        for name in names:
            kept = factory.load_detector(str(self._run.folder.teacher(name)), self._run.config.teacher_key(name))
            self._run.teachers[name].detector.load_state_dict(kept.state_dict())
