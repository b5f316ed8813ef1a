"""Whole runs, and refusals, of a teacher that gives features only."""

import csv
import json
import sys

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

import students
import train
from distill import factory
from distill.config import check_config
from distill.data.shapes import CLASSES
from distill.errors import UserError


@pytest.fixture
def settings(settings, tmp_path):
    """A small vision transformer teaches, by a file of weights."""
    torch.manual_seed(5)
    path = str(tmp_path / "vit.safetensors")
    save_file(timm.create_model("test_vit").state_dict(), path)
    settings["teacher"] = {"features": {"backbone": "test_vit", "weights": path}, "precision": "bfloat16"}
    settings["losses"] = {"mimic": {"name": "fgd"}, "attention": {"name": "attention_transfer"}}
    settings["pruning"] |= {"start": 1, "end": 1, "every": 1}
    settings["train"] = {"epochs": 2}
    return settings


def build_all(settings):
    config = check_config(settings, "here")
    student = factory.build_student(config, list(CLASSES))
    return factory.build_unit(config, student, factory.build_teachers(config, list(CLASSES), student))


def test_a_transformer_teaches_a_student_that_is_cut(settings, tmp_path, monkeypatch, capsys):
    settings["data"]["unlabelled"] = {"root": f"{settings['data']['root']}/images/val", "ratio": 0.25}
    settings["losses"]["mimic"] = {"name": "mgd"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "a.yaml")])
    assert train.main() == 0
    said, run = capsys.readouterr(), tmp_path / "run"
    assert "warning" not in (said.out + said.err).lower()
    assert "features of test_vit: " in said.out and "vit.safetensors; teaches by its features)" in said.out
    assert "of teacher" not in said.out
    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["mimic"]) > 0 and float(row["attention"]) > 0 for row in rows) and "teacher_ap" not in rows[0]
    assert json.loads((run / "summary.json").read_text())["teacher"] is None
    assert "taught by `test_vit`" in (run / "README.md").read_text()
    assert len(students.load(run / "student").plans) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"losses": {"soft": {"name": "dense_sigmoid"}}},
            "^losses.soft.name: dense_sigmoid goes by a head; from features of test_vit learn plain_mimic, pkd, mask",
        ),
        ({"losses": {"soft": {"name": "score_weighted_mimic"}}}, "score_weighted_mimic goes by a head; from"),
        ({"teacher.features.weights": "none"}, "^teacher.features.weights: an untrained network has nothing to teach"),
        ({"teacher.features.weights": "x.pth"}, "^teacher.features.weights: no file x.pth; give the path"),
        (
            {"data.image_size": 80, "teacher.image_size": 100},
            r"^teacher.features: test_vit does not take images of 100x100 px .*give teacher.image_size=\[80, 80\], so",
        ),
        (
            {"data.image_size": 72},
            r"give data.image_size multiples of 16, and teacher.image_size 16/16 of it$",
        ),
        (
            {"student.levels": [3], "teacher.image_size": 1024},
            r"levels \(strides \[8\]\) and the teacher's \(\[0.5, 1.0, 2.0\]\) have "
            "none in common .*; change student.levels, or the size that the teacher sees images at",
        ),
    ],
)
def test_what_cannot_be_learnt_is_told(settings, changes, message):
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        section = settings
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    with pytest.raises(UserError, match=message) as caught:
        build_all(settings)
    assert "\n" not in str(caught.value)


def test_boxes_are_missed_on_unlabelled_images_only(settings):
    assert "mimic" in build_all(settings).terms
    settings["data"]["unlabelled"] = {"root": "x"}
    with pytest.raises(UserError, match=r"^losses.mimic.name: fgd goes by boxes, which .* learn pl"):
        build_all(settings)
