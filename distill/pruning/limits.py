"""How far each group may be cut, and how far it must be."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from distill.pruning.graph import ChannelGroup


class Limits:
    """Least and most that groups keep of their width, for all and by the names of the student's layers.

    A pattern speaks of the width of the layers that it matches, which is that of their whole group. Where several
    match, the highest floor and the lowest cap hold, and the floor wins over the cap.

    Args:
        floor: share of its uncut width that every group keeps.
        keep: patterns, such as `backbone.body.layer1.*`, of layers that are left as wide as they are.
        limits: floor and cap, as shares of the uncut width, by pattern.
    """

    def __init__(
        self, floor: float = 0.0, keep: Sequence[str] = (), limits: Mapping[str, tuple[float, float]] | None = None
    ):
        self.floor, self.keep, self.limits = floor, tuple(keep), dict(limits or {})

    def check(self, groups: Iterable[ChannelGroup]) -> None:
        """Looks whether every pattern matches.

        Raises:
            ValueError: one matches no layer that could be narrowed; the message begins with its key.
        """
        names = sorted({name for group in groups for name in layers_of(group)})
        for key, patterns in (("keep", self.keep), ("limits", self.limits)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    near = difflib.get_close_matches(pattern, names, 1, cutoff=0.0)
                    such = f", such as {near[0]}" if near else ""
                    raise ValueError(
                        f"{key}: {pattern!r} matches none of the {len(names)} layers that can be cut{such}"
                    )

    def keeps(self, group: ChannelGroup) -> bool:
        """Whether a group is to be left as wide as it is."""
        return any(_matches(group, pattern) for pattern in self.keep)

    def of(self, group: ChannelGroup, uncut_width: int, step: int, done: float = 1.0) -> tuple[int, int]:
        """Fewest and most channels that a group keeps.

        Args:
            group: as it is now.
            uncut_width: channels that it had before any cut.
            step: what its width becomes a multiple of.
            done: what part of the way to the cap is due by now.
        """
        if self.keeps(group):
            return group.width, group.width
        found = [shares for pattern, shares in self.limits.items() if _matches(group, pattern)]
        least = max([self.floor, *(low for low, _ in found)])
        most = max(least, min([1.0, *(high for _, high in found)]))
        fewest = min(group.width, max(step, math.ceil(least * uncut_width)))
        return fewest, max(fewest, math.floor((1 - (1 - most) * done) * uncut_width))


def _matches(group: ChannelGroup, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in layers_of(group))


def layers_of(group: ChannelGroup) -> list[str]:
    """Names, within the student, of the layers that give the group its width; norms follow and are left out."""
    tensors = {member.name for member in group.members}
    owners = {member.name.rpartition(".")[0] for member in group.members if member.dim == 0}
    return sorted(
        name.removeprefix("student.")
        for name in owners
        if name.startswith("student.") and f"{name}.running_mean" not in tensors
    )
