"""What a step takes: parts that follow from the parameters, counted activations, and rows to read."""

import pytest
import torch
from torch import nn

from distill.distiller import Distiller
from distill.footprint import Footprint, count_kept, estimate, human_bytes
from distill.schema import Config
from distill.terms import TERMS
from teachers import Teacher


@pytest.fixture
def step(settings, build_tiny):
    def step(processes=1, half=None, **data):
        settings["data"] |= data
        student, teacher = build_tiny(), Teacher(build_tiny(seed=1, channels=24))
        unit = Distiller(student, {"mimic": TERMS["pkd"](student, teacher.detector)})
        unit.taught_by = {"mimic": "teacher"}
        before = [p.clone() for p in unit.state_dict().values()]
        found = estimate(Config(**settings), unit, {"teacher": teacher}, torch.device("cpu"), processes, half)
        assert all(torch.equal(*pair) for pair in zip(before, unit.state_dict().values()))
        return found, *(sum(p.numel() for p in m.parameters()) for m in (student, unit.terms)), teacher.bytes_held

    return step


def test_memory_by_part(step):
    found, student, adapters, teacher = step()
    memory = found.memory
    assert memory["student"] == 8 * student and memory["adapters"] == 8 * adapters
    assert memory["optimizer"] == 8 * (student + adapters)
    assert memory["average"] == 4 * student and memory["teacher"] == teacher
    twice = step(batch_size=8)[0].memory  # of 4
    for part in ("activations", "its outputs", "on the way"):
        assert twice[part] == pytest.approx(2 * memory[part])
    several, halves = step(processes=2, batch_size=4)[0].memory, step(half=torch.bfloat16)[0].memory
    assert several["student"] == 12 * student and halves["student"] == 10 * student
    assert halves["activations"] == pytest.approx(memory["activations"] / 2)
    assert found.macs["student"] > 0 and all(value >= 0 for value in found.seconds.values())


def test_passes_are_timed_in_the_precision_of_training(step, monkeypatch):
    seen, original = [], Distiller.task_loss

    def see(unit, output, targets):
        seen.append(output.class_logits[0].dtype)
        return original(unit, output, targets)

    monkeypatch.setattr(Distiller, "task_loss", see)
    step(half=torch.bfloat16)
    # what autograd keeps is counted in float32, and halved
    assert seen[0] is torch.float32 and set(seen[1:]) == {torch.bfloat16}


def test_what_autograd_keeps_is_counted_once(build_tiny, monkeypatch):
    """Of a convolution, the image; of a ReLU in place, its output: 3 and 8 maps of 64x64 float32."""
    unit = Distiller(build_tiny())
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True))
    unit.register_module("net", net)
    monkeypatch.setattr(unit, "losses", lambda images, targets, lessons: net(images))
    kept, outputs, largest = count_kept(unit, {}, (64, 64))
    assert (kept, outputs, largest) == ((3 + 8) * 64 * 64 * 4, 0, 8 * 64 * 64 * 4)


def test_rows():
    rows = Footprint({"student": 1.5e9, "teacher": 0.0}, {"student": 0.0123}, {"student": 2e9}).rows()
    assert rows["Memory"] == "about 1.50 GB a process: student 1.50 GB"
    assert rows["Step"] == "about 12 ms, loading aside: student 12 ms (student 2.00G MACs)"
    assert human_bytes(999) == "999 B" and human_bytes(2_000_000) == "2 MB"
