import copy

import pytest
import torch

from distill.measure import count_parameters
from distill.pruning.budget import make_plan
from distill.pruning.graph import find_groups
from distill.pruning.stopwatch import MeasuredCost, Stopwatch
from students.plan import Plan, named_tensors

SIZE = (64, 64)


def test_shares_of_the_uncut_students_time(build_unit, monkeypatch):
    unit = build_unit(channels=32)
    before, ran = count_parameters(unit.student), []

    def run_whole(model, images):
        assert images.shape == (1, 3, *SIZE) and not model.training and not torch.is_grad_enabled()
        ran.append(count_parameters(model))

    def time_in_turns(passes, *_):
        """The machine is ten times slower at the last turn; a pass takes as long as it has parameters."""
        for run in passes:
            run()
        return [[size, size, 10 * size] for size in ran[-2:]]

    monkeypatch.setattr("distill.measure.run_whole", run_whole)
    monkeypatch.setattr("distill.pruning.stopwatch.time_in_turns", time_in_turns)
    cost = MeasuredCost(unit, Stopwatch(unit.student, SIZE))
    groups = find_groups(unit, SIZE)
    plan = make_plan(groups[:1], [torch.arange(float(groups[0].width))], [8], named_tensors(unit))
    assert (cost.now(), cost.after(Plan(()))) == (1, 1)
    share = cost.after(plan)
    assert ran[-2] == before > ran[-1] and share == ran[-1] / before
    assert count_parameters(unit.student) == before and unit.training


def test_the_memory_format_of_training_is_no_matter(build_unit, monkeypatch):
    unit, seen = build_unit(), []

    def run_whole(model, images):
        seen.append({x.is_contiguous() for x in model.parameters()})

    monkeypatch.setattr("distill.measure.run_whole", run_whole)
    watch = Stopwatch(unit.student, SIZE)
    unit.student.to(memory_format=torch.channels_last)
    watch.share(unit.student)
    assert len(seen) == 2 * (5 + 2 * 30) and all(found == {True} for found in seen)


def test_in_onnx_runtime_it_is_the_exported_student_that_is_timed(build_unit, monkeypatch):
    pytest.importorskip("onnxruntime")
    unit = build_unit()
    before = copy.deepcopy(unit.state_dict())
    monkeypatch.setattr("distill.measure.run_whole", None)
    assert 0.2 < Stopwatch(unit.student, SIZE, runtime="onnx").share(unit.student) < 5
    assert unit.training and all(torch.equal(tensor, before[name]) for name, tensor in unit.state_dict().items())
