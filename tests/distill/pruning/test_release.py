"""Wrappers come off before a cut; those of two processes are in tests/test_distributed.py."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from distill.distributed import release
from distill.pruning.pruner import Pruner, cut_everywhere


def test_a_compiled_unit_is_released_cut_and_compiled_anew(make_trained, monkeypatch):
    AcceleratorState._reset_state()
    unit, ema, optimizer, _ = make_trained()
    accelerator, resets = Accelerator(cpu=True, dynamo_backend="eager"), []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    pruner = Pruner((64, 64), 0.7, [0], ranking="global")
    pruner.check(unit)
    compiled = accelerator.prepare_model(unit)
    assert compiled is not unit and accelerator._models == [unit]
    del compiled
    release(accelerator, unit)
    assert accelerator._models == [] and resets == [True]
    cut_everywhere(pruner.plan(unit, 0), unit, ema, optimizer)
    again = accelerator.prepare_model(unit)
    AcceleratorState._reset_state()
    assert accelerator._models == [unit] and again._orig_mod is unit


def test_mixed_precision_comes_back_after_a_cut():
    AcceleratorState._reset_state()  # precision is one for the whole process
    layer, accelerator = torch.nn.Sequential(torch.nn.Linear(2, 2)), Accelerator(cpu=True, mixed_precision="bf16")
    seen = []
    layer[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for _ in range(3):
        accelerator.prepare_model(layer)(torch.rand(1, 2))
        release(accelerator, layer)
        layer(torch.rand(1, 2))
    AcceleratorState._reset_state()
    assert seen == [True, False] * 3
