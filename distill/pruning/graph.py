"""Which channels belong together (the dependency graph of DepGraph, Fang 2023, arXiv 2301.12900), and which must stay.

`distill.pruning.channels` follows the channels; here those that go through the same tensors become groups, and a trial
cut shows whether the network's own code goes along.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.distiller import Distiller
from distill.measure import on_meta
from distill.pruning.channels import Channels, Entry
from distill.pruning.trace import Rehearsal, Tracer
from students.plan import Plan, apply_plan, named_tensors

OUTPUT = "what it gives means something by its place"


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group's channels run through, or a number that counts them.

    Attributes:
        name: the tensor's name in the traced module; a number's, see `Plan`.
        dim: its dimension; None for a number.
        positions: indices in that dimension.
        channels: for each position, the channel of the group that it belongs to.
    """

    name: str
    dim: int | None
    positions: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together with all their counterparts in other layers.

    Attributes:
        name: the layer that the group was found from.
        width: how many channels it has; one of them may stand for several of a layer that only go at once.
        members: every tensor dimension that loses an index when a channel goes.
        numbers: every number that becomes less then.
        size: neighbours in the layer that one channel stands for: 8 where whole groups of 8 of a convolution go.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    numbers: tuple[Member, ...] = ()
    size: int = 1

    def step(self, round_to: int) -> int:
        """Fewest channels whose neighbours are a multiple of `round_to` together."""
        return round_to // math.gcd(round_to, self.size)

    def entries(self, gone: Set[int]) -> dict[tuple[str, int | None], set[int]]:
        """What goes with some of its channels: indices by name and dimension."""
        return {
            (member.name, member.dim): {p for p, channel in zip(member.positions, member.channels) if channel in gone}
            for member in (*self.members, *self.numbers)
        }


@dataclass(frozen=True)
class ChannelGraph:
    """What of a student and its adapters may be narrowed.

    Attributes:
        groups: all channels that may go; those that run through most layers first, of these the ones nearest to the
            outputs.
        whole: why other layers than the output layers keep outputs, by the layer's name.
        summed: parameters and buffers along whose first dimension lie channels that are added to others, as those of a
            residual branch are to its input.
    """

    groups: list[ChannelGroup]
    whole: dict[str, str]
    summed: frozenset[str] = frozenset()


def find_groups(unit: Distiller, image_size: tuple[int, int]) -> list[ChannelGroup]:
    """All groups of a student and its adapters that may be narrowed, see `trace_channels`."""
    return trace_channels(unit, image_size).groups


def trace_channels(unit: Distiller, image_size: tuple[int, int]) -> ChannelGraph:
    """Finds what may be narrowed, and why the rest may not.

    Nothing is computed and the unit is not touched: a copy is traced on the meta device. Then channels are taken from
    every group of that copy and it runs again: where an operation gives another width than foretold, or fails, the
    network's code counts on a width that cannot change, so the channels there stay, and it is tried again.

    Args:
        unit: the student with its adapters.
        image_size: height and width, pixels, of the image to trace with.

    Raises:
        ValueError: the unit's code cannot be followed even where nothing is cut.
    """
    skeleton = on_meta(unit).eval()
    tensors, image = named_tensors(skeleton), torch.empty(1, 3, *image_size, device="meta")
    with torch.no_grad():
        skeleton.traced_outputs(image)  # what code computes once and keeps, such as anchors, is out of the way
    tracer = Tracer(skeleton)
    tracer.run(image)
    known = tracer.channels
    for layer in skeleton.output_layers:
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            known.freeze(known[tensor][:1], OUTPUT)
    channel_of = known.resolve()
    while True:
        bundles = _bundle(known, channel_of)
        groups = _make_groups(bundles, known, channel_of, tensors)
        removed, gone = _some_of_each(groups, bundles)
        rehearsal = Rehearsal(tracer.steps, ~np.isin(channel_of, gone))
        trial = copy.deepcopy(skeleton)
        apply_plan([(trial, Plan.from_removed(removed, tensors))])
        if rehearsal.passes(trial, image):
            return ChannelGraph(groups, _left_whole(known, channel_of, bundles), _summed(tracer, channel_of))
        _blame(tracer, channel_of, rehearsal.number)


Bundle = dict[int, list[Entry]]  # of channels that go through the same tensors equally often: where each lies


def _bundle(known: Channels, channel_of: np.ndarray) -> list[Bundle]:
    """All channels that may go, in bundles ordered as `ChannelGraph.groups` says.

    Args:
        known: what was traced.
        channel_of: (labels,) the channel that each label belongs to.
    """
    frozen = set(channel_of[list(known.frozen)].tolist())
    free: Bundle = {}
    for entry, channel in zip(known.entries, channel_of.tolist()):
        if channel not in frozen and entry.name:
            free.setdefault(channel, []).append(entry)
    bundles: dict[tuple, Bundle] = {}
    for channel, entries in free.items():
        passed = Counter((entry.name, entry.dim) for entry in entries)
        bundles.setdefault(tuple(sorted(passed.items())), {})[channel] = entries
    chosen = [
        (len(passed), bundle)
        for passed, bundle in reversed(bundles.items())
        # one channel must stay; and inner widths of a term are not deployed, so nothing is won by cutting them
        if len(bundle) > 1 and any(name.startswith("student.") for (name, _), _ in passed)
    ]
    return [bundle for _, bundle in sorted(chosen, key=lambda pair: pair[0], reverse=True)]


def _make_groups(
    bundles: Sequence[Bundle], known: Channels, channel_of: np.ndarray, tensors: dict[str, Tensor]
) -> list[ChannelGroup]:
    """The bundles as groups, each named after the first layer that makes its channels."""
    order = {name: place for place, name in enumerate(tensors)}
    groups, names = [], Counter()
    for bundle in bundles:
        spots = sorted({entry[:2] for entry in next(iter(bundle.values()))}, key=lambda spot: (order[spot[0]], spot[1]))
        indices: dict[tuple[str, int], list[tuple[int, int]]] = {spot: [] for spot in spots}
        for number, entries in enumerate(bundle.values()):
            for name, dim, index in entries:
                indices[name, dim].append((index, number))
        members = (Member(*spot, *zip(*sorted(pairs))) for spot, pairs in indices.items())
        number_of = {channel: number for number, channel in enumerate(bundle)}
        numbers = []
        for name, labels in known.numbers.items():
            counted = [(i, number_of[c]) for i, c in enumerate(channel_of[labels].tolist()) if c in number_of]
            numbers += [Member(name, None, *zip(*counted))] if counted else []
        root = next((spot for spot in spots if spot[1] == 0 and tensors[spot[0]].dim() > 1), spots[0])
        layer = root[0].rpartition(".")[0]
        names[layer] += 1
        run = [index for index, number in sorted(indices[root]) if number == 0]
        groups.append(
            ChannelGroup(
                layer if names[layer] == 1 else f"{layer} ({names[layer]})",
                len(bundle),
                tuple(members),
                tuple(numbers),
                len(run) if run[-1] - run[0] == len(run) - 1 else 1,
            )
        )
    return groups


def _some_of_each(
    groups: Sequence[ChannelGroup], bundles: Sequence[Bundle]
) -> tuple[dict[tuple[str, int | None], set[int]], list[int]]:
    """What a trial cut removes, and which of all channels these are.

    The first of a group, many of its second half, and unlike many of groups side by side: so code that splits a group
    at a place of its own, or takes halves to be alike, gives itself away.
    """
    removed: dict[tuple[str, int | None], set[int]] = {}
    gone: list[int] = []
    for place, (group, bundle) in enumerate(zip(groups, bundles)):
        half = range(1, group.width)[group.width // 2 :]
        some = {0, *(number for number in half if number % (2 + place % 3))}
        gone += [channel for number, channel in enumerate(bundle) if number in some]
        for spot, indices in group.entries(some).items():
            removed.setdefault(spot, set()).update(indices)
    return removed, gone


def _blame(tracer: Tracer, channel_of: np.ndarray, number: int) -> None:
    """Freezes what runs through the operation that failed, or the nearest that has channels which could have gone.

    The same code elsewhere would fail likewise, so operations of the same kind in modules of the same class freeze too.

    Raises:
        ValueError: there is nothing left to freeze.
    """
    known = tracer.channels
    frozen = channel_of[list(known.frozen)]
    touched = (step for step in tracer.steps if step.labels)
    near = sorted(touched, key=lambda step: (abs(step.number - number), step.number))
    reason = f"the code of {known.place(near[0].module)} counts on its width"
    for step in near:
        if np.isin(channel_of[np.concatenate(step.labels)], frozen).all():
            continue
        code = type(step.module)
        of_torch = code.__module__.startswith("torch.nn.")  # right in itself: the fault is in what calls it
        for other in tracer.steps:
            if other is step or (not of_torch and (other.operation, type(other.module)) == (step.operation, code)):
                known.freeze(other.labels, reason)
        return
    raise ValueError("its code does not run twice alike")


def _left_whole(known: Channels, channel_of: np.ndarray, bundles: Sequence[Bundle]) -> dict[str, str]:
    """Why layers of the student keep outputs: by the layer's name, the reason for the first of them."""
    reasons: dict[int, str] = {}
    for label, reason in known.frozen.items():
        reasons.setdefault(int(channel_of[label]), reason)
    free = {channel for bundle in bundles for channel in bundle}
    whole: dict[str, str] = {}
    for (name, dim, _), channel in zip(known.entries, channel_of.tolist()):
        layer, _, leaf = name.rpartition(".")
        if channel not in free and dim == 0 and leaf == "weight" and layer.startswith("student."):
            reason = reasons.get(channel, "its channels can only go all at once")
            if reason != OUTPUT:
                whole.setdefault(layer, reason)
    return whole


def _summed(tracer: Tracer, channel_of: np.ndarray) -> frozenset[str]:
    """Whose channels meet in a sum of two maps."""
    sums = (step.inputs for step in tracer.steps if step.operation == "add" and len(step.inputs) == 2)
    met = {int(channel) for maps in sums for labels in maps for channel in channel_of[labels]}
    entries = zip(tracer.channels.entries, channel_of.tolist())
    return frozenset(entry.name for entry, channel in entries if entry.name and entry.dim == 0 and channel in met)
