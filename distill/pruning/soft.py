"""Soft pruning: channels are set to 0 and may come back, before they are cut at last."""

import torch

from distill.distiller import Distiller
from students import Plan
from students.plan import named_tensors


@torch.no_grad()
def silence_channels(plan: Plan, unit: Distiller) -> None:
    """Sets to 0, in place of cutting them off, the filters that a plan removes (SFP, He 2018, arXiv 1808.06866).

    These are the weights and biases of the convolutions and linear layers that make the channels. As in the paper norms
    stay, so that gradients still reach the filters, and so does the optimizer's state: what a filter was doing is what
    it goes on with. An averaged copy follows by itself.

    Args:
        plan: made for the unit as it is.
        unit: the student with its adapters.
    """
    tensors = named_tensors(unit)
    for cut in plan.cuts:
        gone = sorted(set(range(cut.width)) - set(cut.keep))
        for name, dim in cut.slices:
            layer = unit.get_submodule(name.rpartition(".")[0])
            is_filter = isinstance(layer, torch.nn.modules.conv._ConvNd | torch.nn.Linear)
            outputs = 1 if getattr(layer, "transposed", False) and name.endswith(".weight") else 0
            if is_filter and name.startswith("student.") and dim == outputs:
                tensors[name].index_fill_(dim, torch.tensor(gone, device=tensors[name].device), 0.0)
