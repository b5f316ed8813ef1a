"""The course of a run as numbers, from its own files; what the charts draw, and nothing of how."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from distill.run_folder import RunFolder
from distill.schema import RESERVED, TEACHER
from distill.summary import best, teachers_in

Row = dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """One cut, made when `done` epochs were done.

    Attributes:
        done: epochs before it; it shows first in the row of the next.
        macs: multiply-accumulates that it leaves.
        left: the same as a share of the uncut student's.
        ap_right_after: before any training, where the settings have that measured.
        ap: after the last epoch that was trained at this size.
    """

    done: int
    macs: int
    left: float
    ap_right_after: float | None
    ap: float | None


@dataclass(frozen=True)
class GroupCourse:
    """Coupled layers and what the cuts took from them.

    Attributes:
        layers: by name.
        widths: channels uncut and, epoch by epoch that was cut before, after it: (epochs done, channels).
        macs_saved: by all cuts, each counted after those of the groups above it.
        kept: mean importance, at the last cut of channels, of those that stayed.
        removed: likewise of those that went; None where none did.
    """

    layers: tuple[str, ...]
    widths: tuple[tuple[int, int], ...]
    macs_saved: int = 0
    kept: float | None = None
    removed: float | None = None

    @property
    def left(self) -> float:
        """Share of its channels."""
        return self.widths[-1][1] / self.widths[0][1]


@dataclass(frozen=True)
class ClassCourse:
    """AP of one class: before the first cut, an epoch after the last one, and now; None where not measured."""

    name: str
    before: float | None
    after: float | None
    end: float | None

    @property
    def lost(self) -> float:
        """What the cuts cost it, 0 where there were none."""
        return (self.before or 0.0) - (self.after if self.after is not None else self.before or 0.0)


@dataclass(frozen=True)
class Course:
    """What `results.csv`, `config.yaml` and `summary.json` tell.

    Attributes:
        config: the settings, as they were written.
        rows: of the results, one an epoch.
        summary: None while the run goes on.
        pruning: of `pruning.json`; empty where nothing is cut.
    """

    config: dict[str, Any]
    rows: list[Row]
    summary: dict[str, Any] | None
    pruning: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run: RunFolder) -> "Course":
        return cls(run.config, run.read_results(), run.summary, run.pruning or {})

    @property
    def groups(self) -> list[GroupCourse]:
        """All groups of the uncut student, with what cuts took; what only came apart later follows."""
        found = {
            tuple(group["layers"]): GroupCourse(tuple(group["layers"]), ((0, group["width"]),))
            for group in self.pruning.get("groups", ())
        }
        for cut in self.pruning.get("cuts", ()):
            found = {course.layers: course for course in (_without(c, cut) for c in found.values())}
            for entry in cut["groups"]:
                layers = tuple(entry["layers"])
                so_far = found.get(layers) or GroupCourse(layers, ((0, entry["before"]),))
                found[layers] = GroupCourse(
                    layers,
                    (*so_far.widths, (cut["epoch"], entry["after"])),
                    so_far.macs_saved + entry["macs_saved"],
                    entry["kept"],
                    entry["removed"],
                )
        return list(found.values())

    @property
    def retreats(self) -> list[dict[str, Any]]:
        """Cuts that the guard took back: the `epoch` of each, `until` when it was tried, the `objection`."""
        return self.pruning.get("retreats", [])

    @property
    def total_epochs(self) -> int:
        """Epochs that the run is to have."""
        planned = (self.config.get("train") or {}).get("epochs")
        return max([planned or 1, *self.epochs])

    @property
    def epochs(self) -> list[int]:
        return [row["epoch"] for row in self.rows]

    def column(self, name: str) -> list[float]:
        """A column of the results, NaN where it is empty."""
        return [math.nan if row.get(name) is None else float(row[name]) for row in self.rows]

    def has(self, name: str) -> bool:
        return any(row.get(name) is not None for row in self.rows)

    @property
    def losses(self) -> dict[str, list[float]]:
        """Each loss as it entered the sum, by name."""
        columns = self.rows[0] if self.rows else {}
        terms = [name for name in columns if name not in RESERVED and not name.startswith("ap")]
        return {name: self.column(name) for name in ("task", *terms) if self.has(name)}

    @property
    def teacher_ap(self) -> float | None:
        """On the validation split, as the rows are."""
        known = [row["teacher_ap"] for row in self.rows if row.get("teacher_ap") is not None]
        if known:
            return known[-1]
        return self.entry("teacher").get("ap") if self.measured_on_val else None

    @property
    def measured_on_val(self) -> bool:
        """Whether the summary's numbers come from the split that the rows come from."""
        return bool(self.summary) and self.summary.get("split") == (self.config.get("data") or {}).get("val", "val")

    def entry(self, name: str) -> dict[str, Any]:
        """The summary's entry for `teacher`, `student_before` or `student`; empty where there is none.

        Of several teachers it is the best.
        """
        summary = self.summary or {}
        if name == TEACHER:
            teachers = teachers_in(summary)
            return teachers.get(best({name: entry["ap"] for name, entry in teachers.items()})) or {}
        return summary.get(name) or {}

    @property
    def macs_left(self) -> list[float]:
        """Share of the uncut student's MACs, after each epoch."""
        if self.has("macs_left"):
            return self.column("macs_left")
        uncut = self.entry("student_before").get("macs") or (self.rows[0].get("macs") if self.rows else None)
        return [macs / uncut if uncut else math.nan for macs in self.column("macs")]

    @property
    def params_left(self) -> list[float]:
        """Likewise of its parameters; all NaN where the uncut number is not known."""
        params = self.column("params")
        first_is_uncut = bool(params) and self.macs_left[0] == 1
        uncut = self.entry("student_before").get("params") or (params[0] if first_is_uncut else math.nan)
        return [count / uncut for count in params]

    @property
    def cuts(self) -> list[Cut]:
        """Seen by the MACs, which only cuts change."""
        left = [1.0, *self.macs_left]
        changed = [i for i in range(len(self.rows)) if left[i + 1] < left[i]]
        cuts = []
        for i, following in zip(changed, [*changed[1:], len(self.rows)]):
            row = self.rows[i]
            last = self.rows[following - 1]["ap"]
            cuts.append(Cut(row["epoch"] - 1, row["macs"], left[i + 1], row.get("ap_after_cut"), last))
        return cuts

    @property
    def classes(self) -> list[ClassCourse]:
        """Each class of the results, in label order."""
        columns = self.rows[0] if self.rows else {}
        names = [c.removeprefix("ap_") for c in columns if c.startswith("ap_") and c != "ap_after_cut"]
        cuts, rows = self.cuts, {row["epoch"]: row for row in self.rows}
        before = rows.get(cuts[0].done, {}) if cuts else {}
        after = rows.get(cuts[-1].done + 1, {}) if cuts else {}
        return [
            ClassCourse(n, before.get(f"ap_{n}"), after.get(f"ap_{n}"), self.rows[-1].get(f"ap_{n}")) for n in names
        ]

    @property
    def sizes(self) -> list[tuple[str, int, float | None]]:
        """What the student went through, on the validation split: (name, MACs, AP) uncut and after each cut."""
        cuts, rows = self.cuts, {row["epoch"]: row for row in self.rows}
        points = []
        if not cuts and self.rows:
            points.append(("student", self.rows[-1]["macs"], self.rows[-1]["ap"]))
        if cuts and cuts[0].done in rows:
            points.append(("before cutting", rows[cuts[0].done]["macs"], rows[cuts[0].done]["ap"]))
        names = [f"cut {i}" for i in range(1, len(cuts))] + ["student"]
        return points + [(name, cut.macs, cut.ap) for name, cut in zip(names, cuts)]

    @property
    def milliseconds(self) -> dict[int, float]:
        """What one image took in the end, by the MACs of what was measured: the uncut student, and after each cut.

        The sizes are told apart by their MACs: a cut that took nothing has no time.
        """
        stages = [self.entry("student_before"), *((self.summary or {}).get("cuts") or [self.entry("student")])]
        return {stage["macs"]: stage["latency_ms"] for stage in stages if stage.get("latency_ms")}

    @property
    def latencies(self) -> list[tuple[str, float, float | None]]:
        """The sizes with their milliseconds in place of MACs, where these were measured."""
        measured = self.milliseconds
        return [(name, measured[macs], ap) for name, macs, ap in self.sizes if macs in measured]


def _without(group: GroupCourse, cut: dict[str, Any]) -> GroupCourse:
    """A group once the blocks of a cut are gone, and their layers with them."""
    gone = tuple(f"{block['name']}." for block in cut["blocks"])
    left = tuple(layer for layer in group.layers if not layer.startswith(gone))
    return replace(group, layers=left) if left else replace(group, widths=(*group.widths, (cut["epoch"], 0)))
