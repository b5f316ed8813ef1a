"""The pictures of a run while it goes on. Whatever goes wrong with them is a warning: no run fails for a picture."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from accelerate import Accelerator

from distill.data import collate_samples
from distill.factory import Data
from distill.pictures.folder import BATCH, SCENES, draw_run, first_line, keep_scenes, keep_widths, save_picture
from distill.pictures.scenes import AT_FIRST, STUDENT, choose_samples, look, make_scenes, read_scenes, with_looks
from distill.pictures.sheets import draw_batch
from distill.pictures.style import styled
from distill.report import Report
from distill.run_folder import RunFolder
from students import Detector

SHARE = 0.05  # of a run's time that pictures may take; where epochs are shorter than that allows, some go undrawn
GUESS = 3.0  # seconds that they take, before that is known


class Album:
    """Looks at a few images with each detector, and draws the run's folder anew after its epochs.

    On the main process only; on others nothing happens.

    Args:
        run: where the pictures go.
        data: a few images of its validation split are watched.
        accelerator: tells which process this is.
        report: for what goes wrong.
    """

    def __init__(self, run: RunFolder, data: Data, accelerator: Accelerator, report: Report):
        self._run, self._report = run, report
        self._active = accelerator.is_main_process
        self._class_names = data.class_names
        self._drawn_at, self._took = time.perf_counter(), GUESS
        self._told: set[str] = set()
        self._samples, self._scenes = [], []
        if not self._active:
            return
        with self._harmless():
            run.pictures.mkdir(exist_ok=True)
            self._samples = choose_samples(data.val.loader.dataset)
            self._scenes = make_scenes(self._samples)
        with self._harmless(), styled():
            self._draw_first_batch(data)

    def begin(self, student: Detector, resumes: bool) -> None:
        """Keeps what the student looks at before it is trained; in a resumed run, what was kept then."""
        if not (self._active and self._samples):
            return
        with self._harmless():
            file = self._run.pictures / SCENES
            if resumes:
                kept = read_scenes(file)[0] if file.is_file() else []
                looks = [scene.looks[AT_FIRST] for scene in kept if AT_FIRST in scene.looks]
            else:
                looks = look(student, self._samples)
            if len(looks) == len(self._scenes):
                self._scenes = with_looks(self._scenes, AT_FIRST, looks)
                keep_scenes(self._run, self._scenes, self._class_names)

    def show(self, name: str, teacher: Detector) -> None:
        """Shows one more teacher, in front of the student. It is asked once, as it does not change."""
        if self._active and self._samples:
            with self._harmless():
                self._scenes = with_looks(self._scenes, name, look(teacher, self._samples))
                self._scenes = [
                    replace(scene, looks={key: scene.looks[key] for key in scene.looks if key != STUDENT})
                    for scene in self._scenes
                ]

    def update(self, student: Detector, last: bool = False) -> None:
        """Draws the run as it stands, unless pictures have had their share of the time.

        Args:
            student: the weights that are kept.
            last: draw in any case.
        """
        began = time.perf_counter()
        if not self._active or not (last or began - self._drawn_at >= self._took / SHARE):
            return
        with self._harmless():
            if self._samples:
                self._scenes = with_looks(self._scenes, STUDENT, look(student, self._samples))
                keep_scenes(self._run, self._scenes, self._class_names)
            keep_widths(self._run, student)
        with self._harmless():
            for problem in draw_run(self._run):
                self._warn(problem)
        self._drawn_at = time.perf_counter()
        self._took = self._drawn_at - began

    def _draw_first_batch(self, data: Data) -> None:
        loader = data.train.loader
        samples = [loader.dataset[address] for address in next(iter(loader.batch_sampler))]
        batch = collate_samples(samples, loader.dataset.transform.image_size)
        save_picture(self._run, BATCH, draw_batch(batch, self._class_names))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(first_line(error))

    def _warn(self, problem: str) -> None:
        """Says it once, not after every epoch."""
        if problem not in self._told:
            self._told.add(problem)
            self._report.warn(f"pictures: {problem}; training goes on without")
