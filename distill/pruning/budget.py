"""From scores and a budget to a plan."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.pruning.graph import ChannelGroup
from students import Plan

CLOSE = 0.98  # share of a budget that counts as having met it
EXCHANGES = 4  # groups that are tried to get steps back for others


def keep_counts(
    scores: Sequence[Tensor], threshold: float, steps: Sequence[int], floors: Sequence[int], caps: Sequence[int]
) -> list[int]:
    """How many channels of each group stay when those that score below a global threshold go.

    A count is rounded to the nearest multiple of the group's step that is not below its floor nor, if one is left,
    above its cap, and never more than there are; a group that loses nothing keeps the width it has.
    """
    counts = []
    for score, step, floor, cap in zip(scores, steps, floors, caps):
        wanted = min(int((score >= threshold).sum()), cap)
        nearest = min(round(wanted / step), cap // step if cap < len(score) else wanted)
        nearest = max(nearest, math.ceil(floor / step)) * step
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


def meet_budget(
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    tensors: dict[str, Tensor],
    budget: float,
    cost: Callable[[Plan], float],
    steps: Sequence[int],
    floors: Sequence[int],
    caps: Sequence[int] | None = None,
) -> tuple[Plan, float]:
    """The mildest plan that leaves at most a budget, found by bisection.

    One threshold on the scores holds for all groups; but of those that lose channels at the last step of the threshold,
    only as many do as it takes. Where the budget is still not met closely, other groups get steps back, too, and at
    last steps are exchanged: where those that one group gets back are too many, another loses what fits.

    Args:
        groups: all groups.
        scores: (width,) for each group.
        tensors: the traced module's tensors by name.
        budget: what may be left, in the currency of `cost`.
        cost: what a plan leaves.
        steps: what the width of each group becomes a multiple of.
        floors: least width of each group.
        caps: greatest width of each group; what they have if None.

    Returns:
        The plan and what it leaves; where even the heaviest plan leaves more, that one.
    """
    caps = [group.width for group in groups] if caps is None else caps

    def attempt(counts: Sequence[int]) -> tuple[Plan, float]:
        plan = make_plan(groups, scores, counts, tensors)
        return plan, cost(plan)

    # thresholds between two scores cut alike, so bisect over the scores themselves
    thresholds = torch.unique(torch.cat([*scores, torch.tensor([float("inf")])])).tolist()
    counts_at = lambda n: keep_counts(scores, thresholds[n], steps, floors, caps)  # noqa: E731
    low, high = 0, len(thresholds) - 1
    best = attempt(counts_at(high))
    while low < high:
        middle = (low + high) // 2
        tried = attempt(counts_at(middle))
        if tried[1] <= budget:
            best, high = tried, middle
        else:
            low = middle + 1
    if low == 0 or best[1] > budget:
        return best

    milder, counts = counts_at(low - 1), counts_at(low)
    ordered = [score.sort().values for score in scores]
    refused: set[int] = set()
    while True:
        # that threshold takes from several groups at once: give back what was not needed, the most valuable first
        narrowed = [g for g in range(len(groups)) if g not in refused and counts[g] < min(groups[g].width, caps[g])]
        if best[1] >= CLOSE * budget:
            narrowed = [g for g in narrowed if counts[g] < milder[g]]
        if not narrowed:
            break
        g = max(narrowed, key=lambda g: float(ordered[g][groups[g].width - counts[g] - 1]))
        wider = min((counts[g] // steps[g] + 1) * steps[g], groups[g].width)
        tried = attempt([*counts[:g], wider, *counts[g + 1 :]])
        if wider <= caps[g] and tried[1] <= budget:
            best, counts[g] = tried, wider
        else:
            refused.add(g)

    def at_risk(g: int, count: int) -> float:
        """The highest score that a group loses at a width."""
        return float(ordered[g][groups[g].width - count - 1])

    cut = [g for g in range(len(groups)) if counts[g] < min(groups[g].width, caps[g])]
    for g in sorted(cut, key=lambda g: at_risk(g, counts[g]), reverse=True)[:EXCHANGES]:
        wider = min((counts[g] // steps[g] + 1) * steps[g], caps[g])
        narrower = {h: (math.ceil(counts[h] / steps[h]) - 1) * steps[h] for h in range(len(groups)) if h != g}
        fitting = [h for h, count in narrower.items() if count >= max(floors[h], 1)]
        before = counts
        for h in sorted(fitting, key=lambda h: at_risk(h, narrower[h])):
            if best[1] >= CLOSE * budget:
                return best
            changed = [{g: wider, h: narrower[h]}.get(i, count) for i, count in enumerate(before)]
            tried = attempt(changed)
            if best[1] < tried[1] <= budget:
                best, counts = tried, changed
    return best


def meet_measured(
    plan_at: Callable[[float], Plan], cost: Callable[[Plan], float], budget: float, now: float, tries: int = 8
) -> tuple[Plan, float]:
    """The mildest plan found that leaves at most a budget of what has to be measured, such as latency.

    Plans are told apart by what they leave of something that can be counted. Bisection that goes by the line through
    the last two points needs few measurements, as the one nearly follows the other.

    Args:
        plan_at: from a share of what can be counted to the mildest plan that leaves at most that.
        cost: what a plan leaves, measured.
        budget: what may be left.
        now: what there is.
        tries: plans that are measured, unless one leaves what is nearly the budget before.

    Returns:
        The plan and what it leaves; where none of them left little enough, the heaviest that there is.
    """
    best: tuple[Plan, float] | None = None
    low, high = (0.0, 0.0), (1.0, now)  # share of what can be counted, and what it leaves; the first is a guess
    aim = (1 + CLOSE) / 2 * budget
    share = min(1.0, aim / now)
    for _ in range(tries):
        plan = plan_at(share)
        left = cost(plan)
        if left <= budget:
            best = (plan, left)  # milder than any before it
            if left >= CLOSE * budget or share == 1:
                break
            low = line_from = (share, left)
        else:
            line_from = low if best else high
            high = (share, left)
        line_to = high
        rise = (line_to[1] - line_from[1]) / ((line_to[0] - line_from[0]) or 1)
        margin = (high[0] - low[0]) / 4
        share = high[0] + (aim - high[1]) / rise if rise > 0 else (low[0] + high[0]) / 2
        share = min(max(share, low[0] + margin), high[0] - margin)
    if best is None:
        heaviest = plan_at(0.0)
        best = (heaviest, cost(heaviest))
    return best
