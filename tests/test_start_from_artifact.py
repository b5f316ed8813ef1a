"""Runs whose student is a detector that is there already, cuts included."""

import csv
import json
import sys

import pytest
import torch
import yaml

import students
import train
from distill import factory
from distill.config import check_config
from distill.data.shapes import CLASSES
from distill.errors import UserError
from distill.measure import count_macs
from students import Plan
from students.artifact import cut


class Interrupted(Exception):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def small(build_tiny, tmp_path):
    """The folder of a detector for the scenes' classes whose first block has lost 8 of its 32 inner channels."""
    detector = build_tiny(seed=3, class_names=list(CLASSES))
    name = "backbone.body.layer1.0."
    tensors = {f"{name}{tensor}": dim for tensor, dim in (("conv1.weight", 0), ("bn1.weight", 0), ("bn1.bias", 0))}
    tensors |= {f"{name}bn1.running_mean": 0, f"{name}bn1.running_var": 0, f"{name}conv2.weight": 1}
    removed = {(tensor, dim): set(range(8)) for tensor, dim in tensors.items()}
    cut(detector, Plan.from_removed(removed, dict(detector.state_dict())))
    students.save(detector, tmp_path / "small", {"image_size": [64, 64]})
    return str(tmp_path / "small")


@pytest.fixture
def start(settings, tmp_path, monkeypatch):
    """`python train.py`, in this process, into the folder of that name."""

    def start(name, *arguments):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        return train.main()

    return start


def test_it_starts_with_the_weights_and_the_cuts_of_the_folder(settings, small):
    config = check_config(settings | {"student": {"path": small}}, "here")
    student, there = factory.build_student(config, list(CLASSES)), students.load(small)
    assert student.training and len(student.plans) == 1
    own = student.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in there.state_dict().items())
    # what a run folder holds says the same
    assert check_config(config.model_dump(mode="json"), "there").student == config.student


def test_classes_follow_the_data(settings, small, build_tiny, tmp_path):
    names = list(CLASSES)
    config = check_config(settings | {"student": {"path": small}}, "here")
    turned = factory.build_student(config, names[::-1])
    bias, there = turned.head.class_logits.bias, students.load(small).head.class_logits.bias
    assert turned.class_names == names[::-1] and torch.equal(bias, there.flip(0))

    with pytest.raises(UserError, match=r"^student.path: .*small does not know dog; name them in"):
        factory.build_student(config, [*names, "dog"])
    mapped = check_config(settings | {"student": {"path": small, "class_map": {names[0]: "dog"}}}, "here")
    assert factory.build_student(mapped, ["dog"]).class_names == ["dog"]
    anew = check_config(settings | {"student": {"path": small, "new_head": True}}, "here")
    student = factory.build_student(anew, ["dog", "cat"])
    assert student.class_names == ["dog", "cat"] and student.notes == ["its class layers start anew"]
    assert len(student.plans) == 1 and student.head.class_logits.out_channels == 2
    assert torch.equal(student.head.box_distances.weight, students.load(small).head.box_distances.weight)
    # and what is saved rebuilds
    students.save(student, tmp_path / "anew")
    assert students.load(tmp_path / "anew").class_names == ["dog", "cat"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"student": {"path": "x", "backbone": "resnet18"}}, r"student: path is .* so backbone cannot be chosen"),
        (
            {"output_dir": "runs/a", "student": {"path": "runs/../runs/a/student"}},
            "output_dir: runs/a holds the student",
        ),
        ({"student": {"path": "x", "new_head": True, "class_map": {"a": "b"}}}, "class_map has nothing to map"),
        ({"teacher": {"detector": {"path": "x"}, "train": {}}}, r"teacher: detector is one to train .* path: x$"),
    ],
)
def test_settings_that_contradict_are_told(settings, section, message):
    with pytest.raises(UserError, match=message) as caught:
        check_config(settings | section, "here")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_none_is_told(settings, tmp_path):
    config = check_config(settings | {"student": {"path": str(tmp_path)}}, "here")
    with pytest.raises(UserError, match=r"^student.path: .* is no detector folder, it has no detector.json; give"):
        factory.build_student(config, list(CLASSES))


def test_such_a_student_is_cut_on_and_an_interrupted_run_ends_alike(start, settings, small, tmp_path, monkeypatch):
    settings |= {"student": {"path": small}, "teacher": {"path": small}, "balance": "none"}
    settings["losses"] = {"mimic": {"name": "plain_mimic", "adapter": "select"}}
    settings["pruning"] = {"target": 0.7, "start": 1, "end": 1, "round_to": 4}
    settings["train"] = {"epochs": 3}
    assert start("whole") == 0
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    student, there = students.load(whole / "student"), students.load(small)
    assert student.plans[0] == there.plans[0] and len(student.plans) == 2
    summary = json.loads((whole / "summary.json").read_text())
    # shares are of what the run started with
    uncut = count_macs(there, (64, 64))
    assert summary["student_before"]["macs"] == uncut
    assert 0.5 * uncut < summary["student"]["macs"] <= 0.7 * uncut
    assert f"`{small}`" in (whole / "README.md").read_text()

    original = train.train_epoch

    def train_epoch(run, *arguments):
        losses = original(run, *arguments)
        if len(run.folder.read_results()) == 2:  # in the third epoch, after the cut
            raise Interrupted
        return losses

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    with pytest.raises(Interrupted):
        start("broken")
    monkeypatch.setattr(train, "train_epoch", original)
    assert start("broken", "--resume", str(broken)) == 0
    for file in ("model.safetensors", "plans.json", "detector.json"):
        assert (broken / "student" / file).read_bytes() == (whole / "student" / file).read_bytes(), file
    rows = [list(csv.DictReader((run / "results.csv").open())) for run in (whole, broken)]
    assert [row["mimic"] for row in rows[0]] == [row["mimic"] for row in rows[1]]
