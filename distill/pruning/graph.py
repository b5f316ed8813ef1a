"""Which channels belong together: the dependency graph of DepGraph (Fang 2023, arXiv 2301.12900), by torch-pruning.

This is the only module that knows torch-pruning. What leaves it are names and indices.
"""

import copy
from dataclasses import dataclass

import torch
import torch_pruning
from torch import Tensor, nn

from distill.distiller import Distiller
from distill.terms.adapter import ChannelSelection


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group's channels run through.

    Attributes:
        name: the tensor's name in the traced module.
        dim: its dimension.
        positions: indices in that dimension.
        channels: for each position, the channel of the group that it belongs to.
    """

    name: str
    dim: int
    positions: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only go together with all their counterparts in other layers.

    Attributes:
        name: the layer that the group was found from.
        width: how many channels it has.
        members: every tensor dimension that loses an index when a channel goes.
    """

    name: str
    width: int
    members: tuple[Member, ...]


def find_groups(unit: Distiller, image_size: tuple[int, int]) -> list[ChannelGroup]:
    """All groups of a student and its adapters that may be narrowed.

    Channels that run through a grouped convolution (but a depthwise one) or a group norm are left as they are.

    The unit itself is not touched: a copy is traced, with gradients on everywhere, since autograd does the tracing.

    Args:
        unit: the student with its adapters.
        image_size: height and width, pixels, of the image to trace with.
    """
    traced = copy.deepcopy(unit).cpu().float().requires_grad_(True).eval()
    graph = torch_pruning.DependencyGraph().build_dependency(
        traced,
        torch.full((1, 3, *image_size), 0.5),
        forward_fn=lambda module, images: module.traced_outputs(images),
        customized_pruners={ChannelSelection: _SelectionRule()},
        verbose=False,
    )
    names = {module: name for name, module in traced.named_modules()}
    parameter_names = {parameter: name for name, parameter in traced.named_parameters()}
    groups = []
    for group in graph.get_all_groups(ignored_layers=list(traced.output_layers)):
        if any(_is_indivisible(item.dep.target.module) for item in group):
            continue
        if not any(names.get(item.dep.target.module, "").startswith("student.") for item in group):
            continue  # inner widths of a term: they are not deployed, so nothing is won by cutting them
        root = group[0].dep.target.module
        members = []
        for item in group:
            layer, positions = item.dep.target.module, tuple(item.idxs)
            if isinstance(layer, nn.Parameter):
                members.append(
                    Member(parameter_names[layer], item.dep.target.pruning_dim, positions, tuple(item.root_idxs))
                )
            elif layer in names:
                is_output = graph.is_out_channel_pruning_fn(item.dep.handler)
                members += [
                    Member(f"{names[layer]}.{leaf}", dim, positions, tuple(item.root_idxs))
                    for leaf, dim in _sliced_tensors(layer, is_output)
                ]
        groups.append(ChannelGroup(names[root], len(group[0].idxs), tuple(members)))
    return groups


class _SelectionRule(torch_pruning.BasePruningFunc):
    """Tells the tracer that a selection's channels come out as they go in; it is asked for widths only."""

    def prune_out_channels(self, layer: ChannelSelection, idxs: list[int]) -> ChannelSelection:
        raise NotImplementedError("plans cut, the tracer does not")

    prune_in_channels = prune_out_channels  # the same function: that is what ties the two together

    def get_out_channels(self, layer: ChannelSelection) -> int:
        return len(layer.kept)

    get_in_channels = get_out_channels


def _is_indivisible(layer: nn.Module) -> bool:
    """Whether a layer ties channels together in sets: they could only go whole set by whole set, so they all stay."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups > 1 and layer.groups != layer.in_channels
    return isinstance(layer, nn.GroupNorm) and layer.num_groups != layer.num_channels


def _sliced_tensors(layer: nn.Module, is_output: bool) -> list[tuple[str, int]]:
    """(leaf name, dimension) of the tensors that a layer loses an index in when an output or input channel goes."""
    tensors: dict[str, Tensor] = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    vectors = [(leaf, 0) for leaf, tensor in tensors.items() if tensor.dim() == 1]
    if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
        depthwise = (
            isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and layer.groups == layer.in_channels
        )
        return [("weight", 0), *vectors] if is_output or depthwise else [("weight", 1)]
    if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm | nn.PReLU | ChannelSelection):
        return vectors
    raise ValueError(f"pruning: no rule for cutting {type(layer).__name__} layers")
