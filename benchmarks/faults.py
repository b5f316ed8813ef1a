"""Breaks runs in every way we know of, and tells what their user sees and what is lost.

    python benchmarks/faults.py

Each fault is done to a tiny run of its own (scenes of 64 pixels, seconds long) that is then gone on with; its student
is compared, byte by byte, with that of a run nothing happened to. What is finished is kept under --output, so that the
command can be stopped and started again. Prints a table, and writes --output/faults.json and --report. Disks are filled
and made read-only by mounting, which takes root on Linux; without, these faults are left out.
"""

import argparse
import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")  # before torch is imported

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.arms import markdown
from benchmarks.breaking import RUNS, Bench, Ended, Outcome

NOTHING, SINCE = "nothing", "steps since the last checkpoint"
REFUSED = "nothing: it does not start"

Fault = Callable[[Bench, Path], Outcome | None]
FAULTS: dict[str, Fault] = {}


def fault(title: str) -> Callable[[Fault], Fault]:
    """Enters a fault into the list."""

    def enter(function: Fault) -> Fault:
        FAULTS[title] = function
        return function

    return enter


def told(ended: list[Ended], *words: str, status: int = 2) -> bool:
    """Whether the first process ended with this status and one plain line that has these words in it."""
    one = ended[0]
    return one.status == status and one.plain and all(word in one.line for word in words)


def goes_on(bench: Bench, run: Path, kind: str) -> bool:
    """Whether a broken run, gone on with, ends with the student of the one that nothing happened to."""
    return all(one.status == 0 for one in bench.resume(run, RUNS[kind][1])) and bench.same(run, kind)


def after_checkpoint(run: Path, act: Callable[[list[int]], None], number: int = 1) -> Callable[[list[int]], None]:
    """Acts once that many epochs are in checkpoints."""

    def wait(pids: list[int]) -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (run / f"checkpoints/epoch_{number:04d}.pt").exists():
            time.sleep(0.01)
        act(pids)

    return wait


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


# -- kill -9 at random moments ----------------------------------------------------------------------------------------


def killed(kind: str, number: int) -> Fault:
    """A run of a kind that is killed at a random moment, the same one for the same number."""

    def act(bench: Bench, run: Path) -> Outcome:
        share = random.Random(f"{kind} {number}").uniform(0.1, 0.95)
        wait = share * float((bench.whole(kind) / "seconds").read_text())

        def break_it(pids: list[int]) -> None:
            time.sleep(wait)
            kill(pids)

        ended = bench.run(kind, run, break_it=break_it)
        if all(one.status == 0 for one in ended):  # this time it was faster
            return Outcome("", NOTHING, bench.same(run, kind))
        there = sorted(path.stem for path in (run / "checkpoints").glob("epoch_*.pt"))
        lost = f"what came after {there[-1]}, {wait:.1f} s into the run" if there else "all: its first seconds"
        return Outcome("", lost, ended[0].plain and goes_on(bench, run, kind))

    return act


for kind, times in (("plain", 8), ("distilled", 9), ("two processes", 8)):
    for number in range(times):
        FAULTS[f"kill -9, {kind}, {number + 1}"] = killed(kind, number)


# -- told to stop ------------------------------------------------------------------------------------------------------


def stopped(kind: str, signals: list[signal.Signals], status: int, first_only: bool = False) -> Fault:
    """A run that is sent signals after its first epoch."""

    def act(bench: Bench, run: Path) -> Outcome:
        def send(pids: list[int]) -> None:
            for number in signals:
                for pid in pids[:1] if first_only else pids:
                    os.killpg(pid, number)  # as terminals and launchers do it
                time.sleep(0.001)

        ended = bench.run(kind, run, break_it=after_checkpoint(run, send))
        good = told(ended, "--resume", status=status) and all(one.plain for one in ended)
        return Outcome(ended[0].line, NOTHING if len(signals) == 1 else SINCE, good and goes_on(bench, run, kind))

    return act


FAULTS["SIGTERM"] = stopped("distilled", [signal.SIGTERM], 143)
FAULTS["SIGTERM, with processes that load images"] = stopped("plain", [signal.SIGTERM], 143)
FAULTS["SIGTERM to one of two processes"] = stopped("two processes", [signal.SIGTERM], 143, first_only=True)
FAULTS["Ctrl-C"] = stopped("plain", [signal.SIGINT], 130)
FAULTS["Ctrl-C, twice"] = stopped("plain", [signal.SIGINT] * 2, 130)


# -- disks -------------------------------------------------------------------------------------------------------------


def mount(folder: Path, *options: str) -> bool:
    """Mounts a small disk in memory; False where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False)


@fault("the disk fills up")
def full_disk(bench: Bench, run: Path) -> Outcome | None:
    disk = run.parent / "disk"
    if not mount(disk, "-o", "size=14m"):
        return None
    try:
        ended = bench.run("distilled", disk / "run")
        good = told(ended, "No space left") or told(ended, "cannot be written")
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        shutil.copy(disk / "run.yaml", run.parent)
        return Outcome(ended[0].line, SINCE, good and goes_on(bench, disk / "run", "distilled"))
    finally:
        unmount(disk)


@fault("the disk is full from the start")
def no_disk(bench: Bench, run: Path) -> Outcome | None:
    disk = run.parent / "disk"
    if not mount(disk, "-o", "size=16k"):
        return None
    try:
        (disk / "ballast").write_bytes(bytes(8192))
        changes = {"output_dir": str(disk / "run")}
        ended = bench.run("plain", run, changes)
        return Outcome(ended[0].line, REFUSED, told(ended, "output_dir"))
    finally:
        unmount(disk)


@fault("the output is read-only")
def read_only(bench: Bench, run: Path) -> Outcome | None:
    disk = run.parent / "disk"
    if not mount(disk, "-o", "size=1m,ro"):
        return None
    try:
        ended = bench.run("plain", run, {"output_dir": str(disk / "run")})
        return Outcome(ended[0].line, REFUSED, told(ended, "output_dir", "Read-only"))
    finally:
        unmount(disk)


@fault("the checkpoints' folder becomes read-only")
def becomes_read_only(bench: Bench, run: Path) -> Outcome | None:
    folder, mounted = run / "checkpoints", []

    def cover(pids: list[int]) -> None:
        mounted.append(mount(folder, "-o", "size=1m,ro"))

    try:
        ended = bench.run("distilled", run, break_it=after_checkpoint(run, cover))
    finally:
        if any(mounted):
            unmount(folder)
    if not any(mounted):
        return None
    return Outcome(ended[0].line, SINCE, told(ended, "Read-only", "--resume") and goes_on(bench, run, "distilled"))


@fault("the output folder is deleted in mid-run")
def deleted(bench: Bench, run: Path) -> Outcome:
    away = run.with_name("away")
    ended = bench.run("distilled", run, break_it=after_checkpoint(run, lambda pids: run.rename(away)))
    shutil.rmtree(run, ignore_errors=True)
    away.rename(run)  # it was only moved
    return Outcome(ended[0].line, SINCE, told(ended, "--resume") and goes_on(bench, run, "distilled"))


# -- checkpoints and weights -------------------------------------------------------------------------------------------


def break_off(bench: Bench, run: Path, kind: str = "distilled") -> list[Path]:
    """A run that was killed after its second epoch: its checkpoints, oldest first."""
    bench.run(kind, run, break_it=after_checkpoint(run, kill, number=2))
    return sorted((run / "checkpoints").glob("epoch_*.pt"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def passed_over(bench: Bench, run: Path, checkpoint: Path, lost: str) -> Outcome:
    """Goes on with a run whose last checkpoint is unreadable: it is told so, and ends with the same student."""
    (ended,) = bench.resume(run)
    said = next((line for line in ended.out.splitlines() if str(checkpoint) in line), "")
    return Outcome(said, lost, ended.status == 0 and bool(said) and bench.same(run, "distilled"))


@fault("the last checkpoint is half a file")
def half(bench: Bench, run: Path) -> Outcome:
    last = break_off(bench, run)[-1]
    truncate(last)
    return passed_over(bench, run, last, "steps since the checkpoint before it")


@fault("all checkpoints are half a file")
def all_half(bench: Bench, run: Path) -> Outcome:
    for path in break_off(bench, run):
        truncate(path)
    ended = bench.resume(run)
    return Outcome(ended[0].line, "the run", told(ended, "cannot be read"))


@fault("a checkpoint of another config")
def other_config(bench: Bench, run: Path) -> Outcome:
    paths, others = break_off(bench, run), break_off(bench, run.with_name("other"), "plain")
    kept = paths[-1].read_bytes()
    shutil.copy(others[-1], paths[-1])
    ended = bench.resume(run)
    paths[-1].write_bytes(kept)
    return Outcome(ended[0].line, NOTHING, told(ended, "does not fit") and goes_on(bench, run, "distilled"))


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@fault("a malicious pickle as the last checkpoint")
def bomb(bench: Bench, run: Path) -> Outcome:
    mark = run.with_name("executed")
    last = break_off(bench, run)[-1]
    last.write_bytes(pickle.dumps(Bomb(mark)))
    outcome = passed_over(bench, run, last, "steps since the checkpoint before it; it is never executed")
    return dataclasses.replace(outcome, good=outcome.good and not mark.exists())


@fault("malicious pickles alone as checkpoints")
def bombs(bench: Bench, run: Path) -> Outcome:
    mark = run.with_name("executed")
    for path in break_off(bench, run):
        path.write_bytes(pickle.dumps(Bomb(mark)))
    ended = bench.resume(run)
    lost = "the run; they are never executed"
    return Outcome(ended[0].line, lost, told(ended, "cannot be read") and not mark.exists())


@fault("a malicious pickle as first weights")
def bomb_of_weights(bench: Bench, run: Path) -> Outcome:
    mark, weights = run.with_name("executed"), run.with_name("weights.pth")
    weights.write_bytes(pickle.dumps(Bomb(mark)))
    student = {"backbone": "test_resnet", "channels": 16, "head_depth": 1, "weights": str(weights)}
    ended = bench.run("plain", run, {"student": student})
    good = told(ended, "student.weights", "cannot be read") and not mark.exists()
    return Outcome(ended[0].line, "nothing: it does not start, and nothing is executed", good)


@fault("a teacher's weights are half a file")
def half_teacher(bench: Bench, run: Path) -> Outcome:
    teacher = run.with_name("teacher")
    shutil.copytree(bench.teacher, teacher)
    truncate(teacher / "model.safetensors")
    ended = bench.run("distilled", run, {"teacher": {"path": str(teacher)}})
    return Outcome(ended[0].line, REFUSED, told(ended, "teacher.path", "does not hold together"))


@fault("a teacher that is missing on one process")
def no_teacher(bench: Bench, run: Path) -> Outcome:
    def elsewhere(rank: int) -> None:
        os.chdir(bench.teacher.parent if rank == 0 else run.parent)

    config = {"teacher": {"path": bench.teacher.name}}
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(bench.settings("two processes", run, config)))
    ended = bench.launch([str(path)], 2, in_rank=elsewhere)
    return Outcome(ended[1].line, REFUSED, told(ended[1:], "teacher.path") and ended[0].plain)


@fault("the config.yaml of a run is garbled")
def garbled(bench: Bench, run: Path) -> Outcome:
    break_off(bench, run)
    config = run / "config.yaml"
    kept = config.read_text()
    config.write_text("data: [")
    ended = bench.resume(run)
    config.write_text(kept)
    return Outcome(ended[0].line, NOTHING, told(ended, "config.yaml") and goes_on(bench, run, "distilled"))


@fault("results.csv is garbled")
def garbled_results(bench: Bench, run: Path) -> Outcome:
    break_off(bench, run)
    (run / "results.csv").write_text("epoch,\x00\nno,number\n")
    ended = bench.resume(run)
    (run / "results.csv").unlink()
    return Outcome(ended[0].line, "the rows before it", told(ended, "results.csv") and goes_on(bench, run, "distilled"))


# -- data --------------------------------------------------------------------------------------------------------------


def damaged(damage: Callable[[Path], None], *words: str, lost: str = REFUSED, changes: dict | None = None) -> Fault:
    """A run on a copy of the scenes that was damaged: refused with these words, or by `changes` trained on anyway."""

    def act(bench: Bench, run: Path) -> Outcome:
        scenes = shutil.copytree(bench.scenes, run.with_name("scenes"))
        damage(scenes)
        data = {"data": {"root": str(scenes), "synthetic": None} | (changes or {})}
        ended = bench.run("plain", run, data)
        if changes is None:
            return Outcome(ended[0].line, lost, told(ended, *words))
        said = next((line for line in ended[0].out.splitlines() if all(word in line for word in words)), "")
        return Outcome(said, lost, ended[0].status == 0 and bool(said) and ended[0].plain)

    return act


def first_image(scenes: Path, split: str) -> Path:
    return sorted((scenes / "images" / split).iterdir())[0]


def spoil(split: str) -> Callable[[Path], None]:
    def act(scenes: Path) -> None:
        image = first_image(scenes, split)
        content = image.read_bytes()
        image.write_bytes(content[: len(content) // 2])

    return act


def annotate(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes what the training annotations say."""

    def act(scenes: Path) -> None:
        file = scenes / "annotations" / "train.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return act


def write(text: str) -> Callable[[Path], None]:
    return lambda scenes: (scenes / "annotations" / "train.json").write_text(text)


def set_box(box: list[float]) -> Callable[[Path], None]:
    return annotate(lambda content: content["annotations"][0].update(bbox=box))


def twice(key: str) -> Callable[[Path], None]:
    return annotate(
        lambda content: content[key].append(content[key][0] | {"file_name": content[key][-1].get("file_name")})
    )


SKIP = {"unreadable": "skip"}
FAULTS |= {
    "a corrupt image in train": damaged(spoil("train"), "images/train"),
    "a corrupt image in val": damaged(spoil("val"), "images/val"),
    "a corrupt image in train, to be skipped": damaged(
        spoil("train"), "1 images skipped", lost="the image", changes=SKIP
    ),
    "a corrupt image in val, to be skipped": damaged(spoil("val"), "1 images skipped", lost="the image", changes=SKIP),
    "an empty image file": damaged(lambda scenes: first_image(scenes, "train").write_bytes(b""), "images/train"),
    "a missing image": damaged(lambda scenes: first_image(scenes, "train").unlink(), "images/train"),
    "an empty annotation file": damaged(write(""), "train.json"),
    "a malformed annotation file": damaged(write('{"images": [}'), "train.json", "line 1"),
    "annotations without images": damaged(write('{"images": [], "annotations": [], "categories": []}'), "empty"),
    "two images of one id": damaged(twice("images"), "id"),
    "a box of NaN": damaged(set_box([float("nan"), 1, 5, 5]), "annotation"),
    "an infinite box": damaged(set_box([1, 1, float("inf"), 5]), "annotation"),
    "a box of three numbers": damaged(set_box([1, 1, 5]), "annotation"),
    "a box far outside": damaged(set_box([900, 900, 5, 5]), "warning", "box", lost="the box", changes={}),
    "an unknown category": damaged(annotate(lambda c: c["annotations"][0].update(category_id=99)), "category"),
    "a box on no image": damaged(annotate(lambda c: c["annotations"][0].update(image_id=10**6)), "image"),
}


@fault("the data folder vanishes in mid-run")
def vanishes(bench: Bench, run: Path) -> Outcome:
    scenes = shutil.copytree(bench.scenes, run.with_name("scenes"))
    away = run.with_name("away")
    changes = {"data": {"root": str(scenes), "synthetic": None}}
    act = after_checkpoint(run, lambda pids: scenes.rename(away))
    ended = bench.run("distilled", run, changes, break_it=act)
    away.rename(scenes)
    return Outcome(ended[0].line, SINCE, told(ended, "scenes") and goes_on(bench, run, "distilled"))


# -- processes ---------------------------------------------------------------------------------------------------------


@fault("one of two processes is killed")
def rank_dies(bench: Bench, run: Path) -> Outcome:
    ended = bench.run("two processes", run, break_it=after_checkpoint(run, lambda pids: kill(pids[1:])))
    good = told(ended, "another process", "--resume") and goes_on(bench, run, "two processes")
    return Outcome(ended[0].line, SINCE, good)


@fault("the main one of two processes is killed")
def main_dies(bench: Bench, run: Path) -> Outcome:
    ended = bench.run("two processes", run, break_it=after_checkpoint(run, lambda pids: kill(pids[:1])))
    good = told(ended[1:], "another process", "--resume") and goes_on(bench, run, "two processes")
    return Outcome(ended[1].line, SINCE, good)


@fault("a process that loads images is killed")
def loader_dies(bench: Bench, run: Path) -> Outcome:
    def kill_child(pids: list[int]) -> None:
        children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    ended = bench.run("plain", run, break_it=after_checkpoint(run, kill_child))
    return Outcome(ended[0].line, SINCE, told(ended, "data.workers", "--resume") and goes_on(bench, run, "plain"))


@fault("two runs into one folder")
def two_runs(bench: Bench, run: Path) -> Outcome:
    second: list[Ended] = []

    def start_another(pids: list[int]) -> None:
        other = Bench(run.parent)
        other.scenes, other.teacher = bench.scenes, bench.teacher
        while not (run / "config.yaml").exists():
            time.sleep(0.01)
        second.extend(other.launch([str(run.parent / "run.yaml"), "overwrite=true"]))

    ended = bench.run("distilled", run, break_it=start_another)
    good = told(second, "in use by another run") and ended[0].status == 0 and bench.same(run, "distilled")
    return Outcome(second[0].line, REFUSED, good)


@fault("gone on with on another number of processes")
def other_number(bench: Bench, run: Path) -> Outcome:
    break_off(bench, run, "two processes")
    ended = bench.launch(["--resume", str(run)], 1)
    said = next((line for line in ended[0].out.splitlines() if line.startswith("resumed")), "")
    return Outcome(said, "steps since the last whole epoch", ended[0].status == 0 and ended[0].plain and bool(said))


@fault("likewise, with a checkpoint within an epoch alone")
def other_number_within(bench: Bench, run: Path) -> Outcome:
    for path in break_off(bench, run, "two processes"):
        if "step" not in path.stem:
            path.rename(path.with_suffix(".away"))
    kept = list((run / "checkpoints").glob("epoch_*.pt"))
    ended = bench.launch(["--resume", str(run)], 1)
    if not kept:  # it was killed before there was one
        return Outcome(ended[0].line, NOTHING, told(ended, "no checkpoint"))
    return Outcome(ended[0].line, NOTHING, told(ended, "on 2 processes") and goes_on(bench, run, "two processes"))


# -- numbers -----------------------------------------------------------------------------------------------------------


@fault("a loss becomes NaN")
def not_a_number(bench: Bench, run: Path) -> Outcome:
    optimizer = {"lr": 1e30, "clip_norm": None, "warmup_epochs": 0}
    ended = bench.run("plain", run, {"train": {"optimizer": optimizer}})
    there = (run / "failure.json").is_file()
    return Outcome(ended[0].line, SINCE, told(ended, "NaN or infinite", "failure.json") and there)


@fault("a finished run is gone on with")
def finished(bench: Bench, run: Path) -> Outcome:
    shutil.copytree(bench.whole("plain"), run)
    ended = bench.launch(["--resume", str(run)])
    return Outcome(ended[0].line, NOTHING, told(ended, "is finished"))


@fault("a new run into the folder of a finished one")
def occupied(bench: Bench, run: Path) -> Outcome:
    shutil.copytree(bench.whole("plain"), run)
    ended = bench.run("plain", run)
    return Outcome(ended[0].line, REFUSED, told(ended, "already holds a finished run"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/faults"))
    parser.add_argument("--report", type=Path, help="a markdown file for the table, such as docs/reliability.md")
    parser.add_argument("--only", default="", help="faults whose title has this in it")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results = args.output / "faults.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    bench = Bench(args.output)
    bench.prepare()
    for title, fault in FAULTS.items():
        if title in found or args.only not in title:
            continue
        outcome = fault(bench, bench.new(title))
        if outcome is None:
            continue
        text = outcome.said.replace(str(bench.folder) + "/", "")
        outcome = dataclasses.replace(outcome, said=text)
        print(f"{'ok ' if outcome.good else 'BAD'} {title}: {outcome.said} [{outcome.lost}]", flush=True)
        if outcome.good:
            found[title] = dataclasses.asdict(outcome)
            results.write_text(json.dumps(found, indent=2) + "\n")
    found = {title: found[title] for title in FAULTS if title in found}  # not in the order that they were tried in
    rows = [[title, f"`{entry['said']}`" if entry["said"] else "", entry["lost"]] for title, entry in found.items()]
    table = markdown(["what happens", "what the user sees", "what is lost"], rows).replace("--:", ":--")
    if args.report:
        before, _, _ = args.report.read_text().partition("| what happens")
        args.report.write_text(before + table)
    print(f"{len(found)} of {len(FAULTS)} faults cost what they should")


if __name__ == "__main__":
    main()
