"""Whole runs whose teacher is remembered, on the smallest scenes."""

import sys

import pytest
import yaml

import students
import train
from distill.data.shapes import CLASSES
from distill.distiller import Distiller
from teachers import TeacherCache


class Interrupted(Exception):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def settings(settings, build_tiny, tmp_path):
    """Three epochs over two views, mosaics among them, with a cut while all is new and one when all is known."""
    students.save(build_tiny(class_names=list(CLASSES), channels=24), tmp_path / "teacher")
    settings["teacher"] = {"path": str(tmp_path / "teacher"), "cache": str(tmp_path / "bank")}
    settings["data"]["augment"] = {"views": 2, "mosaic": 0.3, "crop": 0.5}
    settings["losses"]["pseudo"] = {"name": "pseudo_label", "weight": 0.5, "score_threshold": 0.005}
    settings["pruning"] |= {"start": 1, "end": 2, "every": 1}
    settings["train"]["epochs"] = 3
    settings["overwrite"] = True
    return settings


@pytest.fixture
def prepare(settings, tmp_path, monkeypatch):
    """Makes `python train.py` go for a folder of that name, and tells how to call it: status, batches looked at."""

    def prepare(name, *arguments):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        return counted_run

    return prepare


def counted_run():
    """The status of `train.py`, and how many batches of training the teacher itself was asked about."""
    recall, asked = TeacherCache.recall, []

    def recall_and_count(cache, shown, images, ask):
        return recall(cache, shown, images, lambda batch: asked.append(len(batch)) or ask(batch))

    TeacherCache.recall = recall_and_count
    try:
        return train.main(), len(asked)
    finally:
        TeacherCache.recall = recall


def student_of(folder):
    return (folder / "student/model.safetensors").read_bytes()


def test_asked_once_and_then_remembered(prepare, settings, tmp_path, capsys, monkeypatch):
    assert prepare("first")() == (0, 4)  # two epochs of two batches are new
    assert f"teacher.cache: {tmp_path}/bank: 8 images x 2 views x 6 kB = 97 kB, 0 of 16 rec" in capsys.readouterr().out
    assert prepare("second")() == (0, 0)
    assert "16 of 16 records there" in capsys.readouterr().out
    assert student_of(tmp_path / "first") == student_of(tmp_path / "second")

    # the same, where it breaks off in the middle of filling another folder: what was said is on disk, the step is lost
    settings["teacher"]["cache"] = str(tmp_path / "bank2")
    ask, steps = Distiller.ask, []

    def ask_or_break(unit, teachers, images, targets, metas=None):
        lessons = ask(unit, teachers, images, targets, metas)
        steps.extend([True] * (metas is not None))
        if len(steps) == 3:
            raise Interrupted
        return lessons

    monkeypatch.setattr(Distiller, "ask", ask_or_break)
    with pytest.raises(Interrupted):
        prepare("broken")()
    monkeypatch.setattr(Distiller, "ask", ask)
    assert prepare("broken", "--resume", str(tmp_path / "broken"))() == (0, 1)
    assert student_of(tmp_path / "first") == student_of(tmp_path / "broken")


def test_a_dry_run_tells_the_cost_and_a_stale_cache_is_refused(prepare, settings, tmp_path, capsys):
    dry = ["--dry-run", str(tmp_path / "dry.yaml")]
    assert prepare("dry", *dry)() == (0, 0)
    # P3 to P5 of 64x64 px are 84 cells, each of 24 channels; but only the head's 8 classes and 4 distances go with them
    assert (
        f"teacher.cache: {tmp_path}/bank: 8 images x 2 views x {84 * 36 * 2 / 1000:.0f} kB" in capsys.readouterr().out
    )
    assert not (tmp_path / "bank").exists()

    (tmp_path / "bank").mkdir()
    (tmp_path / "bank/notes.txt").write_text("x")
    assert prepare("stale")() == (2, 0)
    assert f"error: teacher.cache: {tmp_path}/bank holds other files (notes.txt); name" in capsys.readouterr().err
    assert not (tmp_path / "stale/student").exists()


def test_two_processes_fill_one_cache(prepare, settings, tmp_path, on_processes):
    settings["data"]["batch_size"] = 2
    del settings["pruning"]  # its looks take most of the time
    for name, asked in (("one", 4), ("other", 0)):
        ended = on_processes(2, prepare(name))
        assert [one.value for one in ended] == [(0, asked)] * 2, ended[0].said + ended[1].said
    assert "16 of 16 records there" in ended[0].said
    assert student_of(tmp_path / "one") == student_of(tmp_path / "other")
