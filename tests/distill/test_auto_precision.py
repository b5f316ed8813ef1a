"""`precision: auto`: what is tried, what is exact enough, and that a run keeps to what it has chosen."""

import json

import pytest
import torch
from accelerate import Accelerator

from distill import precision
from distill.data import Batch
from distill.distiller import Distiller
from distill.footprint import blank
from distill.precision import Trial, Way, describe, fastest, recorded, settle, try_all, try_student, try_teacher, ways
from distill.report import Report
from distill.run_folder import RunFolder
from distill.terms import TERMS
from teachers import Teacher

CPU = torch.device("cpu")
PLAIN, LAST, HALF = ways(CPU, train=True)


def test_what_is_tried():
    assert list(map(str, ways(CPU, train=False))) == ["float32", "float32 channels_last", "bfloat16 channels_last"]
    cuda = torch.device("cuda")
    assert ways(cuda, train=False)[-1] == Way("float16") and Way("float16") not in ways(cuda, train=True)


def passes(**seconds):
    """Passes of given durations by a clock that only they move, and how often each was run."""
    clock, runs = [0.0], dict.fromkeys(seconds, 0)

    def build(name, duration):
        def run():
            clock[0] += duration
            runs[name] += 1
            return name

        return run

    return {way: build(*item) for way, item in zip((PLAIN, LAST, HALF), seconds.items())}, clock, runs


def distance(errors):
    return lambda result, expected: errors[result]


def test_the_fastest_that_is_exact_enough(monkeypatch):
    tried, clock, _ = passes(plain=0.3, last=0.2, half=0.1)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    found = try_all(tried, distance({"plain": 0.0, "last": 1e-6, "half": 0.01}), 0.02, CPU)
    assert [trial.seconds for trial in found.values()] == pytest.approx([0.3, 0.2, 0.1])
    assert fastest(found) == HALF
    found = try_all(tried, distance({"plain": 0.0, "last": 1e-6, "half": 0.03}), 0.02, CPU)
    assert fastest(found) == LAST and not found[HALF].exact
    found = try_all(tried, distance({"plain": 0.0, "last": 1e-6, "half": float("nan")}), 0.02, CPU)
    assert fastest(found) == LAST


def test_what_is_hopeless_is_tried_once_and_all_is_bounded(monkeypatch):
    tried, clock, runs = passes(plain=3.0, last=2.0, half=40.0)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    found = try_all(tried, distance(dict.fromkeys(runs, 0.0)), 0.02, CPU)
    assert runs == {"plain": 2, "last": 2, "half": 1}  # one round takes longer than there is time
    assert fastest(found) == LAST and found[HALF].seconds == 40.0
    tried, clock, runs = passes(plain=0.01, last=0.01, half=0.01)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    try_all(tried, distance(dict.fromkeys(runs, 0.0)), 0.02, CPU)
    assert set(runs.values()) == {1 + precision.ROUNDS}


def test_what_cannot_run_is_left_out():
    def fail():
        raise RuntimeError("no such kernel")

    found = try_all({PLAIN: lambda: "a", HALF: fail}, lambda *results: 0.0, 0.02, CPU)
    assert fastest(found) == PLAIN and "bfloat16 channels_last cannot run" in describe(found)
    with pytest.raises(RuntimeError, match="no such kernel"):
        try_all({PLAIN: fail}, lambda *results: 0.0, 0.02, CPU)


def test_a_line_of_what_was_found():
    trials = {PLAIN: Trial(0.02, 0.0, True), LAST: Trial(0.01, 1e-6, True), HALF: Trial(0.09, 0.031, False)}
    assert describe(trials) == (
        "float32 20 ms, float32 channels_last 10 ms, bfloat16 channels_last 90 ms (off by 3.1%, too much)"
    )


def test_a_teacher_is_tried_and_stays_as_it_is(build_tiny, images):
    detector = build_tiny()
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    found = try_teacher(detector, CPU, images)
    assert list(found) == ways(CPU, train=False)
    assert found[PLAIN].error == 0 and found[LAST].error < 1e-4 < found[HALF].error < 0.02
    assert all(torch.equal(before[name], tensor) for name, tensor in detector.state_dict().items())


def test_a_student_is_tried_and_stays_as_it_is(build_tiny):
    student, detector = build_tiny(), build_tiny(seed=1, channels=24)
    unit = Distiller(student, {"mgd": TERMS["mgd"](student, detector)})  # which draws
    before = {name: tensor.clone() for name, tensor in unit.state_dict().items()}
    images, targets = blank(2, (64, 64), CPU)
    drawn = torch.random.get_rng_state()
    found = try_student(unit, {"teacher": Teacher(detector)}, CPU, Batch(images, targets, [], []))
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert found[PLAIN].error == 0 and found[LAST].error < 1e-4 < found[HALF].error
    assert all(torch.equal(before[name], tensor) for name, tensor in unit.state_dict().items())
    assert all(p.grad is None for p in unit.parameters()) and unit.half is None


def test_a_unit_runs_as_it_is_told(build_tiny):
    unit, seen = Distiller(build_tiny()).train(), []
    unit.student.backbone.register_forward_hook(lambda module, inputs, maps: seen.append(maps[0].dtype))
    images, targets = blank(2, (64, 64), CPU)
    exact, _ = unit(images, targets)
    unit.run_as("bfloat16", torch.channels_last)
    half, _ = unit(images, targets)
    assert seen == [torch.float32, torch.bfloat16] and half.dtype == torch.float32
    assert half.item() != exact.item() and half.item() == pytest.approx(exact.item(), rel=0.05)


def test_a_run_keeps_to_what_it_has_chosen(tmp_path):
    report, folder, accelerator, tried = Report(None, enabled=False), RunFolder(tmp_path), Accelerator(), []

    def attempt(seconds):
        def trials():
            tried.append(seconds)
            return {PLAIN: Trial(seconds, 0.0, True), LAST: Trial(0.5, 0.0, True)}

        return trials

    assert settle("train.precision", attempt(0.1), folder, accelerator, report) == PLAIN
    # slower now, and asked again, as after --resume
    assert settle("train.precision", attempt(0.9), folder, accelerator, report) == PLAIN and tried == [0.1]
    assert settle("teacher.precision", attempt(0.9), folder, accelerator, report) == LAST
    written = json.loads((tmp_path / "precision.json").read_text())
    assert written["train.precision"] == {"precision": "float32", "channels_last": False}
    assert recorded("teacher.precision", "auto", folder) == LAST
    assert recorded("teacher.precision", "bfloat16", folder) == HALF
    assert settle("train.precision", attempt(0.9), None, accelerator, report) == LAST  # a dry run writes nothing


def test_two_processes_take_the_choice_of_one(tmp_path, on_processes):
    def choose():
        accelerator = Accelerator()
        slow = 0.1 + 0.8 * accelerator.process_index  # the second would choose otherwise
        trials = {PLAIN: Trial(slow, 0.0, True), LAST: Trial(0.5, 0.0, True)}
        return tuple(settle("train.precision", lambda: trials, None, accelerator, Report(None, enabled=False)))

    ended = on_processes(2, choose)
    assert [one.value for one in ended] == [("float32", False)] * 2, [one.said for one in ended]
