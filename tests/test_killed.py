"""A run that is killed at any moment goes on from its last checkpoint to the same student, to the bit."""

import os
import signal
import sys

import pytest
import torch
import yaml

import students
import train
from distill import surgery
from distill.data.shapes import CLASSES
from distill.ema import EMA


@pytest.fixture
def start(settings, build_tiny, on_processes, monkeypatch, tmp_path):
    """`train.py` on so many processes, on two steps each of three epochs, with a cut before the second."""
    teacher = build_tiny(class_names=list(CLASSES), channels=24)
    students.save(teacher, tmp_path / "teacher")
    settings |= {"teacher": {"path": str(tmp_path / "teacher")}, "train": {"epochs": 3, "save_minutes": 1e-6}}
    settings["pruning"] |= {"start": 1, "end": 1, "every": 1}
    monkeypatch.setattr("distill.interruption.ASK_EVERY", 1)
    monkeypatch.setattr("distill.pictures.album.Album.update", lambda *arguments, **more: None)

    def start(name, number, killed_at=None):
        folder = tmp_path / name
        path = folder.with_suffix(".yaml")
        settings["data"]["batch_size"] = 4 // number
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(folder)}))
        arguments = ["--resume", str(folder)] if folder.exists() else [str(path)]
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])

        def act():
            if killed_at:
                kill_at(*killed_at)
            return train.main()

        return on_processes(number, act)

    return start


def kill_at(place, epoch):
    """Ends this process by SIGKILL: in a step, in a cut, or while half of a checkpoint is written; epochs from 0."""
    update, cut, save, fit, folder = EMA.update, surgery.cut_everywhere, torch.save, train.fit, []

    def fit_of(run):
        folder.append(run.folder.checkpoints)
        return fit(run)

    def update_or_die(ema, module):
        update(ema, module)
        if place == "step" and (folder[0] / f"epoch_{epoch:04d}_step_000001.pt").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def die_in_a_cut(*arguments):
        cut(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_half(state, file):
        save(state, file)
        if state["progress"]["epoch"] == epoch:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    train.fit, EMA.update = fit_of, update_or_die
    surgery.cut_everywhere = die_in_a_cut if place == "cut" else cut
    torch.save = save_half if place == "checkpoint" else save


@pytest.mark.parametrize("number", [1, 2])
def test_killed_thrice(start, number, tmp_path):
    assert [one.status for one in start("whole", number)] == [0] * number
    for place, epoch in (("step", 0), ("cut", 1), ("checkpoint", 2)):
        ended = start("broken", number, (place, epoch))
        assert -signal.SIGKILL in [one.status for one in ended], ended[0].said
    assert list((tmp_path / "broken/checkpoints").glob("*.tmp"))  # half a one, never taken
    ended = start("broken", number)
    assert [one.status for one in ended] == [0] * number, ended[0].said
    assert "resumed: 1 of 3 epochs are done, 2 steps of the next" in ended[0].said
    assert not list((tmp_path / "broken/checkpoints").glob("*.tmp"))
    for file in ("model.safetensors", "plans.json"):
        ours, theirs = (tmp_path / name / "student" / file for name in ("broken", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert len(students.load(tmp_path / "broken/student").plans) == 1
