"""A whole run between two YOLO detectors, with mosaics and cuts, broken off and resumed."""

import json
import sys

import pytest
import torch
import yaml

import students
import train


class Interrupted(Exception):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def start(settings, tmp_path, monkeypatch):
    """`python train.py`, in this process, on a config whose output goes to the folder of that name."""
    settings["teacher"] = {"detector": {"name": "yolov7", "width": 0.125, "depth": 0.25}, "train": {"epochs": 1}}
    settings["student"] = {"name": "yolov5", "size": "n", "width": 0.125}
    settings["losses"] = {
        "scores": {"name": "dense_sigmoid"},
        "boxes": {"name": "box_mimic"},
        "features": {"name": "pkd"},
        "labels": {"name": "pseudo_label", "score_threshold": 0.0},
    }
    settings["data"]["augment"] = {"mosaic": 0.5, "horizontal_flip": 0.5}
    settings["train"] = {"epochs": 2}
    settings["pruning"] = {"target": 0.6, "epochs": [1], "round_to": 2}
    del settings["balance"]

    def start(name, *arguments):
        path = tmp_path / f"{name}.yaml"
        if (tmp_path / "whole" / "teacher").is_dir():
            settings["teacher"] = {"path": str(tmp_path / "whole" / "teacher")}
        path.write_text(yaml.safe_dump(settings | {"output_dir": str(tmp_path / name)}))
        monkeypatch.setattr(sys, "argv", ["train.py", *(arguments or [str(path)])])
        return train.main()

    return start


def test_a_run_between_yolo_detectors(start, tmp_path, monkeypatch, images):
    assert start("whole") == 0
    original, epochs = train.train_epoch, []

    def train_epoch(*arguments):
        epochs.append(original(*arguments))
        if len(epochs) == 2:
            raise Interrupted
        return epochs[0]

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", train_epoch)
        with pytest.raises(Interrupted):
            start("broken")
    assert start("broken", "--resume", str(tmp_path / "broken")) == 0

    found = []
    for name in ("whole", "broken"):
        student = students.load(tmp_path / name / "student")
        with torch.no_grad():
            found.append((student.state_dict(), student(images)))
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["student"]["macs"] <= 0.6 * summary["student_before"]["macs"]
        # the teacher is counted as it is deployed
        deployed = students.load(tmp_path / "whole" / "teacher").deployed()
        assert summary["teacher"]["params"] == sum(p.numel() for p in deployed.parameters())
    (ours, ours_said), (theirs, theirs_said) = found
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(map(torch.equal, ours_said.class_logits, theirs_said.class_logits))
