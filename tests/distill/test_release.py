"""Wrappers come off before a cut, and go on again after it; those of two processes are in tests/test_distributed.py."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from distill.distributed import release


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
