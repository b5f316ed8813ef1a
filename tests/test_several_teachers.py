"""Whole runs with several teachers and with unlabelled images, on the smallest scenes."""

import csv
import json
import sys

import pytest
import torch
import yaml

import students
import train
from distill.data.shapes import CLASSES


@pytest.fixture
def start(settings, tmp_path, monkeypatch, capsys):
    """`python train.py`, in this process, into the folder of that name; what it said."""

    def start(name, *arguments, fails=None):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}, sort_keys=False))
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
def stranger(build_tiny, tmp_path):
    """The folder of a detector that has learnt other classes at other strides: two of ours, one by another name."""
    detector = build_tiny(class_names=["disk", "cat", "ring"], levels=(2, 3, 4), channels=24)
    torch.nn.init.constant_(detector.head.class_logits.bias, 0.0)  # sure enough to be heard
    students.save(detector, tmp_path / "stranger")
    return str(tmp_path / "stranger")


def results(run):
    with (run / "results.csv").open() as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


class Interrupted(Exception):
    """Stands for a power cut: nothing catches it."""


def test_two_teachers_unlabelled_images_a_cut_and_an_interruption(
    start, settings, stranger, scenes, tmp_path, monkeypatch
):
    settings["teachers"] = {
        "own": settings.pop("teacher"),
        "stranger": {"path": stranger, "class_map": {"disk": "disc"}, "precision": "bfloat16"},
    }
    settings["losses"] = {
        "soft_label": {"name": "dense_sigmoid", "teacher": "own"},
        "mask": {"name": "masked_mimic", "teacher": "own"},
        "strange_label": {"name": "dense_sigmoid", "teacher": "stranger", "weight": 0.5},
        "strange_boxes": {"name": "pseudo_label", "teacher": "stranger", "weight": 0.5},
    }
    settings["data"]["unlabelled"] = {"root": f"{scenes}/images/val", "ratio": 0.25, "score_threshold": 0.05}
    settings["pruning"] |= {"start": 1, "end": 1, "every": 1}
    settings["train"]["epochs"] = 3

    said = start("whole")
    whole = tmp_path / "whole"
    others = ", ".join(name for name in CLASSES if name not in ("disc", "ring"))
    for part in (
        "Teacher own",
        f"({stranger}); does not know {others}",
        "soft_label: dense_sigmoid x 1 of the task's gradient, mask: ",
        "Levels of stranger",
        "4 images, 25% of what is trained on; without the task's loss; mask: by what the teacher detects with a score",
        "teachers.own: is trained first, in",
    ):
        assert part in said.replace("\n", " "), part
    table = said.rpartition("latency of one image")[2].splitlines()[1:]
    assert [row[:16].strip() for row in table if row][2:] == [
        "teacher own", "teacher stranger", "student before c", "student",
    ]  # fmt: skip
    names = {path.relative_to(whole).as_posix() for path in whole.glob("*/*") if path.is_dir()}
    assert names == {"teachers/own", "teacher_runs/own"}
    assert {"soft_label", "mask", "strange_label", "strange_boxes"} <= set(results(whole)[0])
    summary = json.loads((whole / "summary.json").read_text())
    assert list(summary) == ["teachers", "student_before", "student", "cuts", "split", "epochs"]
    assert list(summary["teachers"]) == ["own", "stranger"]
    assert len(students.load(whole / "student").plans) == 1

    original = train.train_epoch

    def train_epoch(run, trained, loader, *arguments):
        losses = original(run, trained, loader, *arguments)
        if len(run.folder.read_results()) == 2:  # in the third epoch
            raise Interrupted
        return losses

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    start("broken", fails=Interrupted)
    monkeypatch.setattr(train, "train_epoch", original)
    broken = tmp_path / "broken"
    said = start("broken", "--resume", str(broken))
    assert "teachers.own: " in said and "is reused" in said and "resumed: 2 of 3 epochs are done" in said
    assert results(broken) == results(whole)
    weights = "student/model.safetensors"
    assert (broken / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_teacher_alone_teaches(start, settings, scenes, build_tiny, tmp_path):
    teacher = build_tiny(class_names=list(CLASSES), channels=24)
    torch.nn.init.constant_(teacher.head.class_logits.bias, 0.0)
    students.save(teacher, tmp_path / "teacher")
    settings |= {"teacher": {"path": str(tmp_path / "teacher")}, "pruning": None, "balance": "none"}
    settings["losses"] = {"soft_label": {"name": "dense_sigmoid"}, "fgd": {"name": "fgd"}}
    settings["data"] |= {"train": None, "unlabelled": {"root": f"{scenes}/images/train"}}
    settings["train"]["epochs"] = 2
    said = start("run")
    assert "nothing to train, 4 val" in said and "8 images, all that is trained on; without the task's loss" in said
    rows = results(tmp_path / "run")
    assert [float(row["task"]) for row in rows] == [0, 0]
    assert float(rows[1]["soft_label"]) < float(rows[0]["soft_label"])
    assert students.load(tmp_path / "run/student").class_names == list(CLASSES)  # those of val
