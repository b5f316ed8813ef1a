"""A run that is told to stop within an epoch saves, ends with one line, and goes on to the same end, to the bit."""

import os
import signal
import sys
import time

import pytest
import yaml

import train
from distill.checkpoint import find_checkpoints
from distill.ema import EMA


@pytest.fixture
def start(settings, tmp_path, monkeypatch):
    """`python train.py`, in this process, on four batches of two with a cut before the second of three epochs."""
    settings["data"] |= {"batch_size": 2}
    settings["train"] |= {"epochs": 3}
    settings["pruning"] |= {"start": 1, "end": 1, "every": 1, "evaluate": True}

    def start(name, *arguments):
        path = tmp_path / f"{name}.yaml"
        teacher = {"path": str(tmp_path / "teacher/student")} if name != "teacher" else None
        changes = {"teacher": teacher} | ({"losses": {}, "pruning": None} if teacher is None else {})
        path.write_text(yaml.safe_dump(settings | changes | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        return train.main()

    return start


@pytest.fixture
def after_updates(monkeypatch):
    """Acts once, after the averaged copy was brought forward so many times."""

    def plan(number, action):
        original, count = EMA.update, []

        def update(self, module):
            original(self, module)
            count.append(1)
            if len(count) == number:
                action()

        monkeypatch.setattr(EMA, "update", update)

    return plan


def without_seconds(run):
    rows = [row.split(",") for row in (run / "results.csv").read_text().splitlines()]
    column = rows[0].index("seconds")
    return [row[:column] + row[column + 1 :] for row in rows]


def test_a_signal_within_an_epoch_loses_nothing(start, after_updates, tmp_path, capsys):
    assert start("teacher") == 0 and start("whole") == 0
    after_updates(6, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the second step after the cut
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert start("broken") == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "SIGTERM" in said and f"--resume {tmp_path / 'broken'}" in said
    names = [path.name for path in find_checkpoints(tmp_path / "broken/checkpoints")]
    assert names == ["epoch_0001.pt", "epoch_0001_step_000002.pt"]

    assert start("broken", "--resume", str(tmp_path / "broken")) == 0
    assert "resumed: 1 of 3 epochs are done, 2 steps of the next" in capsys.readouterr().out
    for file in ("model.safetensors", "plans.json"):
        ours, theirs = (tmp_path / name / "student" / file for name in ("broken", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert without_seconds(tmp_path / "broken") == without_seconds(tmp_path / "whole")


def test_checkpoints_within_an_epoch_are_made_by_the_clock(start, after_updates, settings, tmp_path):
    settings["train"] |= {"save_minutes": 1e-6}
    after_updates(3, lambda: (_ for _ in ()).throw(MemoryError))  # as if the machine had gone down
    with pytest.raises(MemoryError):
        start("teacher")
    names = [path.name for path in find_checkpoints(tmp_path / "teacher/checkpoints")]
    assert names == ["epoch_0000_step_000001.pt", "epoch_0000_step_000002.pt"]
    assert start("teacher", "--resume", str(tmp_path / "teacher")) == 0
    names = [path.name for path in find_checkpoints(tmp_path / "teacher/checkpoints")]
    assert names == ["epoch_0002_step_000004.pt", "epoch_0003.pt"]


def test_a_checkpoint_that_is_passed_over_is_told_of(start, after_updates, tmp_path, capsys):
    after_updates(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start("teacher") == 143
    last = find_checkpoints(tmp_path / "teacher/checkpoints")[-1]
    os.truncate(last, 1000)
    capsys.readouterr()
    assert start("teacher", "--resume", str(tmp_path / "teacher")) == 0
    said = capsys.readouterr().out
    assert f"warning: {last} cannot be read (RuntimeError); the one before it is taken" in said
    assert "resumed: 1 of 3 epochs are done\n" in said


def test_sigint_likewise(start, after_updates, tmp_path, capsys):
    after_updates(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert start("teacher") == 130
    assert "SIGINT" in capsys.readouterr().err
    names = [path.name for path in find_checkpoints(tmp_path / "teacher/checkpoints")]
    assert names == ["epoch_0000_step_000002.pt"]


def test_a_second_sigint_ends_at_once(start, after_updates, capsys):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    after_updates(2, twice)
    assert start("teacher") == 130
    assert "last checkpoint" in capsys.readouterr().err


def test_a_checkpoint_within_an_epoch_needs_as_many_processes(start, after_updates, monkeypatch, tmp_path, capsys):
    after_updates(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start("teacher") == 143
    monkeypatch.setattr("distill.checkpoint.Progress.from_dict", lambda values: pytest.fail("it was taken"))
    import torch

    path = find_checkpoints(tmp_path / "teacher/checkpoints")[-1]
    state = torch.load(path)
    state["progress"]["processes"] = 2
    torch.save(state, path)
    capsys.readouterr()
    assert start("teacher", "--resume", str(tmp_path / "teacher")) == 2
    assert "on 2 processes, this run has 1" in capsys.readouterr().err
