"""The output folder of a run: what lies where, who may write into it, and files that are whole or not there."""

import csv
import io
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import yaml

try:
    import fcntl
except ImportError:
    fcntl = None

from distill.errors import UserError
from distill.schema import TEACHER

CONFIG, RESULTS, SUMMARY, LOG = "config.yaml", "results.csv", "summary.json", "train.log"
CHECKPOINTS, STUDENT, TEACHERS, FAILURE = "checkpoints", "student", "teachers", "failure.json"
PRUNING, PRECISION, BEST, LOCK = "pruning.json", "precision.json", "best", ".lock"
PICTURES, REPORT, CARD, TRACKING = "pictures", "report.html", "README.md", "tracking"
# run folders of their own, where a run trains its teacher, or several, first
TEACHER_RUN, TEACHER_RUNS = "teacher_run", "teacher_runs"
OF_TEACHERS = (TEACHER, TEACHERS, TEACHER_RUN, TEACHER_RUNS)
# what overwriting removes, in this order; the config goes last, by being replaced: a folder is a run while it has one
REMOVED = (
    SUMMARY, RESULTS, LOG, FAILURE, PRUNING, PRECISION, CHECKPOINTS, PICTURES, REPORT, CARD, TRACKING, STUDENT,
    *OF_TEACHERS
)  # fmt: skip

# Other toolkits write config.yaml and checkpoints/ too. Only a folder whose config begins so may ever be overwritten.
SIGNATURE = "# the resolved config of a distill run"


_HELD: dict[Path, BinaryIO] = {}  # a lock lasts while its file is open


class RunFolder:
    """The output folder of one run.

    `RunFolder(path)` only names paths, as ranks other than 0 need them; `create` and `open` also check and prepare.
    Only one process may write. Every file is replaced as a whole, so a run that is killed leaves none half-written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / CONFIG

    @property
    def results_file(self) -> Path:
        return self.path / RESULTS

    @property
    def summary_file(self) -> Path:
        return self.path / SUMMARY

    @property
    def log_file(self) -> Path:
        return self.path / LOG

    @property
    def failure_file(self) -> Path:
        """Where a step that went wrong is written down."""
        return self.path / FAILURE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def pruning_file(self) -> Path:
        """What was cut, and what not; see `distill.pruning.account`."""
        return self.path / PRUNING

    @property
    def best(self) -> Path:
        """The best student within the budget so far, where a guard keeps it."""
        return self.checkpoints / BEST

    @property
    def student(self) -> Path:
        return self.path / STUDENT

    def teacher(self, name: str = TEACHER) -> Path:
        """A teacher that was trained first; one of several in a folder of its name."""
        return self.path / (TEACHER if name == TEACHER else f"{TEACHERS}/{name}")

    def teacher_run(self, name: str = TEACHER) -> Path:
        """The run that trained it."""
        return self.path / (TEACHER_RUN if name == TEACHER else f"{TEACHER_RUNS}/{name}")

    @property
    def outermost(self) -> Path:
        """What a user goes on with: of a run that trains a teacher, the folder of the run that it is trained for."""
        names = self.path.name, self.path.parent.name
        if names[0] == TEACHER_RUN:
            outer = self.path.parent
        elif names[1] == TEACHER_RUNS:
            outer = self.path.parent.parent
        else:
            return self.path
        return outer if (outer / CONFIG).is_file() else self.path

    @property
    def pictures(self) -> Path:
        return self.path / PICTURES

    @property
    def report_file(self) -> Path:
        return self.path / REPORT

    @property
    def card_file(self) -> Path:
        return self.path / CARD

    @property
    def tracking(self) -> Path:
        return self.path / TRACKING

    @classmethod
    def create(
        cls, path: str | Path, config: Mapping[str, Any], *, overwrite: bool, keep: Sequence[str] = ()
    ) -> "RunFolder":
        """Starts a new run.

        A folder of a run that stopped before its first checkpoint or result is taken without asking.

        Args:
            path: the folder; its parents are made too.
            config: the resolved config: dicts, lists, strings, numbers.
            overwrite: remove what an earlier run left here. What else lies in the folder is never touched.
            keep: names of what stays of an earlier run, such as 'teacher' when it is finished.

        Raises:
            UserError: the folder is a file, belongs to something else, or holds a run that may not be overwritten;
                nothing has changed then.
        """
        run = cls(path)
        text = _to_yaml(config)  # what cannot be written fails before anything is removed
        run.check_free(overwrite, keep)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.take()
            run._clear(keep)
            write_file(run.config_file, text)
            run.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: cannot write to {run.path} ({error.strerror}); choose another one") from error
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An unfinished run, to go on with.

        Raises:
            UserError: there is no run, it has no checkpoint, or it is finished.
        """
        run = cls(path)
        if not run.path.exists():
            raise UserError(f"resume: {path} does not exist; give the folder of an unfinished run")
        if not run.path.is_dir():
            raise UserError(f"resume: {path} is a file; give the folder of an unfinished run")
        if not run.config_file.is_file():
            raise UserError(f"resume: {path} holds no run: no {CONFIG}; give the folder of an unfinished run")
        if run.is_finished:
            raise UserError(f"resume: {path} is finished ({run._finished_on()}); its student is in {run.student}")
        if not run._has_checkpoint():
            raise UserError(f"resume: {path} has no checkpoint yet, it stopped in its first epoch; start it anew")
        return run

    def take(self) -> None:
        """Keeps every other run out of the folder until this process ends, however it ends.

        Raises:
            UserError: another run writes here at present.
        """
        if fcntl is None or self.path.resolve() in _HELD:  # there is no such thing on Windows
            return
        file = (self.path / LOCK).open("ab+", buffering=0)
        try:
            # by record, not `flock`: processes that load images would go on holding that for a while
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().decode(errors="replace").strip() or "of unknown number"
            raise UserError(
                f"output_dir: {self.path} is in use by another run ({owner}); end "
                "that one, or choose another output_dir"
            ) from None
        except OSError:  # a file system without locks
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        _HELD[self.path.resolve()] = file

    @property
    def is_finished(self) -> bool:
        return self.summary_file.is_file()

    @property
    def config(self) -> dict[str, Any]:
        """The config as it stands in the folder.

        Raises:
            UserError: someone edited it into something that is not a YAML mapping.
        """
        try:
            config = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.config_file}: is no valid YAML ({reason})") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.config_file}: holds no settings, expected 'key: value' lines")
        return config

    def save_config(self, config: Mapping[str, Any]) -> None:
        write_file(self.config_file, _to_yaml(config))

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `write_summary` wrote, or None while the run is unfinished."""
        return json.loads(self.summary_file.read_text(encoding="utf-8")) if self.is_finished else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Marks the run as finished; numbers that JSON does not know (NaN, infinity) become null."""
        write_file(self.summary_file, to_json(_finite(summary)))

    def write_pruning(self, content: Mapping[str, Any]) -> None:
        write_file(self.pruning_file, to_json(_finite(content)))

    @property
    def pruning(self) -> dict[str, Any] | None:
        """What `write_pruning` wrote, or None where nothing is pruned."""
        return json.loads(self.pruning_file.read_text(encoding="utf-8")) if self.pruning_file.is_file() else None

    @property
    def precisions(self) -> dict[str, Any]:
        """What was chosen where a setting says auto, by the setting."""
        file = self.path / PRECISION
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def write_precision(self, key: str, choice: Mapping[str, Any]) -> None:
        """Adds a choice to `precisions`."""
        write_file(self.path / PRECISION, to_json(self.precisions | {key: dict(choice)}))

    def append_result(self, row: Mapping[str, float | int | str | None]) -> None:
        """Adds the row of an epoch to the results; a column that is new stays empty in the rows before it.

        Args:
            row: values by column; 'epoch' (an int) must be among them.
        """
        assert "epoch" in row, "results are told apart by their epoch"
        self._write_results([*self._read_cells(), row])

    def truncate_results(self, before_epoch: int) -> None:
        """Drops the rows from this epoch on; a resumed run will write them again."""
        rows = self._read_cells()
        try:
            kept = [row for row in rows if int(row["epoch"]) < before_epoch]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.results_file}: is not the table that a run writes; move it away") from None
        if not kept:
            self.results_file.unlink(missing_ok=True)
        elif len(kept) < len(rows):
            self._write_results(kept)

    def read_results(self) -> list[dict[str, float | int | str | None]]:
        """All rows, oldest first; an empty cell is None."""
        return [{column: _parse(cell) for column, cell in row.items()} for row in self._read_cells()]

    def _read_cells(self) -> list[dict[str, str]]:
        if not self.results_file.exists():
            return []
        with self.results_file.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _write_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.results_file, text.getvalue())

    def check_free(self, overwrite: bool, keep: Sequence[str] = ()) -> None:
        """Raises a UserError if a new run may not take this folder; arguments as in `create`."""
        assert set(keep) <= set(REMOVED), f"a run owns {REMOVED}, not all of {keep}"
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file; choose another output_dir")
        # what is hidden (.DS_Store, .gitkeep) is nobody's work
        found = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")} - set(keep)
        if not self._is_run():
            if found:
                names = ", ".join(sorted(found)[:3]) + (", ..." if len(found) > 3 else "")
                raise UserError(
                    f"output_dir: {self.path} holds no run but other files ({names}); choose another output_dir"
                )
            return
        if overwrite:
            return
        way_out = "choose another output_dir, or say overwrite=true"
        if self.is_finished:
            raise UserError(f"output_dir: {self.path} already holds a finished run ({self._finished_on()}); {way_out}")
        if self._has_checkpoint():
            raise UserError(
                f"output_dir: {self.path} holds an unfinished run; go on with it by --resume {self.path}, {way_out}"
            )
        if found & {RESULTS, STUDENT, *OF_TEACHERS}:
            raise UserError(f"output_dir: {self.path} holds a run that has no checkpoint to resume from; {way_out}")

    def _clear(self, keep: Sequence[str]) -> None:
        for name in REMOVED:
            entry = self.path / name
            if name in keep or not (entry.exists() or entry.is_symlink()):
                continue
            if entry.is_dir() and not entry.is_symlink():  # of a link only the link is ours
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _is_run(self) -> bool:
        if not self.config_file.is_file():
            return False
        return self.config_file.read_text(encoding="utf-8", errors="replace").startswith(SIGNATURE)

    def _has_checkpoint(self) -> bool:
        """Whether there is anything to go on from: an epoch of this run, or of a run that trains a teacher."""
        folders = (self.path, self.path / TEACHER_RUN, *(self.path / TEACHER_RUNS).glob("*"))
        return any(any((folder / CHECKPOINTS).glob("epoch_*.pt")) for folder in folders)

    def _finished_on(self) -> str:
        return f"{datetime.fromtimestamp(self.summary_file.stat().st_mtime):%Y-%m-%d %H:%M}"


def write_file(file: Path, content: str | bytes) -> None:
    """Replaces a file as a whole; whatever fails on the way leaves the old one as it was."""
    staged = file.with_name(f".{file.name}.tmp")
    try:
        with staged.open("wb") as out:
            out.write(content.encode() if isinstance(content, str) else content)
            out.flush()
            os.fsync(out.fileno())  # or a crash of the machine could leave an empty file under the new name
        os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)


def to_json(data: Any) -> str:
    """Indented JSON in which a list of numbers is one line."""
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
    return re.sub(r"\[\n[\s\d.,eE+-]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def _to_yaml(config: Mapping[str, Any]) -> str:
    return f"{SIGNATURE}\n" + yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _parse(cell: str) -> float | int | str | None:
    if not cell:
        return None
    try:
        return int(cell) if cell.removeprefix("-").isdecimal() else float(cell)
    except ValueError:
        return cell
