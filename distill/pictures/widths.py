"""How wide a detector's layers were and are."""

from dataclasses import dataclass

from torch import nn

from students import Detector


@dataclass(frozen=True)
class Width:
    """Output channels that several layers share, since they are added or run through each other.

    Attributes:
        layers: names, in the order of the network.
        before: channels before any cut.
        after: channels left.
    """

    layers: tuple[str, ...]
    before: int
    after: int


def group_widths(detector: Detector) -> list[Width]:
    """The widths that cuts have changed, in the order of the network; layers that every cut treated alike are one."""
    seen: dict[str, list[tuple[int, int]]] = {}  # by weight: (number of the plan, number of the cut in it)
    before: dict[str, int] = {}
    for number, plan in enumerate(detector.plans):
        for index, cut in enumerate(plan.cuts):
            for name, dim in cut.slices:
                if dim == 0:
                    seen.setdefault(name, []).append((number, index))
                    before.setdefault(name, cut.width)
    groups: dict[tuple, list[str]] = {}
    after: dict[tuple, tuple[int, int]] = {}
    for name, module in detector.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and f"{name}.weight" in seen:
            key = tuple(seen[f"{name}.weight"])
            groups.setdefault(key, []).append(name)
            after[key] = (before[f"{name}.weight"], module.weight.shape[0])
    return [Width(tuple(layers), *after[key]) for key, layers in groups.items()]
