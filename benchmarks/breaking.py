"""Starts tiny runs as forks of one process, to be broken, and compares what they end with."""

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import train

TINY = {"backbone": "test_resnet", "channels": 16, "head_depth": 1}
DATA = {"image_size": 64, "batch_size": 2, "synthetic": {"train": 12, "val": 4, "size": 64}}
DISTILLED = {
    "losses": {"soft_label": {"name": "dense_sigmoid"}, "mimic": {"name": "pkd", "schedule": {"warmup_epochs": 1.5}}},
    "balance": "gradient",
    "pruning": {"target": 0.5, "start": 1, "end": 2, "importance": "taylor", "ranking": "global"},
}
# name -> settings and processes
RUNS = {
    "plain": ({"data": {"workers": 2}}, 1),
    "distilled": (DISTILLED, 1),
    "two processes": (DISTILLED | {"data": {"batch_size": 1}}, 2),
}


@dataclass
class Outcome:
    """What came of a fault.

    Attributes:
        said: the line that the user sees.
        lost: what is lost, in words.
        good: whether the line is one, no traceback, and nothing else is lost.
    """

    said: str
    lost: str
    good: bool


@dataclass
class Ended:
    """How one process of a run ended: its exit status, minus the signal's number if one killed it, and its output."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What stands last on standard error, or on standard output where that is silent."""
        lines = [line for line in (self.err.strip() or self.out.strip()).splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def plain(self) -> bool:
        """Whether nothing but words was said."""
        return "Traceback" not in self.err + self.out


class Bench:
    """Starts runs, breaks them, and compares what they end with.

    Args:
        folder: where all of it goes.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.scenes = self.folder / "scenes"
        self.teacher = self.folder / "teacher" / "student"

    def prepare(self) -> None:
        """What the faults stand on: scenes, a teacher, and of each kind a run to which nothing happens."""
        for name in ("teacher", *RUNS):
            whole = self.whole(name)
            if not (whole / "summary.json").is_file():
                shutil.rmtree(whole, ignore_errors=True)
                began = time.monotonic()
                kind = "plain" if name == "teacher" else name
                changes = {"train": {"epochs": 1}} if name == "teacher" else {}
                ended = self.run(kind, whole, changes)
                if any(one.status for one in ended):
                    sys.exit(f"{whole}: {ended[0].err or ended[0].out}")
                (whole / "seconds").write_text(str(time.monotonic() - began))

    def whole(self, name: str) -> Path:
        """The folder of the run of a kind that nothing happens to."""
        return self.folder / name.replace(" ", "_")

    def new(self, title: str) -> Path:
        """An empty folder for a fault, without the run of an earlier try."""
        folder = self.folder / "broken" / "".join(c if c.isalnum() else "_" for c in title)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder / "run"

    def settings(self, kind: str, run: Path, changes: dict | None = None) -> dict:
        """A whole config; sections of `changes` replace or, for data and train, add to those of the kind."""
        of_kind, _ = RUNS[kind]
        whole = {"output_dir": str(run), "student": TINY, **of_kind, **(changes or {})}
        if whole.get("losses"):
            whole.setdefault("teacher", {"path": str(self.teacher)})
        data = {"root": str(self.scenes), "workers": 0} | DATA | of_kind.get("data", {})
        fixed = {"epochs": 4, "save_minutes": 0.008}
        whole["data"] = data | (changes or {}).get("data", {})
        whole["train"] = fixed | (changes or {}).get("train", {})
        return whole

    def run(self, kind: str, run: Path, changes: dict | None = None, **more: object) -> list[Ended]:
        """Starts a run and waits for its end; arguments as in `settings` and `launch`."""
        config = run.parent / f"{run.name}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(self.settings(kind, run, changes)))
        return self.launch([str(config)], RUNS[kind][1], **more)

    def resume(self, run: Path, processes: int = 1) -> list[Ended]:
        """Goes on with a run; from the start where there is no checkpoint yet."""
        if list((run / "checkpoints").glob("epoch_*.pt")):
            return self.launch(["--resume", str(run)], processes)
        return self.launch([str(run.parent / "run.yaml")], processes)

    def launch(
        self,
        arguments: Sequence[str],
        processes: int = 1,
        break_it: Callable[[list[int]], None] | None = None,
        in_rank: Callable[[int], None] | None = None,
        timeout: float = 240,
    ) -> list[Ended]:
        """`train.py ARGUMENTS` on so many processes, forked off this one, which has everything imported.

        As launchers do, all are ended once one has failed, here after 20 seconds in which they may do so themselves.

        Args:
            arguments: of the command line.
            processes: how many.
            break_it: is called with their ids, while they run.
            in_rank: is called in each, with its rank, before it starts.
            timeout: in seconds; afterwards they count as hung.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        said = [[self.folder / f"rank{rank}.{name}" for name in ("out", "err")] for rank in range(processes)]
        pids = [self._fork(rank, processes, port, arguments, said[rank], in_rank) for rank in range(processes)]
        statuses: dict[int, int] = {}
        if break_it:
            break_it(pids)
        until = time.monotonic() + timeout
        while len(statuses) < processes:
            for pid in pids:
                if pid not in statuses:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        statuses[pid] = os.waitstatus_to_exitcode(status)
                        if statuses[pid]:
                            until = min(until, time.monotonic() + 20)
            if time.monotonic() > until:
                for pid in set(pids) - set(statuses):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return [Ended(statuses[pid], *(file.read_text() for file in files)) for pid, files in zip(pids, said)]

    def _fork(self, rank: int, processes: int, port: int, arguments, said, in_rank) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setpgrp()  # as launchers do
            for descriptor, file in zip((1, 2), said):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            if processes > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update({name: str(value) for name, value in ranks.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if in_rank:
                in_rank(rank)
            train.Album.update = lambda *arguments, **more: None  # pictures would take longer than all else
            sys.argv = ["train.py", *arguments]
            status = train.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)

    def same(self, run: Path, kind: str) -> bool:
        """Whether a run's student is the one of the run that nothing happened to, to the bit."""
        files = ("model.safetensors", "plans.json", "detector.json")
        ours, theirs = run / "student", self.whole(kind) / "student"
        return ours.is_dir() and all((ours / f).read_bytes() == (theirs / f).read_bytes() for f in files[:2])
