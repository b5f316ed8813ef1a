"""How much each channel of a group matters."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distill.pruning.graph import ChannelGroup
from distill.pruning.readers import active_share, map_rank, mean_magnitude, measure_gates, measure_responses
from distill.pruning.saliency import measure_saliency

# what was measured for an importance: by parameter or by group, see the functions in `distill.pruning` that measure
Evidence = Mapping[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """One way to say what channels are worth.

    Attributes:
        score: from a group, the traced module's tensors by name, and what was measured, to (width,) float32 on the CPU.
        measure: what has to be measured on batches beforehand, such as `measure_saliency`; None: weights say it all.
        relative: whether a channel's score changes as others of its group go.
    """

    score: Callable[[ChannelGroup, Mapping[str, Tensor], Evidence | None], Tensor]
    measure: Callable[..., Evidence] | None = None
    relative: bool = False


def group_l1(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """Sum of absolute weights over every filter and input slice that a channel owns (Li 2017, arXiv 1608.08710).

    Divided by the group's mean, so that channels of different groups can be ranked together. Norms and biases are left
    out: they scale what the filters give, and their absolute size says little by itself.

    Args:
        group: the channels.
        tensors: the traced module's tensors by name.
        evidence: not looked at.

    Returns:
        (width,) float32 on the CPU.
    """
    scores = sum_by_channel(group, {name: weight.abs() for name, weight in _weights(group, tensors).items()})
    return scores / scores.mean().clamp(min=1e-12)


def group_l2(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """Euclidean norm of all filters and input slices that a channel owns together; otherwise as `group_l1`."""
    scores = _squared_norms(group, tensors).sqrt()
    return scores / scores.mean().clamp(min=1e-12)


def fpgm(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """Distance of a channel's filters to all others of their layers: what lies in the middle can be spared.

    sum_j ||F_i - F_j||_2 within each layer (He 2019, arXiv 1811.00250), on signed weights, summed over the layers that
    make the group's channels; divided by the group's mean. Arguments and result as in `group_l1`.
    """
    scores = torch.zeros(group.width)
    for member in group.members:
        weight = tensors[member.name]
        if weight.dim() < 2 or member.dim != 0:
            continue
        filters = weight.detach().float().flatten(1).cpu()[torch.tensor(member.positions)]
        scores.index_add_(0, torch.tensor(member.channels), torch.cdist(filters, filters).sum(dim=1))
    return scores / scores.mean().clamp(min=1e-12)


def bn_scale(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """Sum of |gamma| over the batch norms that a channel runs through (network slimming, Liu 2017, arXiv 1708.06519).

    Not divided by anything: scales of all layers are compared as they are. Arguments and result as in `group_l1`.

    Raises:
        ValueError: no batch norm on the way of these channels.
    """
    names = {member.name for member in group.members}
    # only batch norms have running statistics beside their weight
    scales = {name for name in names if name.removesuffix("weight") + "running_mean" in tensors}
    if not scales:
        raise ValueError(f"no batch norm follows {group.name}, so it has no scale to go by; choose another importance")
    return sum_by_channel(group, {name: tensors[name].abs() for name in scales})


def lamp(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """A channel's squared norm against that of all in its group that are no smaller (LAMP, Lee 2021, arXiv 2010.07611).

    The paper scores single weights within a layer; here channels, by the squared norm of all that they own, within a
    group. The largest scores 1 in every group, so one threshold never takes all of one. Arguments and result as in
    `group_l1`.
    """
    squares = _squared_norms(group, tensors)
    order = squares.argsort(descending=True, stable=True)
    scores = torch.empty_like(squares)
    scores[order] = squares[order] / squares[order].cumsum(dim=0).clamp(min=1e-12)
    return scores


def random(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """Nothing known: the control. The same for a group of the same name and width. Otherwise as `group_l1`."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{group.name} {group.width}".encode()))
    return torch.rand(group.width, generator=generator)


def taylor(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """First-order Taylor on weights: the sum of (w dL/dw)^2 over all that a channel owns (Molchanov 2019, 1906.10771).

    Scores of all groups are on one scale, the squared change of the loss. The loss is whatever was measured: with the
    knowledge terms in it, what the teacher cares about counts too.

    Args:
        group: the channels.
        tensors: not looked at.
        evidence: of `measure_saliency`.

    Returns:
        (width,) float32 on the CPU.

    Raises:
        ValueError: all that these channels own is frozen.
    """
    assert evidence is not None, "taylor goes by gradients, which nobody measured"
    if not any(member.name in evidence for member in group.members):
        raise ValueError(f"taylor needs gradients, but {group.name} is frozen; choose taylor_gate or one by weights")
    return sum_by_channel(group, evidence)


def measured(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """What was measured for each channel, as it is: of `measure_gates` or `measure_responses`, by the group's name."""
    assert evidence is not None, "nobody measured what this importance goes by"
    return evidence[group.name]


def mean_activation(group: ChannelGroup, tensors: Mapping[str, Tensor], evidence: Evidence | None = None) -> Tensor:
    """Mean |activation| where the channel is read, divided by the group's mean; arguments as in `measured`."""
    scores = measured(group, tensors, evidence)
    return scores / scores.mean().clamp(min=1e-12)


def sum_by_channel(group: ChannelGroup, values: Mapping[str, Tensor]) -> Tensor:
    """(width,) the sum of all entries that go with each channel, over those members that have values."""
    sums = torch.zeros(group.width)
    for member in group.members:
        if member.name not in values:
            continue
        value = values[member.name].detach().float()
        others = [dim for dim in range(value.dim()) if dim != member.dim]
        slices = (value.sum(dim=others) if others else value).cpu()
        sums.index_add_(0, torch.tensor(member.channels), slices[torch.tensor(member.positions)])
    return sums


def _squared_norms(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    return sum_by_channel(group, {name: t.float().square() for name, t in _weights(group, tensors).items()})


def _weights(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of the tensors that a group runs through is a weight, by name."""
    names = dict.fromkeys(member.name for member in group.members)  # in their order, so that sums are always the same
    return {name: tensors[name].detach() for name in names if tensors[name].dim() > 1}


IMPORTANCES = {
    "group_l1": Importance(group_l1, relative=True),
    "group_l2": Importance(group_l2, relative=True),
    "fpgm": Importance(fpgm, relative=True),
    "bn_scale": Importance(bn_scale),
    "lamp": Importance(lamp),
    "taylor": Importance(taylor, measure_saliency),
    "taylor_gate": Importance(measured, measure_gates),
    "group_fisher": Importance(measured, partial(measure_gates, per_image=True)),
    "mean_activation": Importance(mean_activation, partial(measure_responses, statistic=mean_magnitude)),
    "apoz": Importance(measured, partial(measure_responses, statistic=active_share)),
    "hrank": Importance(measured, partial(measure_responses, statistic=map_rank)),
    "random": Importance(random),
}
