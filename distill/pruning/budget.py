"""From scores and a budget to a plan."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill.pruning.graph import ChannelGroup
from students import Detector, Plan
from students.plan import apply_plan, named_tensors


def keep_counts(
    scores: Sequence[Tensor],
    threshold: float,
    round_to: int,
    floors: Sequence[int],
    sizes: Sequence[int] | None = None,
) -> list[int]:
    """How many channels of each group stay when those that score below a global threshold go.

    A count is rounded to the nearest multiple of `round_to` that is not below the group's floor, and never more than
    there are; a group that loses nothing keeps the width it has. Where one of a group's channels stands for several
    of its layer (`sizes`), multiples and floors are of the layer's.
    """
    counts = []
    for score, floor, size in zip(scores, floors, sizes or [1] * len(scores)):
        wanted = int((score >= threshold).sum())
        step = round_to // math.gcd(round_to, size)
        nearest = max(round(wanted / step), math.ceil(floor / size / step)) * step
        counts.append(min(nearest, len(score)) if wanted < len(score) else wanted)
    return counts


def make_plan(
    groups: Sequence[ChannelGroup], scores: Sequence[Tensor], counts: Sequence[int], tensors: dict[str, Tensor]
) -> Plan:
    """The plan that leaves each group its `counts` best channels."""
    removed: dict[tuple[str, int | None], set[int]] = {}
    for group, score, count in zip(groups, scores, counts):
        lowest = torch.argsort(score, stable=True)[: group.width - count]
        gone = set(lowest.tolist())
        if not gone:
            continue
        for spot, indices in group.entries(gone).items():
            removed.setdefault(spot, set()).update(indices)
    return Plan.from_removed(removed, tensors)


def meet_macs(
    unit: nn.Module,
    student: Detector,
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    macs: float,
    count_macs: Callable[[Detector], int],
    round_to: int,
    floors: Sequence[int],
) -> tuple[Plan, int]:
    """The mildest plan that leaves the student at most `macs`, found by bisection.

    One threshold on the scores holds for all groups; but of those that lose channels at the last step of the threshold,
    only as many do as it takes.

    Args:
        unit: the traced module, which holds the student as `student`.
        student: the student, whose MACs count.
        groups: all groups of the unit.
        scores: (width,) for each group.
        macs: multiply-accumulates that may be left.
        count_macs: MACs of a student; it gets a copy on the meta device.
        round_to: widths become multiples of this.
        floors: least width of each group.

    Returns:
        The plan and the MACs that it leaves; where even the heaviest plan leaves more, that one.
    """
    tensors, skeleton = named_tensors(unit), copy.deepcopy(student).to("meta")

    def attempt(counts: Sequence[int]) -> tuple[Plan, int]:
        plan = make_plan(groups, scores, counts, tensors)
        trial = copy.deepcopy(skeleton)
        apply_plan([(trial, plan.below("student."))])
        return plan, count_macs(trial)

    # thresholds between two scores cut alike, so bisect over the scores themselves
    thresholds = torch.unique(torch.cat([*scores, torch.tensor([float("inf")])])).tolist()
    sizes = [group.size for group in groups]
    counts_at = lambda n: keep_counts(scores, thresholds[n], round_to, floors, sizes)  # noqa: E731
    low, high = 0, len(thresholds) - 1
    best = attempt(counts_at(high))
    while low < high:
        middle = (low + high) // 2
        tried = attempt(counts_at(middle))
        if tried[1] <= macs:
            best, high = tried, middle
        else:
            low = middle + 1
    if low == 0:
        return best

    # that threshold takes from several groups at once: give back what was not needed, the most valuable first
    milder, counts = counts_at(low - 1), counts_at(low)
    differing = [g for g in range(len(groups)) if milder[g] != counts[g]]
    value = {g: float(scores[g].sort().values[groups[g].width - milder[g]]) for g in differing}
    for g in sorted(differing, key=value.get, reverse=True) if len(differing) > 1 else ():
        tried = attempt([*counts[:g], milder[g], *counts[g + 1 :]])
        if tried[1] <= macs:
            best, counts[g] = tried, milder[g]
    return best
