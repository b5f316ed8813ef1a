import copy
import time

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
    seconds = {}

    def run_whole(model, images):
        assert images.shape == (1, 3, *SIZE) and not model.training and not torch.is_grad_enabled()
        time.sleep(seconds.setdefault(count_parameters(model), 0.002 if seconds else 0.008))

    monkeypatch.setattr("distill.pruning.stopwatch.run_whole", run_whole)
    cost = MeasuredCost(unit, Stopwatch(unit.student, SIZE))
    before = count_parameters(unit.student)
    groups = find_groups(unit, SIZE)
    plan = make_plan(groups[:1], [torch.arange(float(groups[0].width))], [8], named_tensors(unit))
    assert cost.now() == pytest.approx(1, rel=0.1)
    assert cost.after(Plan(())) == pytest.approx(1, rel=0.1) and len(seconds) == 1
    assert cost.after(plan) == pytest.approx(0.25, rel=0.2) and min(seconds) < before
    assert count_parameters(unit.student) == before and unit.training


def test_in_onnx_runtime_it_is_the_exported_student_that_is_timed(build_unit, monkeypatch):
    pytest.importorskip("onnxruntime")
    unit = build_unit()
    before = copy.deepcopy(unit.state_dict())
    monkeypatch.setattr("distill.pruning.stopwatch.run_whole", None)
    assert 0.2 < Stopwatch(unit.student, SIZE, runtime="onnx").share(unit.student) < 5
    assert unit.training and all(torch.equal(tensor, before[name]) for name, tensor in unit.state_dict().items())
