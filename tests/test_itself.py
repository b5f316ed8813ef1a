"""Runs whose teacher is the student itself: as it was before its first cut, or its own average."""

import csv
import json
import sys

import pytest
import torch
import yaml

import students
import train
from distill import factory, surgery
from distill.config import check_config
from distill.data.shapes import CLASSES
from distill.errors import UserError


class Interrupted(Exception):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def start(settings, tmp_path, monkeypatch, capsys):
    """`python train.py`, in this process, into the folder of that name; what it said."""
    settings |= {"balance": "none"}
    settings["pruning"] = {"target": 0.7, "start": 1, "end": 2, "round_to": 4}
    settings["train"] = {"epochs": 3}

    def start(name, *arguments, fails=None):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        capsys.readouterr()
        if fails:
            with pytest.raises(fails):
                train.main()
        else:
            assert train.main() == 0
        return capsys.readouterr().out

    return start


@pytest.fixture
def breaking(monkeypatch):
    """Lets the next run break off in the epoch of that number, counted from 1."""

    def at(epoch):
        original = train.train_epoch

        def train_epoch(run, *arguments):
            losses = original(run, *arguments)
            if len(run.folder.read_results()) == epoch - 1:
                monkeypatch.setattr(train, "train_epoch", original)
                raise Interrupted
            return losses

        monkeypatch.setattr(train, "train_epoch", train_epoch)

    return at


def rows(run):
    with (run / "results.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_the_student_before_its_first_cut_teaches_from_then_on(start, settings, breaking, tmp_path, monkeypatch):
    settings["teacher"] = "original"
    settings["losses"] = {"soft": {"name": "dense_sigmoid"}, "mimic": {"name": "mgd", "adapter": "select"}}
    seen = {}
    cut_everywhere = surgery.cut_everywhere

    def see(plan, unit, ema, *others):
        seen.setdefault("before", {name: x.clone() for name, x in ema.module.state_dict().items()})
        cut_everywhere(plan, unit, ema, *others)

    monkeypatch.setattr(surgery, "cut_everywhere", see)
    said, whole, broken = start("whole"), tmp_path / "whole", tmp_path / "broken"
    assert "the student before its first cut" in said
    first, *others = rows(whole)
    assert (float(first["soft"]), float(first["mimic"]), first["teacher_ap"]) == (0, 0, "")
    assert all(float(row["soft"]) > 0 and float(row["mimic"]) > 0 and row["teacher_ap"] for row in others)
    # it is the averaged student of that moment, to the bit, and no cut has changed it
    teacher = students.load(whole / "teacher")
    assert teacher.plans == [] and teacher.info["image_size"] == [64, 64]
    assert all(torch.equal(x, seen["before"][name]) for name, x in teacher.state_dict().items())
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["teacher"]["ap"] == summary["student_before"]["ap"]
    assert len(students.load(whole / "student").plans) == 2

    breaking(3)  # between the cuts
    start("broken", fails=Interrupted)
    start("broken", "--resume", str(broken))
    assert rows(broken) == rows(whole)
    for file in ("student/model.safetensors", "student/plans.json", "teacher/model.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file


def test_with_a_student_from_a_path_it_teaches_from_the_start(start, settings, breaking, build_tiny, tmp_path):
    students.save(build_tiny(seed=3, class_names=list(CLASSES)), tmp_path / "small")
    settings |= {"teacher": "original", "student": {"path": str(tmp_path / "small")}, "pruning": None}
    settings["losses"] = {"soft": {"name": "dense_sigmoid"}}
    settings["pruning"], settings["train"] = None, {"epochs": 2}
    start("whole")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert all(float(row["soft"]) > 0 for row in rows(whole))
    weights = "model.safetensors"
    assert (whole / "teacher" / weights).read_bytes() == (tmp_path / "small" / weights).read_bytes()
    breaking(2)
    start("broken", fails=Interrupted)
    # another detector has taken the folder's place meanwhile; what teaches stays
    students.save(build_tiny(seed=4, class_names=list(CLASSES)), tmp_path / "small")
    start("broken", "--resume", str(broken))
    assert rows(broken) == rows(whole)


def test_the_average_teaches_and_follows_the_cuts(start, settings, breaking, tmp_path):
    settings |= {"teacher": "ema", "guards": {"every": 1}}
    settings["losses"] = {"soft": {"name": "dense_sigmoid"}, "mimic": {"name": "mgd", "adapter": "select"}}
    said, whole, broken = start("whole"), tmp_path / "whole", tmp_path / "broken"
    assert "the student's own average" in said and "of teacher" not in said
    assert all(float(row["soft"]) > 0 and float(row["mimic"]) > 0 for row in rows(whole))
    assert "teacher_ap" not in rows(whole)[0]
    assert json.loads((whole / "summary.json").read_text())["teacher"] is None
    assert len(students.load(whole / "student").plans) == 2
    assert not (whole / "teacher").exists() and "own average" in (whole / "README.md").read_text()
    breaking(3)
    start("broken", fails=Interrupted)
    start("broken", "--resume", str(broken))
    assert rows(broken) == rows(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "original", "pruning": None}, r"teacher: original is the student before .* nothing cuts this one"),
        ({"teacher": "ema", "train": {"optimizer": {"ema": 0}}}, "teacher: ema needs an average; give train.optimizer"),
        ({"teacher": "orignal"}, r"teacher.itself: 'orignal' is not allowed; .* did you mean original\?"),
        ({"teacher": {"itself": "ema", "image_size": 128}}, "teacher: image_size is given, but the teacher is"),
        ({"teacher": {"itself": "ema", "class_map": {"a": "b"}}}, "teacher: class_map is for a teacher from a path"),
        ({"teacher": "original", "inherit": ["neck"]}, "inherit takes a teacher's tensors, but teacher is the student"),
        (
            {"teacher": "original", "student": {"path": "x", "new_head": True}},
            "teacher: original has the new, ",
        ),
    ],
)
def test_what_makes_no_sense_is_told(settings, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        check_config(settings | changes, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "way_out"),
    [
        ({"name": "pkd"}, "say losses.loss.adapter=select"),
        ({"name": "attention_guided"}, "choose another loss"),
        ({"name": "cross_kd"}, "choose another loss"),
        ({"name": "pkd", "adapter": "identity"}, None),
        ({"name": "attention_transfer"}, None),
        ({"name": "box_mimic"}, None),
    ],
)
def test_losses_that_cannot_follow_the_average_are_refused_where_it_is_cut(settings, loss, way_out):
    settings |= {"teacher": "ema", "losses": {"loss": loss}}
    for pruning in (None, settings["pruning"]):
        config = check_config(settings | {"pruning": pruning}, "here")
        student = factory.build_student(config, list(CLASSES))
        teachers = factory.build_teachers(config, list(CLASSES), student)
        if pruning and way_out:
            with pytest.raises(UserError, match=rf"^losses.loss.name: {loss['name']} has layers .*; {way_out}, or"):
                factory.build_unit(config, student, teachers)
        else:
            assert "loss" in factory.build_unit(config, student, teachers).terms
