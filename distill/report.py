"""What a user sees of a run: lines, a live bar, one row an epoch, and a table at the end."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

HEADING_EVERY = 20  # rows
HEARTBEAT = 30.0  # seconds between two signs of life where there is no live bar
SPARE_COLUMNS = ("lr", "epoch_time", "AP75", "AP50", "macs_left", "teacher_share")  # first to go on a narrow terminal


def counted(number: int, thing: str) -> str:
    """Such as '1 epoch' and '2 epochs'."""
    return f"{number} {thing}{'s' * (number != 1)}"


def human_count(number: float | None) -> str:
    """3_400_000 -> '3.40M'; for parameters, images and the like."""
    return _scaled(number, ("", "K", "M", "B", "T"))


def human_macs(number: float | None) -> str:
    """1_250_000_000 -> '1.25G'."""
    return _scaled(number, ("", "K", "M", "G", "T"))


def human_duration(seconds: float | None) -> str:
    """4.21 -> '4.2s', 65 -> '1m05s', 7500 -> '2h05m', 100_000 -> '1d03h': six characters up to 100 days."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 0.05:
        return "0s"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def human_milliseconds(latency: float | None) -> str:
    """4.21 -> '4.2 ms'."""
    return "-" if latency is None else f"{latency:.1f} ms"


def human_share(fraction: float | None) -> str:
    """0.5 -> '50%'; of what is next to nothing, such as an untrained teacher's AP, '>999%'."""
    if fraction is None:
        return "-"
    return f"{fraction:.0%}" if fraction < 10 else ">999%"


def human_ap(ap: float | None) -> str:
    """0.5432 -> '0.543'."""
    return "-" if ap is None else f"{ap:.3f}"


def human_loss(loss: float | None) -> str:
    """0.51234 -> '0.512'; very small and very large ones as '3.2e-05' and '1.2e+04'."""
    if loss is None:
        return "-"
    readable = loss == 0 or 0.001 <= abs(loss) < 1000 or not math.isfinite(loss)
    return f"{loss:.3f}" if readable else f"{loss:.1e}"


def _scaled(number: float | None, units: Sequence[str]) -> str:
    if number is None:
        return "-"
    if abs(number) < 1000:
        return f"{number:g}"
    power = 0
    while abs(number) >= 999.995 and power < len(units) - 1:  # what would round to 1000.00 takes the next unit
        number, power = number / 1000, power + 1
    return f"{number:.2f}{units[power]}"


def _as_is(value: float | int | str | None) -> str:
    return human_loss(value) if value is None or isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Column:
    """How one value of an epoch's row is shown; the title's last word stands on the heading's second line."""

    title: str
    width: int
    show: Callable[[Any], str]
    style: str = ""


_COLUMNS = {
    "epoch": _Column("epoch", 7, _as_is),
    "macs_left": _Column("MACs left", 4, human_share),
    "AP": _Column("AP", 5, human_ap, "bold"),
    "AP50": _Column("AP50", 5, human_ap),
    "AP75": _Column("AP75", 5, human_ap),
    "teacher_share": _Column("of teacher", 4, human_share),
    "lr": _Column("lr", 7, lambda lr: "-" if lr is None else f"{lr:.1e}", "dim"),
    "epoch_time": _Column("epoch time", 6, human_duration, "dim"),
    "time_left": _Column("time left", 6, human_duration, "dim"),
}


def _column(key: str) -> _Column:
    """The named column, or that of a loss: any other name is one."""
    return _COLUMNS.get(key) or _Column(key.replace("_", " "), 7, _as_is)


class StepProgress:
    """Counts the steps of one epoch; `Report.progress` makes it."""

    def __init__(self, total: int, label: str, say: Callable[[str], None], bar: Progress | None) -> None:
        self._total, self._label, self._say, self._bar = total, label, say, bar
        self._task: TaskID | None = bar.add_task(label, total=total, status="") if bar else None
        self._done = 0
        self._loss_sum, self._num_losses = 0.0, 0
        self._start = self._last_said = monotonic()

    def advance(self, losses: Mapping[str, float] | None = None) -> None:
        """One step is done.

        Args:
            losses: its weighted terms. What is shown is the mean of their sum over the epoch so far, as the epoch's row
                will have it. Steps may go without, for reading a loss makes the device wait.
        """
        self._done += 1
        if losses is not None:
            self._loss_sum += sum(losses.values())
            self._num_losses += 1
        now = monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, status=self._status(now))
        elif now - self._last_said >= HEARTBEAT:
            self._last_said = now
            self._say(f"{self._label} · {self._status(now)}")

    def _status(self, now: float) -> str:
        seconds_a_step = max((now - self._start) / self._done, 1e-9)
        speed = f"{1 / seconds_a_step:.1f} it/s" if seconds_a_step <= 1 else f"{seconds_a_step:.1f} s/it"
        parts = [f"{self._done}/{self._total}", speed]
        if self._num_losses:
            parts.append(f"loss {human_loss(self._loss_sum / self._num_losses)}")
        parts.append(f"{human_duration(seconds_a_step * max(self._total - self._done, 0))} left")
        return " · ".join(parts)


class Report:
    """Tells the user what a run does, on standard output and, with timestamps, in a log file.

    A terminal gets colour and a live bar; a pipe or a file gets the same lines as plain text, never wrapped or cut.
    """

    def __init__(self, log_file: Path | None = None, enabled: bool = True) -> None:
        """Prepares a report; nothing is printed or opened yet.

        Args:
            log_file: every line is appended here too, so that a resumed run goes on in the same log.
            enabled: False on all ranks but 0: the report then neither prints nor writes.
        """
        self._enabled = enabled
        self._log_file = log_file
        # a terminal that has no letters for the bar is served like a pipe
        fancy = sys.stdout.isatty() and (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        self._console = Console(highlight=False) if fancy else None
        self._layout: dict[str, int] = {}  # key -> width of the column, as the last heading announced them
        self._rows_since_heading = 0

    def say(self, message: str) -> None:
        """One line."""
        self._print(message)

    def warn(self, message: str) -> None:
        """One line that stands out."""
        self._print(Text(f"warning: {message}", style="yellow"))

    def banner(self, title: str, rows: Mapping[str, str]) -> None:
        """The head of a run: what it is called, and what it is made of.

        Args:
            title: such as 'distill · configs/bccd.yaml'.
            rows: such as {'Teacher': 'resnet50, 36.3M parameters'}, in the order in which they are shown; of one line
                or more.
        """
        width = max(map(len, rows), default=0)
        grid = Table.grid(padding=(0, 3, 0, 0))
        for key, value in rows.items():
            grid.add_row(Text(key, style="dim"), Text(value))
        self._print(Text(title, style="bold"))
        indent = "\n" + " " * (width + 3)
        lines = (f"{key:<{width}}   {value}".replace("\n", indent) for key, value in rows.items())
        self._print("\n".join(lines), grid)

    @contextmanager
    def progress(self, total: int, label: str) -> Iterator[StepProgress]:
        """A live bar for the steps of one epoch, gone when the epoch is over.

        Off a terminal there is no bar; an epoch that takes long then gives a line every half minute.

        Args:
            total: steps to come.
            label: what they belong to, such as 'epoch 3/40'.
        """
        if self._console is None or not self._enabled:
            yield StepProgress(total, label, self.say, bar=None)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28, complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.fields[status]}", style="dim", markup=False),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            yield StepProgress(total, label, self.say, bar)

    def epoch_row(self, row: Mapping[str, float | int | str | None]) -> None:
        """One row of the epochs' table; a heading comes before the first, every 20, and where the columns change.

        A terminal too narrow for all columns gets those that fit; the results file has them all.

        Args:
            row: values by column, in the order in which they are shown. Known are `epoch` ('3/40'), `macs_left` (0-1),
                `AP`, `AP50`, `AP75`, `teacher_share` (the student's AP by the teacher's), `lr`, `epoch_time` and
                `time_left` (seconds); any other name is taken for a loss. None is shown as '-'.
        """
        columns = {key: _column(key) for key in row}
        cells = {key: columns[key].show(value) for key, value in row.items()}
        layout = {key: max(self._layout.get(key, 0), _title_width(columns[key]), len(cells[key])) for key in row}
        for spare in SPARE_COLUMNS:
            if self._console is not None and sum(layout.values()) + 2 * len(layout) - 2 > self._console.width:
                layout.pop(spare, None)
        if list(layout.items()) != list(self._layout.items()) or self._rows_since_heading == HEADING_EVERY:
            self._print_heading(columns, layout)
        self._rows_since_heading += 1
        self._print(Text("  ").join(Text(cells[key].rjust(layout[key]), columns[key].style) for key in layout))

    def _print_heading(self, columns: Mapping[str, _Column], layout: dict[str, int]) -> None:
        titles = {key: columns[key].title.rpartition(" ") for key in layout}
        self._print("")
        for part in (0, 2):
            line = "  ".join(titles[key][part].rjust(width) for key, width in layout.items())
            if line.strip():
                self._print(Text(line, style="dim"))
        self._layout, self._rows_since_heading = layout, 0

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
        """A table, such as the last one, which compares the student with its teacher.

        Args:
            title: stands above it.
            columns: their titles; the first column is set left, the others right.
            rows: one cell a column; None is shown as '-'.
        """
        cells = [["-" if cell is None else cell for cell in row] for row in rows]
        assert all(len(row) == len(columns) for row in cells), "a row needs one cell a column"
        widths = [max(map(len, column)) for column in zip(columns, *cells)]
        rule = ["-" * width for width in widths]
        plain = "\n".join(_aligned(row, widths) for row in (columns, rule, *cells))

        table = Table(box=box.SIMPLE_HEAD, header_style="dim", border_style="dim", show_edge=False, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if index else "left")
        for row in cells:
            table.add_row(*map(Text, row))

        self._print("")
        self._print(Text(title, style="bold"))
        self._print(plain, table)
        self._print("")

    def _print(self, text: Text | str, rich_form: RenderableType | None = None) -> None:
        """Prints lines and logs them.

        Nothing goes through rich as a string, for it would take '[240, 320]' or a path in brackets for its markup.
        """
        if not self._enabled:
            return
        plain = str(text)
        if self._console is None:
            encoding = sys.stdout.encoding or "utf-8"
            print(plain.encode(encoding, "replace").decode(encoding), flush=True)
        elif rich_form is not None:
            self._console.print(rich_form)
        else:
            self._console.print(text if isinstance(text, Text) else Text(text), soft_wrap=True)
        if self._log_file is not None and plain:
            now = datetime.now().isoformat(sep=" ", timespec="seconds")
            with self._log_file.open("a", encoding="utf-8") as log:
                log.writelines(f"{now}  {line}\n" for line in plain.splitlines())


def _title_width(column: _Column) -> int:
    top, _, bottom = column.title.rpartition(" ")
    return max(column.width, len(top), len(bottom))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(zip(cells, widths))
    )
    return "  ".join((first, *rest)).rstrip()
