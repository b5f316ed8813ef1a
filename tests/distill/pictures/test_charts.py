import numpy as np
import pytest

from distill.pictures import charts
from distill.pictures.course import Course
from distill.pictures.style import CUT, STUDENT, TEACHER, styled, to_png
from distill.pictures.widths import Width
from distill.run_folder import RunFolder


@pytest.fixture(autouse=True)
def style():
    with styled():
        yield


def cuts_marked(axes):
    return [line.get_xdata()[0] for line in axes.lines if line.get_gid() == "cut"]


def line(axes, color, style="-"):
    (found,) = [x for x in axes.lines if x.get_color() == color and x.get_linestyle() == style and x.get_gid() is None]
    return list(found.get_xdata()), list(found.get_ydata())


def labels(figure):
    return [text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text")) if text.get_text()]


def test_ap_with_the_teacher_and_every_cut(run):
    (axes,) = charts.draw_ap(Course.read(run)).axes
    assert cuts_marked(axes) == [2, 3]
    assert line(axes, STUDENT) == ([1, 2, 3, 4, 5], [0.1, 0.4, 0.3, 0.35, 0.45])
    assert line(axes, TEACHER, "--")[1] == [0.5, 0.5]
    assert line(axes, STUDENT, "None") == ([2, 3], [0.2, 0.25])  # right after a cut
    assert axes.get_xlim() == (0, 6)  # the epoch that is still to come too


def test_every_loss_has_a_panel_with_the_cuts(run):
    panels = charts.draw_losses(Course.read(run)).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["task", "soft label"]
    assert [cuts_marked(panel) for panel in panels] == [[2, 3], [2, 3]]
    assert panels[1].lines[-1].get_ydata().tolist() == [1.0, 0.8, 0.9, 0.7, 0.6]


def test_a_loss_that_was_no_number_is_drawn(run):
    run.append_result({"epoch": 6, "task": float("nan"), "macs": 500, "ap": 0.1, "macs_left": 0.5})
    assert to_png(charts.draw_losses(Course.read(run)))


def test_rate(run):
    (axes,) = charts.draw_rate(Course.read(run)).axes
    assert line(axes, STUDENT) == ([1, 2, 3, 4, 5], [0.001] * 5)


def test_what_is_left_starts_whole_and_ends_at_the_latency_that_was_measured(finished):
    (axes,) = charts.draw_cost(Course.read(finished)).axes
    assert line(axes, STUDENT) == ([0, 1, 2, 3, 4, 5], [1.0, 1.0, 1.0, 0.7, 0.5, 0.5])
    assert line(axes, CUT, "--")[1] == [0.5, 0.5]  # the target
    (latency,) = [x for x in axes.lines if x.get_marker() == "D"]
    assert [*zip(latency.get_xdata(), latency.get_ydata())] == [(2, 0.8), (3, 0.5)]  # 8 and 5 of 10 ms, after each cut


def test_widths_before_and_after():
    widths = [Width(("backbone.conv1",), 64, 40), Width(("neck.a", "neck.b"), 96, 24)]
    figure = charts.draw_widths(widths)
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [64, 96, 40, 24]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["backbone.conv1", "neck.a +1"]


def test_of_too_many_widths_those_cut_most_are_shown():
    widths = [Width((f"layer{i}",), 100, 100 - i) for i in range(charts.MOST_WIDTHS + 5)]
    figure = charts.draw_widths(widths)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [f"layer{i}" for i in range(5, 65)]
    assert "Channels of each group, 60 of 65, those cut most" in labels(figure)


def test_ap_against_macs_and_against_latency(finished):
    figure = charts.draw_tradeoff(Course.read(finished))
    macs, latency = figure.axes
    assert line(macs, STUDENT)[0] == [1000, 700, 500] and line(macs, STUDENT)[1] == [0.4, 0.3, 0.45]
    assert line(macs, TEACHER, "None") == ([4000], [0.5])  # its AP on val, as the student's here
    assert line(latency, STUDENT)[0] == [10.0, 8.0, 5.0] and line(latency, STUDENT)[1] == [0.4, 0.3, 0.45]
    assert line(latency, TEACHER, "None") == ([40.0], [0.5])
    assert latency.get_title(loc="left") == "AP on val against latency"


def test_latency_of_a_run_that_measured_none_between(finished):
    summary = finished.summary
    del summary["cuts"]
    finished.write_summary(summary)
    assert [(name, time) for name, time, _ in Course.read(finished).latencies] == [
        ("before cutting", 10.0),
        ("student", 5.0),
    ]


def test_classes(run):
    (axes,) = charts.draw_classes(Course.read(run)).axes
    series = {s.get_label(): s.get_offsets()[:, 0].tolist() for s in axes.collections}
    assert series == {"before the cuts": [0.5, 0.3], "an epoch after the last": [0.4, 0.2], "now": [0.6, 0.3]}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", "dog"]


def test_precision_of_all_three(finished):
    figure = charts.draw_precision(Course.read(finished))
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["IoU 0.50", "IoU 0.75"]
    for panel, part in zip(figure.axes, (1.0, 0.5)):
        assert [x.get_ydata()[0] for x in panel.lines] == pytest.approx([0.6 * part, 0.42 * part, 0.5 * part])
        assert np.allclose(panel.lines[0].get_xdata(), np.arange(101) / 100)


def test_nothing_to_show(tmp_path):
    empty = Course.read(RunFolder.create(tmp_path / "run", {}, overwrite=False))
    for draw in (charts.draw_ap, charts.draw_losses, charts.draw_rate, charts.draw_cost, charts.draw_tradeoff,
                 charts.draw_classes, charts.draw_precision):  # fmt: skip
        assert draw(empty) is None, draw
    assert charts.draw_widths([]) is None


def test_layers_of_blocks_leave_their_groups(run):
    groups = [{"layers": ["stem", "b.0.conv2", "b.1.conv2"], "width": 8}, {"layers": ["b.0.conv1"], "width": 4}]
    lost = {"layers": ["stem", "b.1.conv2"], "before": 8, "after": 6, "kept": 2.0, "removed": 1.0, "macs_saved": 9}
    block = {"name": "b.0", "importance": 0.1, "macs_saved": 9}
    cuts = [{"epoch": 2, "left": 0.8, "blocks": [block], "groups": [lost]}]
    run.write_pruning({"groups": groups, "cuts": cuts, "retreats": []})
    course = Course.read(run)
    assert [(group.layers, group.widths) for group in course.groups] == [
        (("stem", "b.1.conv2"), ((0, 8), (2, 6))),
        (("b.0.conv1",), ((0, 4), (2, 0))),
    ]


def test_widths_over_the_epochs_and_epochs_that_were_taken_back(run):
    course = Course.read(run)
    assert [(group.layers, group.widths, group.macs_saved) for group in course.groups] == [
        (("stem", "add"), ((0, 32), (2, 24), (3, 8)), 500),
        (("tower",), ((0, 16),), 0),
    ]
    axes = charts.draw_width_course(course).axes[0]
    # of the one group that was cut: whole, then 24 of 32, then 8
    assert axes.collections[0].get_array().reshape(-1).tolist() == [1, 1, 0.75, 0.25, 0.25, 0.25]
    (shaded,) = [patch for patch in charts.draw_ap(course).axes[0].patches if patch.get_gid() == "retreat"]
    assert (shaded.get_x(), shaded.get_x() + shaded.get_width()) == (3, 5)
    run.write_pruning({"groups": [], "cuts": [], "retreats": [], "whole": {}})
    assert charts.draw_width_course(Course.read(run)) is None
