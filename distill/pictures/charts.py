"""Charts of a run's course. Each takes numbers and gives a figure, or None where there is nothing to show."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from distill.pictures.course import Course
from distill.pictures.style import BEFORE, CUT, SERIES, STUDENT, TEACHER, new_chart, whole_epochs
from distill.pictures.widths import Width
from distill.report import human_ap, human_macs, human_share

MOST_CLASSES, MOST_WIDTHS = 20, 60


def draw_ap(course: Course) -> Figure | None:
    """AP over the epochs, with the teacher's, and each cut marked."""
    if not course.rows:
        return None
    figure = new_chart()
    (axes,) = figure.axes
    mark_cuts(axes, course)
    if course.teacher_ap is not None:
        axes.axhline(course.teacher_ap, color=TEACHER, linestyle="--", label=f"teacher {course.teacher_ap:.3f}")
    ap = course.column("ap")
    axes.plot(course.epochs, ap, color=STUDENT, marker=_dots(ap), label=f"student {human_ap(course.rows[-1]['ap'])}")
    right_after = [(cut.done, cut.ap_right_after) for cut in course.cuts if cut.ap_right_after is not None]
    if right_after:
        axes.plot(*zip(*right_after), "x", color=STUDENT, markersize=6, label="right after a cut")
    axes.set_title(f"AP on {_val(course)}")
    axes.set_ylim(bottom=0)
    whole_epochs(axes, course.total_epochs)
    axes.legend(loc="lower right")
    return figure


def mark_cuts(axes: Axes, course: Course) -> None:
    """A line for each cut; the last says what is left."""
    cuts = course.cuts
    for number, cut in enumerate(cuts):
        label = None if number else ("cut" if len(cuts) == 1 else f"{len(cuts)} cuts")
        axes.axvline(cut.done, color=CUT, linewidth=1, linestyle=":", label=label, gid="cut")
    for number, retreat in enumerate(course.retreats):
        label = None if number else "taken back"
        axes.axvspan(retreat["epoch"], retreat["until"], color=CUT, alpha=0.12, linewidth=0, label=label, gid="retreat")


def draw_losses(course: Course) -> Figure | None:
    """Every loss as it entered the sum, each on a scale of its own."""
    losses = course.losses
    if not losses:
        return None
    columns = 2
    rows = math.ceil(len(losses) / columns)
    figure = new_chart(1.35 * rows + 0.3, rows, columns, sharex=True)
    for number, axes in enumerate(figure.axes):
        if number >= len(losses):
            axes.remove()
            continue
        name, values = list(losses.items())[number]
        mark_cuts(axes, course)
        axes.plot(course.epochs, values, color=SERIES[number % len(SERIES)], marker=_dots(values))
        axes.set_title(name.replace("_", " "))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_ylim(bottom=min(0.0, *values) if all(map(math.isfinite, values)) else None)
        whole_epochs(axes, course.total_epochs)
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_xlabel("epochs done" if number >= len(losses) - columns else "")
    return figure


def draw_rate(course: Course) -> Figure | None:
    """The learning rate at the end of each epoch."""
    if not course.has("lr"):
        return None
    figure = new_chart(2.0)
    (axes,) = figure.axes
    mark_cuts(axes, course)
    axes.plot(course.epochs, course.column("lr"), color=STUDENT, marker=_dots(course.epochs))
    axes.set_title("Learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", scilimits=(0, 0))
    whole_epochs(axes, course.total_epochs)
    return figure


def draw_cost(course: Course) -> Figure | None:
    """What is left of the student: MACs, parameters, and after each cut that was timed latency."""
    if not course.cuts:
        return None
    figure = new_chart()
    (axes,) = figure.axes
    mark_cuts(axes, course)
    target = (course.config.get("pruning") or {}).get("target")
    if target:
        axes.axhline(target, color=CUT, linestyle="--", linewidth=1, label=f"target {human_share(target)}")
    kinds = (("MACs", course.macs_left, STUDENT, "-"), ("parameters", course.params_left, SERIES[4], "--"))
    for name, left, color, line in kinds:
        if not math.isnan(left[-1]):
            label = f"{name} {human_share(left[-1])}"
            x, y = [course.epochs[0] - 1, *course.epochs], [1.0, *left]
            axes.step(x, y, where="pre", color=color, linestyle=line, label=label)
    measured, uncut = course.milliseconds, course.entry("student_before").get("latency_ms")
    points = [(cut.done, measured[cut.macs] / uncut) for cut in course.cuts if uncut and cut.macs in measured]
    if points:
        label = f"latency {human_share(points[-1][1])}"
        axes.plot(*zip(*points), "D", color=SERIES[2], label=label, clip_on=False, zorder=3)
    axes.set_title("Left of the student")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    whole_epochs(axes, course.total_epochs)
    axes.legend(loc="lower left")
    return figure


def draw_widths(widths: list[Width]) -> Figure | None:
    """Channels of each group of layers before and after the cuts, in the order of the network."""
    if not widths:
        return None
    shown = widths
    if len(widths) > MOST_WIDTHS:
        most = sorted(widths, key=lambda w: w.after / w.before)[:MOST_WIDTHS]
        shown = [width for width in widths if width in most]
    figure = new_chart(0.75 + 0.17 * len(shown))
    (axes,) = figure.axes
    places = range(len(shown))
    axes.barh(places, [w.before for w in shown], 0.75, color=BEFORE, alpha=0.45, label="before")
    axes.barh(places, [w.after for w in shown], 0.75, color=STUDENT, label="after")
    far = max(w.before for w in shown)
    for place, width in zip(places, shown):
        axes.text(width.before + 0.015 * far, place, f"{width.after}", va="center", fontsize=6.5, color="#374151")
    axes.set_yticks(places, [_layers(width.layers) for width in shown], fontsize=6.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * far)
    axes.grid(axis="y", visible=False)
    few = f", {len(shown)} of {len(widths)}, those cut most" if len(shown) < len(widths) else ""
    figure.suptitle(f"Channels of each group{few}", x=0.01, ha="left", fontsize=9, fontweight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def draw_width_course(course: Course) -> Figure | None:
    """What is left of each group of layers, in shade, over the epochs."""
    cut = [group for group in course.groups if len(group.widths) > 1]
    if not cut:
        return None
    shown = [group for group in cut if group in sorted(cut, key=lambda group: group.left)[:MOST_WIDTHS]]
    last = max([course.total_epochs, *(epoch for group in shown for epoch, _ in group.widths)])
    shares = np.ones((len(shown), last))
    for row, group in enumerate(shown):
        for epoch, width in group.widths[1:]:
            shares[row, epoch:] = width / group.widths[0][1]
    figure = new_chart(0.75 + 0.17 * len(shown))
    (axes,) = figure.axes
    shades = axes.pcolormesh(np.arange(last + 1), np.arange(len(shown) + 1), shares, vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(np.arange(len(shown)) + 0.5, [_layers(group.layers) for group in shown], fontsize=6.5)
    axes.invert_yaxis()
    axes.grid(visible=False)
    whole_epochs(axes, course.total_epochs)
    bar = figure.colorbar(shades, ax=axes, fraction=0.03, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    few = f", {len(shown)} of {len(cut)} groups, those cut most" if len(shown) < len(cut) else ""
    figure.suptitle(f"Channels left over the epochs{few}", x=0.01, ha="left", fontsize=9, fontweight="bold")
    return figure


def draw_tradeoff(course: Course) -> Figure | None:
    """AP against MACs, from the uncut student over each cut to the last; and against latency where it was measured."""
    if not course.rows:
        return None
    panels = 2 if course.latencies else 1
    figure = new_chart(2.6 * panels, panels, 1)
    teacher = course.entry("teacher")
    _tradeoff(figure.axes[0], course, course.sizes, teacher.get("macs"))
    figure.axes[0].set_title(f"AP on {_val(course)} against MACs")
    figure.axes[0].set_xlabel("MACs of one image")
    figure.axes[0].xaxis.set_major_formatter(FuncFormatter(lambda macs, _: human_macs(macs).replace(".00", "")))
    if panels == 2:
        _tradeoff(figure.axes[1], course, course.latencies, teacher.get("latency_ms"))
        figure.axes[1].set_title(f"AP on {_val(course)} against latency")
        figure.axes[1].set_xlabel("milliseconds for one image, at the end")
    for axes in figure.axes:
        axes.margins(0.2, 0.25)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_ylabel("AP")
    return figure


def _tradeoff(
    axes: Axes, course: Course, points: list[tuple[str, float, float | None]], of_teacher: float | None
) -> None:
    """A line through what the student went through, (name, cost, AP) each, and the teacher beside it."""
    costs, ap = zip(*((x, np.nan if y is None else y) for _, x, y in points))
    axes.plot(costs, ap, "-o", color=STUDENT, markersize=4, linewidth=1)
    for name, x, y in points:
        if y is not None and not name.startswith("cut"):
            _point(axes, x, y, name, STUDENT if name == "student" else BEFORE)
    if course.teacher_ap is not None and of_teacher:
        _point(axes, of_teacher, course.teacher_ap, "teacher", TEACHER, "s")


def draw_classes(course: Course) -> Figure | None:
    """AP of each class: before the cuts, after them, and what was won back; and the teacher's, on the same split."""
    classes = [c for c in course.classes if c.end is not None]
    if not classes:
        return None
    shown = sorted(classes, key=lambda c: -c.lost)[:MOST_CLASSES]
    shown = [c for c in classes if c in shown]
    teacher = (course.entry("teacher").get("per_class") or {}) if course.measured_on_val else {}
    figure = new_chart(1.0 + 0.27 * len(shown))
    (axes,) = figure.axes
    places = list(range(len(shown)))
    for place, c in zip(places, shown):
        known = [x for x in (c.before, c.after, c.end) if x is not None]
        axes.plot([min(known), max(known)], [place, place], color="#D1D5DB", linewidth=3, zorder=1)
    series = (
        ("before the cuts", [c.before for c in shown], {"marker": "o", "color": BEFORE}),
        ("an epoch after the last", [c.after for c in shown], {"marker": "x", "color": CUT, "zorder": 4}),
        ("now", [c.end for c in shown], {"marker": "D", "color": STUDENT}),
        ("teacher", [teacher.get(c.name) for c in shown], {"marker": "|", "color": TEACHER, "s": 110}),
    )
    for label, values, look in series:
        points = [(value, place) for value, place in zip(values, places) if value is not None]
        if points:
            axes.scatter(*zip(*points), label=label, **{"zorder": 3, "s": 32} | look)
    axes.set_yticks(places, [c.name for c in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    few = f", the {len(shown)} of {len(classes)} that cuts cost most" if len(shown) < len(classes) else ""
    figure.suptitle(f"AP of each class on {_val(course)}{few}", x=0.01, ha="left", fontsize=9, fontweight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_precision(course: Course) -> Figure | None:
    """Precision at each recall, mean over the classes, at two strictnesses."""
    looks = {
        "teacher": ("teacher", TEACHER, "--"),
        "student_before": ("before cutting", BEFORE, "-."),
        "student": ("student", STUDENT, "-"),
    }
    curves = {name: course.entry(name).get("precision") for name in looks}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    figure = new_chart(2.6, 1, 2, sharey=True)
    for axes, iou in zip(figure.axes, ("0.50", "0.75")):
        for name, curve in curves.items():
            title, color, line = looks[name]
            values = np.array(curve[iou], float)
            axes.plot(np.linspace(0, 1, len(values)), values, line, color=color, label=f"{title}")
        axes.set_title(f"IoU {iou}")
        axes.set_xlabel("recall")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    figure.axes[0].set_ylabel("precision")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _val(course: Course) -> str:
    return str((course.config.get("data") or {}).get("val", "val"))


def _dots(values: list) -> str:
    """Few epochs are shown as points, many as a line alone."""
    return "o" if len(values) == 1 else ""


def _layers(layers: Sequence[str], longest: int = 26) -> str:
    first = layers[0]
    more = f" +{len(layers) - 1}" if len(layers) > 1 else ""
    return (first if len(first) <= longest else "…" + first[1 - longest :]) + more


def _point(axes: Axes, x: float, y: float, name: str, color: str, marker: str = "o") -> None:
    """A point with its name above it; where lines leave upwards, as from what is to be cut, to its right."""
    axes.plot(x, y, marker, color=color, markersize=7, zorder=3)
    place = {"xytext": (8, 0), "ha": "left", "va": "center"} if color == BEFORE else {"xytext": (0, 6), "ha": "center"}
    axes.annotate(f"{name}\n{y:.3f}", (x, y), textcoords="offset points", fontsize=8, **place)
