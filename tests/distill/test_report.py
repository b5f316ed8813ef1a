import io
import re
import sys

import pytest

from distill.report import (
    HEADING_EVERY,
    Report,
    human_ap,
    human_count,
    human_duration,
    human_loss,
    human_macs,
    human_share,
)

ROW = {
    "epoch": "3/40", "task": 1.2344, "soft_label": 0.312, "feature_mimic": 0.0123, "fpn_attention": 12.34,
    "macs_left": 0.75, "AP": 0.5432, "AP50": None, "teacher_share": 0.961, "lr": 1e-3, "epoch_time": 65.2,
    "time_left": 2405.0,
}  # fmt: skip


class Terminal(io.StringIO):
    """Standard output that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue()).splitlines()


@pytest.fixture
def terminal(monkeypatch):
    def make(width: int = 120) -> Terminal:
        out = Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(width))
        return out

    return make


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "shown, expected",
    [
        (human_count(3_400_000), "3.40M"),
        (human_count(999), "999"),
        (human_count(1234), "1.23K"),
        (human_count(999_999), "1.00M"),
        (human_count(2_000_000_000), "2.00B"),
        (human_count(None), "-"),
        (human_macs(1_250_000_000), "1.25G"),
        (human_macs(3.2e15), "3200.00T"),
        (human_duration(0), "0s"),
        (human_duration(-3), "0s"),
        (human_duration(4.21), "4.2s"),
        (human_duration(9.97), "10s"),
        (human_duration(59.7), "1m00s"),
        (human_duration(65.2), "1m05s"),
        (human_duration(3599.8), "1h00m"),
        (human_duration(7500), "2h05m"),
        (human_duration(100_000), "1d03h"),
        (human_duration(float("inf")), "-"),
        (human_duration(None), "-"),
        (human_share(0.5), "50%"),
        (human_share(1.034), "103%"),
        (human_share(91.95), ">999%"),
        (human_ap(0.5432), "0.543"),
        (human_loss(0.51234), "0.512"),
        (human_loss(0.0), "0.000"),
        (human_loss(3.21e-5), "3.2e-05"),
        (human_loss(12345.6), "1.2e+04"),
        (human_loss(float("nan")), "nan"),
    ],
)
def test_human_formats(shown, expected):
    assert shown == expected


def test_epoch_row_off_a_terminal_is_aligned_plain_text(capsys):
    Report().epoch_row(ROW)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "                     soft  feature        fpn  MACs                     of            epoch    time",
        "  epoch     task    label    mimic  attention  left     AP   AP50  teacher       lr    time    left",
        "   3/40    1.234    0.312    0.012     12.340   75%  0.543      -      96%  1.0e-03   1m05s  40m05s",
    ]


def test_rows_stay_aligned_whatever_the_values(capsys):
    report = Report()
    extreme = {**ROW, "epoch": "39/40", "task": float("nan"), "soft_label": 1.2e9, "macs_left": 1.0, "AP": None,
               "teacher_share": None, "lr": 1.25e-7, "epoch_time": 0.4, "time_left": 99 * 86400}  # fmt: skip
    for row in (ROW, extreme, ROW):
        report.epoch_row(row)
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3  # one heading
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 120


def test_value_wider_than_its_column_widens_it_below_a_new_heading(capsys):
    report = Report()
    for epoch in ("99/1000", "100/1000", "101/1000", "9/1000"):
        report.epoch_row({"epoch": epoch, "AP": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "", "  epoch     AP", "99/1000  0.500",
        "", "   epoch     AP", "100/1000  0.500", "101/1000  0.500", "  9/1000  0.500",
    ]  # fmt: skip


def test_heading_comes_back_every_20_rows_and_with_other_columns(capsys):
    report = Report()
    for epoch in range(HEADING_EVERY + 2):
        report.epoch_row({"epoch": epoch, "task": 1.0})
    report.epoch_row({"epoch": 22, "task": 1.0, "soft_label": 0.5})
    report.epoch_row({"epoch": 23, "soft_label": 0.5, "task": 1.0})
    lines = capsys.readouterr().out.splitlines()
    headings = [index for index, line in enumerate(lines) if "epoch" in line]
    assert headings == [1, 1 + 20 + 2, 1 + 20 + 2 + 2 + 3, 1 + 20 + 2 + 2 + 3 + 4]
    assert lines[headings[3] :] == ["  epoch    label     task", "     23    0.500    1.000"]


def test_terminal_shows_the_same_rows_as_a_pipe(terminal, capsys):
    Report().epoch_row(ROW)
    plain = capsys.readouterr().out.splitlines()
    out = terminal(width=120)
    Report().epoch_row(ROW)
    assert out.lines() == plain
    assert "\x1b[" in out.getvalue()


def test_narrow_terminal_leaves_out_what_matters_least(terminal):
    out = terminal(width=80)
    Report().epoch_row(ROW)
    _, _, heading, row = out.lines()
    assert heading.split() == ["epoch", "task", "label", "mimic", "attention", "left", "AP", "teacher", "left"]
    assert len(heading) == len(row) <= 80


def test_lines_on_a_terminal_can_be_copied_whole(terminal):
    out = terminal(width=40)
    Report().say("student: " + "runs/a folder/" * 10)
    assert out.lines() == ["student: " + "runs/a folder/" * 10]


def test_nothing_is_wrapped_cut_or_coloured_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "x" * 300
    report = Report()
    report.say(long)
    report.warn(long)
    report.banner(long, {"Output": long})
    report.table(long, ["", long], [["teacher", long]])
    report.epoch_row(ROW)
    with report.progress(2, "epoch 1/2") as progress:
        progress.advance({"task": 1.0})
        progress.advance()
    out = capsys.readouterr().out
    assert out.count(long) == 7
    assert "\x1b" not in out and "\r" not in out
    assert "epoch 1/2" not in out


def test_letters_that_standard_output_cannot_show_do_not_end_a_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    Report().say("distill · 50%")
    assert raw.getvalue() == b"distill ? 50%\n"


BRACKETS = "[240, 320] [bold]x[/bold] [/data/x] :smile: \\[y]"


def test_brackets_come_out_as_they_are(terminal):
    out = terminal()
    report = Report()
    report.say(f"1 {BRACKETS}")
    report.warn(f"2 {BRACKETS}")
    report.banner(f"3 {BRACKETS}", {f"4 {BRACKETS}": f"5 {BRACKETS}"})
    report.table(f"6 {BRACKETS}", ["", f"7 {BRACKETS}"], [["a", f"8 {BRACKETS}"]])
    with report.progress(1, f"9 {BRACKETS}") as progress:
        progress.advance()
    shown = "\n".join(out.lines())
    for number in range(1, 10):
        assert f"{number} {BRACKETS}" in shown


def test_rows_of_several_lines_stay_in_their_column(capsys):
    Report().banner("distill", {"Devices": "cpu", "Levels": "a: P3\nb: P4"})
    assert capsys.readouterr().out == "distill\nDevices   cpu\nLevels    a: P3\n          b: P4\n"


def test_banner(capsys):
    Report().banner("distill · configs/bccd.yaml", {"Devices": "2 x CPU", "Distillation": "soft_label x 1.0"})
    assert capsys.readouterr().out.splitlines() == [
        "distill · configs/bccd.yaml",
        "Devices        2 x CPU",
        "Distillation   soft_label x 1.0",
    ]


TABLE = (
    "On 87 images",
    ["", "AP", "params"],
    [["teacher", "0.612", "32.10M"], ["student before", None, "9.90M"], ["", "0.1", ""]],
)


def test_table_off_a_terminal(capsys):
    Report().table(*TABLE)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "On 87 images",
        "                   AP  params",
        "--------------  -----  ------",
        "teacher         0.612  32.10M",
        "student before      -   9.90M",
        "                  0.1",
        "",
    ]


def test_table_on_a_terminal_is_aligned_too(terminal):
    out = terminal()
    Report().table(*TABLE)
    _, title, heading, rule, teacher, student, _, _ = out.lines()
    assert title == "On 87 images"
    assert set(rule) == {"─"}
    assert teacher.index("0.612") + 5 == heading.index("AP") + 2
    assert len(teacher.rstrip()) == len(student.rstrip()) == len(heading.rstrip())
    assert student.split() == ["student", "before", "-", "9.90M"]


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(AssertionError, match="one cell a column"):
        Report().table("", ["", "AP"], [["teacher"]])


@pytest.mark.parametrize("on_terminal", [False, True])
def test_log_has_every_line_plain_and_dated(tmp_path, terminal, on_terminal):
    log = tmp_path / "train.log"
    if on_terminal:
        terminal(width=200)
    report = Report(log)
    report.banner("distill", {"Data": "bccd [3 classes]"})
    report.warn("slow disk")
    report.epoch_row({"epoch": "1/2", "AP": 0.5})
    report.table("Result", ["", "AP"], [["teacher", "0.6"]])
    Report(log).say("resumed")
    stamp = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
    lines = log.read_text().splitlines()
    assert all(stamp.match(line) for line in lines)
    assert [stamp.sub("", line) for line in lines] == [
        "distill",
        "Data   bccd [3 classes]",
        "warning: slow disk",
        "  epoch     AP",
        "    1/2  0.500",
        "Result",
        "          AP",
        "-------  ---",
        "teacher  0.6",
        "resumed",
    ]


def test_disabled_report_is_silent(tmp_path, terminal):
    out = terminal()
    report = Report(tmp_path / "train.log", enabled=False)
    report.banner("distill", {"a": "b"})
    report.warn("x")
    report.epoch_row(ROW)
    report.table(*TABLE)
    with report.progress(1, "epoch 1/1") as progress:
        progress.advance({"task": 1.0})
    assert out.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_long_epoch_off_a_terminal_gives_a_line_every_half_minute(capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("distill.report.monotonic", clock)
    with Report().progress(12, "epoch 3/40") as progress:
        for step in range(12):
            clock.now += 10
            progress.advance({"task": float(step), "soft_label": 0.5} if step % 2 == 0 else None)
    assert capsys.readouterr().out.splitlines() == [
        "epoch 3/40 · 3/12 · 10.0 s/it · loss 1.500 · 1m30s left",
        "epoch 3/40 · 6/12 · 10.0 s/it · loss 2.500 · 1m00s left",
        "epoch 3/40 · 9/12 · 10.0 s/it · loss 4.500 · 30s left",
        "epoch 3/40 · 12/12 · 10.0 s/it · loss 5.500 · 0s left",
    ]


def test_live_bar_shows_the_epoch_and_is_gone_after_it(terminal, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("distill.report.monotonic", clock)
    out = terminal()
    report = Report(tmp_path / "train.log")
    with report.progress(4, "epoch 1/2") as progress:
        for _ in range(2):
            clock.now += 0.5
            progress.advance({"task": 1.0, "soft_label": 0.25})
        report.say("in between")
    assert "epoch 1/2 ━" in out.getvalue().replace("\x1b[36m", "")
    assert any("2/4 · 2.0 it/s · loss 1.250 · 1.0s left" in line for line in out.lines())
    assert "in between" in [line.strip() for line in out.lines()]
    assert out.getvalue().endswith("\x1b[2K")  # the last thing that happens to the bar's line: it is erased
    assert [line[21:] for line in (tmp_path / "train.log").read_text().splitlines()] == ["in between"]


def test_live_bar_gives_the_terminal_back_when_training_fails(terminal):
    out = terminal()
    with pytest.raises(RuntimeError), Report().progress(4, "epoch 1/2"):
        raise RuntimeError
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # cursor hidden, shown again
