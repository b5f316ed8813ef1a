"""What a cut takes from each group, in words and numbers that a person can read."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distill.pruning.cost import Cost
from distill.pruning.graph import ChannelGroup
from distill.pruning.limits import layers_of
from students.plan import Plan


def account(
    groups: Sequence[ChannelGroup], scores: Sequence[Tensor], plan: Plan, tensors: dict[str, Tensor], cost: Cost
) -> list[dict[str, Any]]:
    """An entry for each group, JSON-friendly.

    Args:
        groups: all of the unit, uncut.
        scores: (width,) of each group, as its importance gives them.
        plan: the cut.
        tensors: of the unit, by name.
        cost: in MACs, of the unit.

    Returns:
        `layers`, widths `before` and `after`, mean importance of the channels that are `kept` and that are `removed`,
        None where none is, and `macs_saved`: by this group, once those above it have been cut; they sum up to what the
        plan saves.
    """
    kept = {spot: set(cut.keep) for cut in plan.cuts for spot in cut.slices}
    removed: dict[tuple[str, int | None], set[int]] = {}
    left, entries = cost.now(), []
    for group, score in zip(groups, scores):
        first = group.members[0]
        staying = kept.get((first.name, first.dim))
        gone = {c for p, c in zip(first.positions, first.channels) if staying is not None and p not in staying}
        for spot, indices in group.entries(gone).items():
            removed.setdefault(spot, set()).update(indices)
        before, left = left, cost.after(Plan.from_removed(removed, tensors))
        stays = [channel for channel in range(group.width) if channel not in gone]
        entries.append(
            {
                "layers": layers_of(group),
                "before": group.width * group.size,
                "after": len(stays) * group.size,
                "kept": float(score[stays].mean()),
                "removed": float(score[sorted(gone)].mean()) if gone else None,
                "macs_saved": int(before - left),
            }
        )
    return entries
