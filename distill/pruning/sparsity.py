"""Sparse training: penalties that draw what can be spared towards 0 before it is cut."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.distiller import Distiller
from distill.pruning.graph import ChannelGroup, trace_channels
from students.plan import named_tensors

SMALL = 1e-2  # a batch-norm scale below it is as good as 0


class SparsityPenalty:
    """What sparse training adds to the loss.

    It is a term of the loss, so that what holds for a loss holds for it: mixed precision scales it along, accumulated
    steps share it, gradients are clipped with it, and every rank has the same. Under Adam, as in all of this kind, what
    the task does not hold in place moves at the learning rate, whatever the penalty's size.

    Args:
        weights: rate of the sum of absolute weights of convolutions and linear layers.
        scales: rate of the sum of absolute batch-norm scales (network slimming, Liu 2017, arXiv 1708.06519).
        groups: rate of the sum over coupled channels of 2^(4 (max - I) / (max - min)) I, where I is the squared norm of
            all that a channel owns, max and min are those of its group: the less a channel has, the more it is drawn
            (DepGraph, Fang 2023, arXiv 2301.12900).
        final: share of the rates that is left at `end`; they go there in a straight line.
        end: epochs after which there is no penalty.
        spare_shortcuts: leave out the scales of channels that are added to those of another layer, as at the end of
            residual branches.
    """

    def __init__(
        self,
        end: float,
        weights: float = 0.0,
        scales: float = 0.0,
        groups: float = 0.0,
        final: float = 0.1,
        spare_shortcuts: bool = False,
    ):
        self.end, self.final = end, final
        self.weights, self.scales, self.groups = weights, scales, groups
        self.spare_shortcuts = spare_shortcuts
        self._weights: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._groups: list[GroupPenalty] = []

    def follow(self, unit: Distiller, image_size: tuple[int, int]) -> None:
        """Looks at what the student has; to be called again whenever it was cut.

        Raises:
            ValueError: scales are to be drawn, but there is none; the message begins with its key.
        """
        student = unit.student
        self._weights = [weight for weight in prunable_weights(student) if weight.requires_grad]
        norms = {f"student.{name}.weight": norm.weight for name, norm in batch_norms(student).items()}
        scales = {name: scale for name, scale in norms.items() if scale.requires_grad}
        if self.spare_shortcuts or self.groups:
            graph = trace_channels(unit, image_size)
            if self.spare_shortcuts:
                scales = {name: scale for name, scale in scales.items() if name not in graph.summed}
            tensors = {name: x for name, x in named_tensors(unit).items() if name.startswith("student.")}
            self._groups = [GroupPenalty(group, tensors) for group in graph.groups] if self.groups else []
        if self.scales and not scales:
            left = ", but for those of shortcuts" if self.spare_shortcuts else ""
            raise ValueError(f"scales: {student.title} trains no batch norms{left}; draw groups or weights instead")
        self._scales = list(scales.values())

    def rate_at(self, epoch: float) -> float:
        """Share of the rates that counts at a time, counted in epochs."""
        return 1 - (1 - self.final) * epoch / self.end if epoch < self.end else 0.0

    def __call__(self, epoch: float) -> Tensor:
        """The penalty, a float32 scalar."""
        rate, terms = self.rate_at(epoch), []
        if rate and self.weights:
            terms.append(self.weights * _absolute_sum(self._weights))
        if rate and self.scales:
            terms.append(self.scales * _absolute_sum(self._scales))
        if rate:
            terms += [self.groups * group() for group in self._groups]
        return rate * torch.stack(terms).sum() if terms else torch.zeros((), device=self._weights[0].device)


class GroupPenalty:
    """The penalty of one group; `tensors` are the parameters that count, by name."""

    def __init__(self, group: ChannelGroup, tensors: dict[str, Tensor]):
        self.width = group.width
        self.members = [
            (
                tensor,
                member.dim,
                torch.tensor(member.positions, device=tensor.device),
                torch.tensor(member.channels, device=tensor.device),
            )
            for member in group.members
            if isinstance(tensor := tensors.get(member.name), nn.Parameter)
        ]

    def __call__(self) -> Tensor:
        owned = torch.zeros(self.width, device=self.members[0][0].device)
        for tensor, dim, positions, channels in self.members:
            squares = tensor.float().square()
            sums = squares.sum([d for d in range(tensor.dim()) if d != dim]) if tensor.dim() > 1 else squares
            owned = owned.index_add(0, channels, sums[positions])
        least, most = owned.detach().aminmax()
        return (2 ** (4 * (most - owned.detach()) / (most - least).clamp(min=1e-12)) * owned).sum()


def batch_norms(detector: nn.Module) -> dict[str, nn.Module]:
    """All batch norms with scales, by name."""
    norms = {name: m for name, m in detector.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.weight is not None}


def prunable_weights(detector: nn.Module) -> list[nn.Parameter]:
    """The weights of all convolutions and linear layers, each once."""
    layers = (m for m in detector.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear))
    return list(dict.fromkeys(layer.weight for layer in layers))


@torch.no_grad()
def small_scales(detector: nn.Module) -> float | None:
    """Share of batch-norm scales below `SMALL` in size; None where there are none."""
    scales = [norm.weight.abs() for norm in batch_norms(detector).values()]
    return float((torch.cat(scales) < SMALL).float().mean()) if scales else None


def _absolute_sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.float().abs().sum() for x in tensors]).sum()
