"""From scores within groups to scores that one threshold can be held against."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.pruning.graph import ChannelGroup, Member
from distill.pruning.importance import Importance


class Curve(NamedTuple):
    """What cutting a group alone does.

    Attributes:
        width: channels of the uncut group.
        shares: of them that go, ascending.
        harms: what each does.
    """

    width: int
    shares: Sequence[float]
    harms: Sequence[float]


def rank_together(scores: Sequence[Tensor], uncut_widths: Sequence[int]) -> list[Tensor]:
    """Scores as ranks among the channels of all these groups, so that one threshold leaves the same share of each set.

    Norms of pretrained and of new layers, or of early and late ones, are not on one scale; ranks among like channels
    are. A set of one group gives every group the same share; what was cut before counts as ranked lowest.

    Args:
        scores: (width,) of the channels that are left, for each group.
        uncut_widths: channels that the groups had before any cut.

    Returns:
        (width,) in (0, 1] for each group, 1 for the best.
    """
    joined, uncut = torch.cat(list(scores)), sum(uncut_widths)
    ranks = (joined.argsort(stable=True).argsort() + 1 + uncut - len(joined)) / uncut
    return list(ranks.split([len(score) for score in scores]))


def rank_by_structure(
    groups: Sequence[ChannelGroup], scores: Sequence[Tensor], uncut_widths: Sequence[int], tensors: Mapping[str, Tensor]
) -> list[Tensor]:
    """Ranks among groups of the same structure (isomorphic pruning, Fang 2024, arXiv 2407.04616), as `rank_together`.

    Two groups are alike if their channels run through the same kinds of tensors: as many of each name, dimension and
    kernel. Widths may differ.
    """
    alike: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        parts = [
            (member.name.rpartition(".")[2], member.dim, tuple(tensors[member.name].shape[2:]))
            for member in group.members
            if member.name.startswith("student.")
        ]
        alike.setdefault(tuple(sorted(parts)), []).append(number)
    ranked: dict[int, Tensor] = {}
    for numbers in alike.values():
        together = rank_together([scores[n] for n in numbers], [uncut_widths[n] for n in numbers])
        ranked.update(zip(numbers, together))
    return [ranked[number] for number in range(len(groups))]


def rank_by_harm(scores: Tensor, curve: Curve) -> Tensor:
    """Scores as the harm that was measured when all channels up to each were cut.

    Between the shares that were tried it is interpolated; it never falls as more goes, and beyond the last share it
    rises so steeply that channels there go last of all.

    Args:
        scores: (width,) of the channels that are left.
        curve: the group's.

    Returns:
        (width,) float64.
    """
    shares = torch.tensor([0.0, *curve.shares], dtype=torch.float64)
    harms = torch.tensor([0.0, *curve.harms], dtype=torch.float64).cummax(dim=0).values
    gone = curve.width - len(scores)
    share = (scores.argsort(stable=True).argsort() + 1 + gone).double() / curve.width
    right = torch.searchsorted(shares, share).clamp(max=len(shares) - 1)
    left = right - 1
    part = ((share - shares[left]) / (shares[right] - shares[left])).clamp(max=1)
    steep = 1e3 * (1 + harms[-1])
    # the last summand keeps the order of channels where the curve is flat
    return harms[left].lerp(harms[right], part) + steep * (share - shares[-1]).clamp(min=0) + 1e-9 * share


def score_greedily(importance: Importance, group: ChannelGroup, tensors: Mapping[str, Tensor], step: int) -> Tensor:
    """Scores of a group's channels as they go, `step` at a time: those that went are left out of later statistics.

    For importances that compare a channel with the others of its group. A score is never below those of the channels
    that went before. (width,) float32 on the CPU.
    """
    scores, left, least = torch.empty(group.width), torch.arange(group.width), -torch.inf
    while len(left):
        now = importance.score(_restricted(group, left), tensors, None)
        order = now.argsort(stable=True)
        going, staying = order[:step], order[step:]
        scores[left[going]] = now[going].clamp(min=least)
        least = float(scores[left[going]].max())
        left = left[staying.sort().values]
    return scores


def _restricted(group: ChannelGroup, channels: Tensor) -> ChannelGroup:
    """The group as if only these channels were left, numbered anew; tensors keep their positions."""
    numbers = {channel: number for number, channel in enumerate(channels.tolist())}
    members = []
    for member in group.members:
        kept = [(p, numbers[c]) for p, c in zip(member.positions, member.channels) if c in numbers]
        positions, renumbered = zip(*kept)
        members.append(Member(member.name, member.dim, positions, renumbered))
    return ChannelGroup(group.name, len(numbers), tuple(members))
