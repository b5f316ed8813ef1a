"""What a cut costs and what is won back: one student, one budget of epochs, cut in several ways and not at all.

    python benchmarks/recovery.py --sets scenes bccd --seeds 3 --data ../shared/data

Every finished arm is kept under --output, and a second start goes on from there. Writes --output/recovery.json and a
section of docs/pruning.md for each set.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in this folder, `losses` would be a benchmark

from benchmarks.arms import ROOT, markdown, points, replace_section, run_arm, setting
from distill import latency
from distill.config import read_yaml
from distill.report import counted
from distill.run_folder import RunFolder

VIEWS = "data.augment.views=4"  # of each image, so that the teacher is asked for each once, see teacher.cache
SETS = {
    "scenes": (
        "Drawn scenes (`configs/quickstart.yaml`, 1000 images)",
        "configs/quickstart.yaml",
        ["data.root=runs/scenes1000", "data.synthetic.train=1000"],
    ),
    "bccd": ("BCCD (`configs/bccd.yaml` at 160x120 px)", "configs/bccd.yaml", ["data.image_size=[120,160]"]),
    "fod": ("FOD (`configs/fod.yaml`)", "configs/fod.yaml", []),
}
PLAIN = ["teacher=null", "losses={}"]
UNPRUNED, OURS = "unpruned, plain", "cut between epochs + distillation"


@dataclass(frozen=True)
class Arm:
    """One way to come to a student of some size.

    Attributes:
        taught: by the teacher, with the recipe's losses.
        cuts: `gradual` between epochs, in `one` shot, or `none`.
        widths_of: the arm whose widths it starts with.
        scratch: with random weights, where the recipe's are published ones.
    """

    taught: bool
    cuts: str = "none"
    widths_of: str | None = None
    scratch: bool = False


WAYS = {
    OURS: Arm(taught=True, cuts="gradual"),
    "one-shot cut + distillation": Arm(taught=True, cuts="one"),
    "one-shot cut, fine-tuned without a teacher": Arm(taught=False, cuts="one"),
    "same widths from scratch + distillation": Arm(taught=True, widths_of=OURS, scratch=True),
    "same widths from the start + distillation": Arm(taught=True, widths_of=OURS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["scenes", "bccd"])
    parser.add_argument("--removed", nargs="+", type=int, default=[50, 70], metavar="PERCENT", help="of the MACs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12, help="of every student")
    parser.add_argument("--data", default="../shared/data", help="folder that holds bccd and fod")
    parser.add_argument("--output", type=Path, default=Path("runs/recovery"))
    args = parser.parse_args()
    results = {}
    for name in args.sets:
        _, config, base = SETS[name]
        overrides = base if name == "scenes" else [*base, f"data.root={args.data}/{name}"]
        for seed in range(args.seeds):  # a seed of all arms before the next, so that they can be compared early
            results[name] = compare(args.output / name, config, overrides, args.removed, seed + 1, args.epochs)
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "recovery.json").write_text(json.dumps(results, indent=2) + "\n")
            print(f"{name}, {seed + 1} of {args.seeds} seeds\n{table(results[name])}", flush=True)
        file, title = ROOT / "docs" / "pruning.md", f"What is won back: {SETS[name][0]}"
        body = section(name, results[name], args.seeds, args.epochs)
        file.write_text(replace_section(file.read_text(), title, body))


def compare(
    folder: Path, config: str, base: Sequence[str], removed: Sequence[int], seeds: int, epochs: int
) -> dict[str, Any]:
    """Trains the teacher and all arms on one data set that are not there yet, and times all students in turns."""
    folder = folder.resolve()
    recipe = read_yaml(ROOT / config)
    as_student = recipe["teacher"]
    # without published weights to start from, it is from scratch
    ways = {
        way: arm
        for way, arm in WAYS.items()
        if recipe["student"].get("weights", "none") != "none" or arm.scratch or not arm.widths_of
    }
    alone = [setting("student", as_student["detector"]), setting("train", as_student["train"])]
    taught_by = run_arm(folder / "teacher", config, [*base, *PLAIN, "pruning=null", *alone])["student"]
    arms: dict[str, dict[str, Any]] = {UNPRUNED: {"removed": 0, "seeds": []}}
    arms |= {name_of(way, share): {"removed": share, "seeds": []} for share in removed for way in ways}
    students: dict[Path, dict[str, Any]] = {}
    for seed in range(seeds):
        places = {arm: folder / re.sub(r"\W+", "_", arm).strip("_") / f"seed{seed}" for arm in arms}
        shared = [*base, VIEWS, f"train.epochs={epochs}", f"seed={seed}"]
        run_arm(places[UNPRUNED], config, [*shared, *PLAIN, "pruning=null"])
        for share in removed:
            for way, arm in ways.items():
                widths_of = places[name_of(arm.widths_of, share)] if arm.widths_of else None
                overrides = overrides_of(arm, share, epochs, folder, seed, widths_of)
                run_arm(places[name_of(way, share)], config, [*shared, *overrides])
        for arm, place in places.items():
            students[place] = describe(RunFolder(place))
            arms[arm]["seeds"].append(students[place])
    for entry, milliseconds in zip(students.values(), time_students(list(students))):
        entry["latency_ms"] = milliseconds
    return {"teacher": {key: taught_by[key] for key in ("ap", "macs")}, "arms": arms}


def name_of(way: str, removed: int) -> str:
    """An arm, as it is called in results and on disk."""
    return f"{way}, -{removed}%"


def overrides_of(arm: Arm, removed: int, epochs: int, folder: Path, seed: int, widths_of: Path | None) -> list[str]:
    """What an arm changes of the recipe."""
    teacher = {"path": str(folder / "teacher" / "student"), "cache": str(folder / f"cache{seed}")}
    changes = [setting("teacher", teacher)] if arm.taught else PLAIN
    first, last = cut_between(epochs)
    if arm.cuts == "none":
        scratch = ["student.weights=none"] if arm.scratch else []
        return [*changes, *scratch, "pruning=null", f"widths_of={widths_of / 'student'}"]
    when = [f"pruning.start={first}", f"pruning.end={last if arm.cuts == 'gradual' else first}"]
    return [*changes, *when, f"pruning.target={1 - removed / 100:g}", "pruning.evaluate=true"]


def cut_between(epochs: int) -> tuple[int, int]:
    """The epochs, counted from 0, before which cuts begin and end; all at once they come before the first."""
    return round(epochs / 3), round(epochs * 5 / 9)


def describe(run: RunFolder) -> dict[str, Any]:
    """What a finished arm gives to the tables; AP right after the last cut is on the val split, before any training."""
    student = run.summary["student"]
    right_after = [row["ap_after_cut"] for row in run.read_results() if row.get("ap_after_cut") is not None]
    return {
        "ap": student["ap"],
        "ap50": student["ap50"],
        "macs": student["macs"],
        "params": student["params"],
        "ap_right_after": right_after[-1] if right_after else None,
    }


def time_students(places: Sequence[Path], repeats: int = 30) -> list[float]:
    """Milliseconds of one image with the student of each run, median; they take turns."""
    candidates = [
        candidate
        for place in places
        for candidate in latency.build(place / "student", ["eager"], "network", 1, torch.get_num_threads())
    ]
    return [entry["median_ms"] for entry in latency.run(candidates, 1, repeats)]


def table(result: dict[str, Any]) -> str:
    """All arms of one data set, by what was removed; AP in points."""
    arms = result["arms"]
    uncut_ms = mean(entry["latency_ms"] for entry in arms[UNPRUNED]["seeds"])
    rows = [
        ["teacher", f"{100 * result['teacher']['ap']:.1f}", "", "", f"{result['teacher']['macs'] / 1e6:.0f}M", "", ""]
    ]
    for arm, entry in arms.items():
        seeds = entry["seeds"]
        spread = points([run["ap"] for run in seeds])
        against = points([run["ap"] - plain["ap"] for run, plain in zip(seeds, arms[UNPRUNED]["seeds"])])
        right_after = [run["ap_right_after"] for run in seeds]
        milliseconds = mean(run["latency_ms"] for run in seeds)
        rows.append(
            [
                arm,
                spread,
                "" if arm == UNPRUNED else against,
                "" if None in right_after else points(right_after),
                f"{mean(run['macs'] for run in seeds) / 1e6:.0f}M",
                f"{milliseconds:.1f} ms",
                f"{uncut_ms / milliseconds:.2f}x",
            ]
        )
    return markdown(["", "AP", "against unpruned", "right after the last cut", "MACs", "latency", "speed"], rows)


def section(name: str, result: dict[str, Any], seeds: int, epochs: int) -> str:
    """A data set's section of docs/pruning.md."""
    first, last = (epoch + 1 for epoch in cut_between(epochs))
    when = f"epochs {first} to {last}" if first < last else f"epoch {first}"
    return f"""{counted(seeds, "seed")}, {counted(epochs, "epoch")} in all. Cuts between epochs come before {when},
one-shot cuts before epoch {first}. Latency on {counted(torch.get_num_threads(), "thread")} of a CPU.

```
python benchmarks/recovery.py --sets {name} --seeds {seeds} --epochs {epochs}
```

{table(result)}"""


if __name__ == "__main__":
    main()
