"""What a student costs, now and after a cut that is only planned: the budgets of pruning."""

import math

import torch
from torch import Tensor, nn

from distill.distiller import Distiller
from distill.measure import count_macs, count_uses, on_meta
from distill.pruning.graph import ChannelGroup
from students.plan import Plan

# what a budget is in, by its name in settings; all but latency, see `distill.pruning.stopwatch`, can be counted
BUDGETS = {"macs": "MACs", "params": "parameters", "memory": "activations", "latency": "latency"}


class Cost:
    """What the student of a unit costs in one currency, as it is at present.

    `macs` are multiply-accumulates of one image; `params` parameters; `memory` the values that convolutions and linear
    layers give for one image, which is what training keeps. They follow from shapes, so trying a plan takes no time.

    Args:
        unit: the student with its adapters, which cost nothing: they are not deployed.
        currency: a key of `BUDGETS` but latency.
        image_size: height and width, pixels.
    """

    def __init__(self, unit: Distiller, currency: str, image_size: tuple[int, int]):
        self.currency = currency
        self._shapes = {f"student.{name}": list(p.shape) for name, p in unit.student.named_parameters()}
        self._uses: dict[str, int] = {}
        self._fixed = 0
        if currency in ("macs", "memory"):
            skeleton = on_meta(unit.student)
            self._uses = {f"student.{name}": n for name, n in count_uses(skeleton, image_size).items()}
            layers = {name: unit.get_submodule(name.removesuffix(".weight")) for name in self._uses}
            self._transposed = {n for n, x in layers.items() if isinstance(x, nn.modules.conv._ConvTransposeNd)}
        if currency == "macs":
            # products of activations with each other, as in attention; of these no less is counted after a cut
            self._fixed = count_macs(skeleton, image_size) - self._sum(self._shapes)

    def now(self) -> float:
        """What the student costs uncut."""
        return self.after(Plan(()))

    def after(self, plan: Plan) -> float:
        """What the plan, made for the unit, would leave of it."""
        gone = tuple(f"{name}." for name, _ in plan.blocks)
        shapes = {name: list(shape) for name, shape in self._shapes.items() if not name.startswith(gone)}
        for cut in plan.cuts:
            for name, dim in cut.slices:
                if name in shapes:
                    shapes[name][dim] = len(cut.keep)
        return self._fixed + self._sum(shapes)

    def by_channel(self, group: ChannelGroup) -> Tensor:
        """(width,) what goes with each channel while all others stay."""
        costs = torch.zeros(group.width)
        for member in group.members:
            shape = self._shapes.get(member.name)
            if shape is None:  # a buffer or an adapter
                continue
            entries = math.prod(shape) // shape[member.dim]
            if self.currency == "macs":
                each = self._uses.get(member.name, 0) * entries
            elif self.currency == "memory":
                gives = member.dim == self._output_dim(member.name)
                each = self._uses.get(member.name, 0) if gives else 0
            else:
                each = entries
            costs.index_add_(0, torch.tensor(member.channels), torch.full((len(member.channels),), float(each)))
        return costs

    def _sum(self, shapes: dict[str, list[int]]) -> int:
        match self.currency:
            case "macs":
                return sum(n * math.prod(shapes[name]) for name, n in self._uses.items() if name in shapes)
            case "memory":
                uses = [(name, n) for name, n in self._uses.items() if name in shapes]
                return sum(n * shapes[name][self._output_dim(name)] for name, n in uses)
        return sum(math.prod(shape) for shape in shapes.values())

    def _output_dim(self, name: str) -> int:
        return 1 if name in self._transposed else 0
