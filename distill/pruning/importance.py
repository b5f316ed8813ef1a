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


def rank_within_group(scores: Tensor, uncut_width: int) -> Tensor:
    """Scores as ranks, so that one threshold leaves the same share of every group's uncut width.

    Norms of pretrained and of new layers, or of early and late ones, are not on one scale; ranks within a group are.

    Args:
        scores: (width,) of the channels that are left.
        uncut_width: channels that the group had before any cut.

    Returns:
        (width,) in (0, 1], 1 for the best.
    """
    gone = uncut_width - len(scores)
    return (scores.argsort(stable=True).argsort() + 1 + gone) / uncut_width


IMPORTANCES = {"group_l1": group_l1}
