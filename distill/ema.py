"""An exponential moving average of the student's weights: what is evaluated and kept."""

import copy

import torch
from torch import nn


class EMA:
    """A copy of a module whose tensors follow the module's slowly.

    Args:
        module: the module to follow.
        decay: share of the average that stays at each update; reached gradually, as (1 + n) / (10 + n) of n updates.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module's present tensors; counters in buffers are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(self.module.state_dict().values(), module.state_dict().values()))
        floating = [(mean, new) for mean, new in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floating], [new for _, new in floating], 1 - decay)
        for mean, new in pairs:
            if not mean.is_floating_point():
                mean.copy_(new)
