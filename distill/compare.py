"""Finished runs side by side: a table and a picture; seeds of one config are one row, with 95% intervals.

python -m distill.compare runs/half0 runs/half1 runs/plain0 runs/plain1
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.stats import t as student_t

from distill.errors import UserError
from distill.pictures.course import Course
from distill.pictures.style import SERIES, new_chart, styled, to_png, whole_epochs
from distill.report import Report, human_ap, human_count, human_macs, human_share
from distill.run_folder import CONFIG, RunFolder, write_file

SAME_EXPERIMENT = ("seed", "output_dir", "overwrite", "tracking")  # settings that do not make another one


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and how far the true one may be from it at 95% confidence (Student's t); None of one seed."""

    mean: float
    margin: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        if len(values) < 2:
            return cls(values[0], None)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), float(student_t.ppf(0.975, len(values) - 1)) * error)

    def __str__(self) -> str:
        return human_ap(self.mean) + (f" ± {self.margin:.3f}" if self.margin is not None else "")


@dataclass(frozen=True)
class Experiment:
    """Finished runs of one config, which differ by their seeds.

    Attributes:
        names: of the runs.
        settings: those that they share.
        courses: one a run.
    """

    names: list[str]
    settings: dict[str, Any]
    courses: list[Course]

    @property
    def title(self) -> str:
        return ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")

    def values(self, key: str) -> list[float]:
        """A number of the students, one a run; those that could not measure it are left out."""
        return [value for course in self.courses if (value := course.entry("student").get(key)) is not None]

    def estimate(self, key: str) -> Estimate | None:
        values = self.values(key)
        return Estimate.of(values) if values else None

    def of_teacher(self) -> float | None:
        """The students' AP as a share of their teachers', on average."""
        pairs = [(c.entry("student").get("ap"), c.entry("teacher").get("ap")) for c in self.courses]
        shares = [student / teacher for student, teacher in pairs if student is not None and teacher]
        return statistics.fmean(shares) if shares else None


def group_runs(runs: list[RunFolder]) -> list[Experiment]:
    """Runs by their config, in the order in which they are given; a folder that is given twice is one run.

    A run that was given the teacher of another one among them has the same config as that one, which trained it.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())
    teachers = {run.teacher().resolve() for run in runs}
    experiments: dict[str, Experiment] = {}
    for run in runs:
        course = Course.read(run)
        settings = {key: value for key, value in course.config.items() if key not in SAME_EXPERIMENT}
        teacher = settings.get("teacher") or {}
        if teacher.get("path") and Path(teacher["path"]).resolve() in teachers:
            settings["teacher"] = {**teacher, "path": None}
        experiment = experiments.setdefault(json.dumps(settings, sort_keys=True), Experiment([], settings, []))
        experiment.names.append(run.path.resolve().name)
        experiment.courses.append(course)
    return list(experiments.values())


def compare_table(experiments: list[Experiment]) -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Columns and rows of the table."""
    rows = []
    for experiment in experiments:
        scores = [experiment.estimate(key) for key in ("ap", "ap50", "ap75")]
        params, macs, latency = (experiment.estimate(key) for key in ("params", "macs", "latency_ms"))
        rows.append(
            [
                experiment.title,
                str(len(experiment.names)),
                *(None if score is None else str(score) for score in scores),
                human_share(experiment.of_teacher()),
                human_count(params and round(params.mean)),
                human_macs(macs and round(macs.mean)),
                f"{latency.mean:.1f} ms" if latency else None,
            ]
        )
    return ("", "seeds", "AP", "AP50", "AP75", "of teacher", "params", "MACs", "latency"), rows


def differences(settings: Sequence[Any], path: str = "") -> list[list[str]]:
    """For each setting that differs, its path and its value on each side.

    A section that one side does not have is one row: '-' there, elsewhere its name, or 'given' if it has none.

    Args:
        settings: what stands at `path`, one a side.
        path: dotted.
    """
    if all(isinstance(side, Mapping) for side in settings):
        keys = dict.fromkeys(key for side in settings for key in side)
        return [row for key in keys for row in differences([side.get(key) for side in settings], f"{path}.{key}")]
    if all(side == settings[0] for side in settings):
        return []
    return [[path.removeprefix("."), *map(_shown, settings)]]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("name", "given"))
    return "-" if value is None else str(value)


def draw_comparison(experiments: list[Experiment]) -> Figure:
    """AP against MACs with intervals, and AP over the epochs, the mean and the range of the seeds."""
    figure = new_chart(5.6 + 0.17 * len(experiments), 2, 1)
    cost, course = figure.axes
    for number, experiment in enumerate(experiments):
        look = {"color": SERIES[number % len(SERIES)]}
        ap, macs = experiment.estimate("ap"), experiment.estimate("macs")
        if ap and macs:
            cost.errorbar(
                macs.mean, ap.mean, yerr=ap.margin, fmt="osD^vP*"[number % 7], capsize=4, label=experiment.title, **look
            )
        epochs = sorted(set.intersection(*(set(c.epochs) for c in experiment.courses)))
        lines = np.array([[row["ap"] for row in c.rows if row["epoch"] in epochs] for c in experiment.courses], float)
        if len(epochs) > 0:
            course.plot(epochs, lines.mean(axis=0), "o"[len(epochs) > 1 :] or "-", **look)
            course.fill_between(epochs, lines.min(axis=0), lines.max(axis=0), alpha=0.2, linewidth=0, **look)
    cost.set(title="AP against MACs, 95% intervals", xlabel="MACs of one image", ylabel="AP")
    cost.set_xlim(left=0)
    cost.margins(0.15, 0.2)
    cost.xaxis.set_major_locator(MaxNLocator(nbins=6))
    cost.xaxis.set_major_formatter(FuncFormatter(lambda macs, _: human_macs(macs).replace(".00", "")))
    course.set(title="AP on val: mean and range of the seeds", ylim=(0, None))
    whole_epochs(course, max(c.total_epochs for experiment in experiments for c in experiment.courses))
    figure.legend(*cost.get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--picture", metavar="FILE", default="comparison.png", help="where to draw to")
    args = parser.parse_args()
    report = Report()
    try:
        compare([RunFolder(path) for path in args.runs], Path(args.picture), report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(runs: list[RunFolder], picture: Path, report: Report) -> None:
    """Prints the tables and draws the picture.

    Raises:
        UserError: a folder is no run, no run is finished, or there is no folder for the picture.
    """
    for run in runs:
        if not run.config_file.is_file():
            raise UserError(f"{run.path}: holds no run: no {CONFIG}; give folders of runs, such as runs/bccd")
        if not run.is_finished:
            report.warn(f"{run.path} is not finished and is left out")
    finished = [run for run in runs if run.is_finished]
    if not finished:
        raise UserError("none of these runs is finished; go on with them by train.py --resume RUN")
    if not picture.parent.is_dir():
        raise UserError(f"--picture: there is no folder {picture.parent}; make it first")
    experiments = group_runs(finished)
    splits = sorted({str(course.summary.get("split")) for e in experiments for course in e.courses})
    report.table(f"on {', '.join(splits)}; ± is a 95% interval of the mean", *compare_table(experiments))
    different = differences([experiment.settings for experiment in experiments])
    if different:
        report.table("what differs", ("", *(experiment.title for experiment in experiments)), different)
    with styled():
        write_file(picture, to_png(draw_comparison(experiments)))
    report.say(f"drawn: {picture}")


if __name__ == "__main__":
    sys.exit(main())
