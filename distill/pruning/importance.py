"""How much each channel of a group matters."""

import torch
from torch import Tensor

from distill.pruning.graph import ChannelGroup


def group_l1(group: ChannelGroup, tensors: dict[str, Tensor]) -> Tensor:
    """Sum of absolute weights over every filter and input slice that a channel owns (Li 2017, arXiv 1608.08710).

    Divided by the group's mean, so that channels of different groups can be ranked together.

    Args:
        group: the channels.
        tensors: the traced module's tensors by name.

    Returns:
        (width,) float32 on the CPU.
    """
    scores = torch.zeros(group.width)
    for member in group.members:
        weight = tensors[member.name]
        if weight.dim() < 2:
            continue  # norms and biases scale what the filters give; their absolute size says little by itself
        others = [dim for dim in range(weight.dim()) if dim != member.dim]
        norms = weight.detach().float().abs().sum(dim=others).cpu()
        scores.index_add_(0, torch.tensor(member.channels), norms[torch.tensor(member.positions)])
    return scores / scores.mean().clamp(min=1e-12)


IMPORTANCES = {"group_l1": group_l1}
