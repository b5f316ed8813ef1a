"""Draws a run's pictures and its page from what lies in its folder: no data set and no detector is needed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from distill.pictures import charts, sheets
from distill.pictures.course import Course
from distill.pictures.page import write_page
from distill.pictures.scenes import Scene, pack, read_scenes
from distill.pictures.style import styled, to_png
from distill.pictures.widths import Width, group_widths
from distill.run_folder import RunFolder, write_file
from students import Detector

SCENES, WIDTHS = "scenes.npz", "widths.json"  # beside the pictures: what only a live detector can tell
BATCH = "batch"


class Picture(NamedTuple):
    """A picture's file name without its suffix, the section of the page that it stands in, and what it shows."""

    name: str
    section: str
    caption: str


PICTURES = (
    Picture(
        "ap",
        "Accuracy",
        "AP of the student after each epoch; dotted lines are cuts, shaded epochs cuts that were taken back, a dashed "
        "line is the teacher.",
    ),
    Picture("classes", "Accuracy", "AP of each class: what the cuts cost it, and what it won back."),
    Picture("precision", "Accuracy", "Precision at each recall, mean over the classes, at two overlaps."),
    Picture(
        "tradeoff", "Cost", "What the accuracy costs; the line goes from the uncut student over each cut to the last."
    ),
    Picture("cost", "Cost", "What is left of the student, as a share of what it was before any cut."),
    Picture("widths", "Cost", "Channels of coupled layers before any cut and now; the number is what is left."),
    Picture("width_course", "Cost", "Channels left of each group of layers while the run went on."),
    Picture("losses", "Training", "Each loss as it enters the sum, weight included; every one on its own scale."),
    Picture("rate", "Training", "The learning rate after each epoch; in the first steps after a cut it ramps up."),
    Picture("mosaic", "What they see", "Validation images: the truth, and detections with a score of 0.3 or more."),
    Picture("attention", "What they see", "Where the pyramid is active: the mean of |feature| over the channels."),
    Picture(BATCH, "What they see", "The first training batch as the network gets it, with the boxes it is taught."),
)


def draw_run(run: RunFolder) -> list[str]:
    """Draws everything that the folder holds the numbers for, and the page that shows it.

    Returns:
        A line for each picture that could not be drawn; the others are there.
    """
    run.pictures.mkdir(exist_ok=True)
    course, problems = Course.read(run), []
    with styled():
        for name, draw in _drawings(run, course):
            try:
                save_picture(run, name, draw())
            except Exception as error:  # noqa: PERF203, what goes wrong with one leaves the others
                problems.append(f"{name}: {first_line(error)}")
    there = [picture for picture in PICTURES if (run.pictures / f"{picture.name}.png").is_file()]
    write_page(run, course, there)
    return problems


def _drawings(run: RunFolder, course: Course) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    yield "ap", lambda: charts.draw_ap(course)
    yield "classes", lambda: charts.draw_classes(course)
    yield "precision", lambda: charts.draw_precision(course)
    yield "tradeoff", lambda: charts.draw_tradeoff(course)
    yield "cost", lambda: charts.draw_cost(course)
    yield "widths", lambda: charts.draw_widths(read_widths(run))
    yield "width_course", lambda: charts.draw_width_course(course)
    yield "losses", lambda: charts.draw_losses(course)
    yield "rate", lambda: charts.draw_rate(course)
    if (run.pictures / SCENES).is_file():
        yield "mosaic", lambda: sheets.draw_mosaic(*read_scenes(run.pictures / SCENES))
        yield "attention", lambda: sheets.draw_attention(read_scenes(run.pictures / SCENES)[0])


def save_picture(run: RunFolder, name: str, figure: Figure | None) -> None:
    """Writes a picture, or removes an older one where there is nothing to show now."""
    file = run.pictures / f"{name}.png"
    if figure is None:
        file.unlink(missing_ok=True)
    else:
        write_file(file, to_png(figure))


def keep_scenes(run: RunFolder, scenes: list[Scene], class_names: list[str]) -> None:
    """Puts what detectors see where `draw_run` finds it."""
    staged = run.pictures / f".{SCENES}"
    np.savez_compressed(staged, **pack(scenes, class_names))
    staged.replace(run.pictures / SCENES)


def keep_widths(run: RunFolder, student: Detector) -> None:
    """Likewise the student's widths."""
    widths = [asdict(width) for width in group_widths(student)]
    write_file(run.pictures / WIDTHS, json.dumps(widths) + "\n")


def read_widths(run: RunFolder) -> list[Width]:
    """The widths that were kept; none where there are none."""
    file = run.pictures / WIDTHS
    widths = json.loads(file.read_text()) if file.is_file() else []
    return [Width(tuple(width["layers"]), width["before"], width["after"]) for width in widths]


def first_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
