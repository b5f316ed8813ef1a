"""Where channels are read: what flows there, and what the loss would say to a gate there.

A channel is gone when nothing reads it any more. So the convolutions and linear layers that read a group's channels are
where one looks at them: past norm and activation, past the sum of residual branches, and once for each reader.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from distill.data import Batch
from distill.distiller import Distiller
from distill.measure import eval_mode
from distill.pruning.graph import ChannelGroup, Member
from students import DenseOutput

# by the layer's name: whose channels it reads
Readers = Mapping[str, Sequence[tuple[ChannelGroup, Member]]]


def find_readers(unit: Distiller, groups: Sequence[ChannelGroup]) -> Readers:
    """The student's layers that read the groups' channels; adapters are not deployed and do not count.

    Raises:
        ValueError: a group that no layer reads.
    """
    readers: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    for group in groups:
        found = [member for member in group.members if _reads(unit, member)]
        if not found:
            raise ValueError(
                f"no plain convolution or linear layer reads {group.name}, so nothing can be measured there; "
                "choose another importance"
            )
        for member in found:
            readers.setdefault(member.name.removesuffix(".weight"), []).append((group, member))
    return readers


def _reads(unit: Distiller, member: Member) -> bool:
    name, _, leaf = member.name.rpartition(".")
    if leaf != "weight" or not name.startswith("student."):
        return False
    layer = unit.get_submodule(name)
    if isinstance(layer, nn.modules.conv._ConvNd):
        # of a grouped convolution's weight, entries are not those of the input
        return layer.groups == 1 and member.dim == (0 if layer.transposed else 1)
    return isinstance(layer, nn.Linear) and member.dim == 1


def _channel_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def measure_gates(
    unit: Distiller,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    per_image: bool = False,
) -> dict[str, Tensor]:
    """How the loss answers to a gate of 1 on each channel: the mean of (dL/dz)^2, by the group's name.

    The gate multiplies the channel wherever the student's layers read it, and wherever a loss reads the pyramid it is
    part of, so the sum over all of these comes before the square. With whole batches it is Taylor's gate (Molchanov
    2019, arXiv 1906.10771), with single images Group Fisher (Liu 2021, arXiv 2108.00708), still to be divided by what
    the channel costs. Frozen layers are measured like others. The model and its gradients stay as they are; every rank
    must be given the same batches.

    Args:
        unit: the student with its terms.
        groups: the channels.
        batches: of training images; where there are none, all is 0.
        loss: of a batch, see `distill.pruning.saliency.trained_loss`.
        per_image: square the gradient of each image, and not that of a batch.

    Returns:
        (width,) float32 on the CPU for each group.

    Raises:
        ValueError: see `find_readers`.
    """
    readers = find_readers(unit, groups)
    sums = {group.name: torch.zeros(group.width) for group in groups}
    number = 0
    with eval_mode(unit), torch.enable_grad():
        for batch in batches:
            with _gated(unit, readers, len(batch.images)) as gates:
                value = loss(batch)
            gradients = torch.autograd.grad(value, [gate for _, gate in gates], allow_unused=True)
            totals = {group.name: torch.zeros(len(batch.images), group.width) for group in groups}
            for (name, _), gradient in zip(gates, gradients):
                if gradient is None:
                    continue
                rows = gradient.detach().float().cpu().flatten(1)
                for group, member in readers[name]:
                    read = rows[:, torch.tensor(member.positions)]
                    totals[group.name].index_add_(1, torch.tensor(member.channels), read)
            for name, total in totals.items():
                sums[name] += (total if per_image else total.sum(dim=0, keepdim=True)).square().sum(dim=0)
            number += len(batch.images) if per_image else 1
    return {name: total / max(1, number) for name, total in sums.items()}


@contextmanager
def _gated(unit: Distiller, readers: Readers, images: int) -> Iterator[list[tuple[str, Tensor]]]:
    """While open, layers and losses read through gates; each reading adds the layer's name and its gate to the list.

    A gate has an entry an image and channel, (B, C, 1, 1) or (B, 1, C).
    """
    gates: list[tuple[str, Tensor]] = []
    ungated: list[tuple[Tensor, Tensor]] = []
    pyramid: list[Tensor] = []

    def open_gate(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = inputs[0]
        if any(x is level for level in pyramid):  # a loss goes on with a pyramid that is gated already
            return None
        if len(x) != images:
            raise ValueError(f"{name} reads {len(x)} rows of {images} images; choose an importance without gates")
        shape = [images] + [1] * (x.dim() - 1)
        shape[_channel_dim(layer)] = x.shape[_channel_dim(layer)]
        gate = torch.ones(shape, device=x.device, requires_grad=True)
        gates.append((name, gate))
        ungated.append((x, gate))
        return (x * gate.to(x.dtype), *inputs[1:])

    def gate_pyramid(student: nn.Module, inputs: tuple[Tensor, ...], output: DenseOutput) -> DenseOutput:
        for level in output.features:
            # the head's gate serves the losses too: they read the same channels
            gate = next((gate for x, gate in ungated if x is level), None)
            pyramid.append(level if gate is None else level * gate.to(level.dtype))
        ungated.clear()
        return output._replace(features=tuple(pyramid[-len(output.features) :]))

    handles = [unit.get_submodule(name).register_forward_pre_hook(partial(open_gate, name)) for name in readers]
    handles.append(unit.student.register_forward_hook(gate_pyramid))
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def measure_responses(
    unit: Distiller,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    statistic: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """A statistic of each channel's values where they are read, averaged over readers and batches; by group's name.

    Args:
        unit: the student with its terms.
        groups: the channels.
        batches: of training images; where there are none, all is 0.
        loss: not looked at; every measurement takes the same arguments.
        statistic: from values (B, C, ...) to (C,).

    Returns:
        (width,) float32 on the CPU for each group.

    Raises:
        ValueError: see `find_readers`.
    """
    readers = find_readers(unit, groups)
    sums = {group.name: torch.zeros(group.width) for group in groups}
    counts = {group.name: torch.zeros(group.width) for group in groups}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = statistic(inputs[0].detach().float().movedim(_channel_dim(layer), 1)).cpu()
        for group, member in readers[name]:
            channels = torch.tensor(member.channels)
            sums[group.name].index_add_(0, channels, values[torch.tensor(member.positions)])
            counts[group.name].index_add_(0, channels, torch.ones(len(channels)))

    handles = [unit.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in readers]
    try:
        with eval_mode(unit), torch.no_grad():
            for batch in batches:
                unit.student(batch.images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name].clamp(min=1) for name, total in sums.items()}


def mean_magnitude(x: Tensor) -> Tensor:
    """(C,) mean of |a| over images and positions, of (B, C, ...)."""
    return x.abs().transpose(0, 1).flatten(1).mean(dim=1)


def active_share(x: Tensor) -> Tensor:
    """(C,) share of values above 0: 1 less the average percentage of zeros (APoZ, Hu 2016, arXiv 1607.03250).

    Values below 0, which smooth activations let through a little, count as zeros.
    """
    return (x > 0).float().transpose(0, 1).flatten(1).mean(dim=1)


def map_rank(x: Tensor) -> Tensor:
    """(C,) rank of each channel's map (B, C, H, W), as a share of what it could be (HRank, Lin 2020, arXiv 2002.10179).

    Only the first image of a batch is looked at: ranks hardly differ from image to image, and are dear.
    """
    maps = x[0].flatten(2) if x.dim() > 3 else x[0].flatten(1)[..., None]
    return torch.linalg.matrix_rank(maps).float() / min(maps.shape[1:])
