import json
import re

import numpy as np
import pytest
from PIL import Image

import students
from distill.model_card import write_model_card
from distill.run_folder import RunFolder

SCORES = {"ap50": 0.5, "ap75": 0.25, "params": 1000, "macs": 2000, "latency_ms": 1.5}


@pytest.fixture
def run(tmp_path, build_tiny):
    config = {"data": {"root": "data/pets", "image_size": [64, 96]}, "student": {"backbone": "test_resnet"},
              "teacher": {"detector": {"backbone": "resnet50"}}, "train": {"epochs": 3}}  # fmt: skip
    run = RunFolder.create(tmp_path / "run", config, overwrite=False)
    students.save(build_tiny(), run.student, {"image_size": [64, 96], "resize": "letterbox"})
    entries = {
        "teacher": SCORES | {"ap": 0.5},
        "student_before": SCORES | {"ap": 0.2, "macs": 4000, "epoch": 1},
        "student": SCORES | {"ap": 0.4, "per_class": {"a": 0.5, "b": None}},
    }
    run.write_summary({**entries, "split": "test", "epochs": 3})
    return run


def test_card_says_what_it_is_and_what_it_is_worth(run):
    write_model_card(run)
    card = run.card_file.read_text()
    assert card.startswith("# run\n")
    assert "for 2 classes (a, b), made by distill: `test_resnet`, taught by `resnet50`, 2.0 times fewer MACs" in card
    assert "- Data: data/pets, 96x64 px" in card and "On the split `test` at 96x64 px" in card
    assert "| student | 0.400 | 0.500 | 0.250 | 80% | 1.00K | 2.00K | 1.5 ms |" in card
    assert "| a | 0.500 |\n| b | - |" in card


def test_a_plain_student_has_no_teacher_and_no_cuts(run):
    run.write_summary(run.summary | {"teacher": None, "student_before": None})
    run.save_config(run.config | {"teacher": None})
    write_model_card(run)
    card = run.card_file.read_text()
    assert "made by distill: `test_resnet`.\n" in card and "of teacher" not in card


def test_its_code_runs(run, tmp_path, monkeypatch, capsys):
    # a detector that is sure of one thing everywhere
    detector = students.load(run.student)
    detector.head.class_logits.bias.data[:] = detector.head.class_logits.bias.data.new_tensor([-20.0, 4.0])
    detector.head.class_logits.weight.data.zero_()
    students.save(detector, run.student, students.read_info(run.student))
    write_model_card(run)
    (code,) = re.findall(r"```python\n(.*?)```", run.card_file.read_text(), re.DOTALL)
    monkeypatch.chdir(run.path)
    photo = "photo.jpg"  # as the card calls it
    Image.fromarray(np.zeros((300, 200, 3), np.uint8)).save(photo)
    exec(compile(code, "card", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("b 0.98 [") for line in lines)
    boxes = np.array([json.loads(line.partition("0.98 ")[2]) for line in lines])
    # in the photograph's own pixels: they reach beyond the 64 rows that the detector saw, and not beyond its 300
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 200 and 64 < boxes[:, 3].max() <= 300
