"""A teacher that no single device can hold: each process keeps a part of its weights."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

BLOCK = 500_000  # parameters that are brought together in one go, at least


def shard_backbone(detector: nn.Module, device: torch.device) -> None:
    """Deals a backbone's weights out to all processes (FSDP2); only one block at a time is whole, and on the device.

    Pyramid and head stay whole on each: they are small, and losses such as CrossKD run parts of a head by themselves.

    Args:
        detector: frozen, on any device; all processes hold the same one.
        device: that this process computes on.

    Raises:
        ValueError: it has no backbone by that name.
    """
    backbone = next((m for name, m in detector.named_modules() if name.split(".")[-1] == "backbone"), None)
    if backbone is None:
        raise ValueError(f"shard: {type(detector).__name__} has no backbone whose weights could be shared out")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shard_blocks(backbone, mesh)
    fully_shard(backbone, mesh=mesh)


def shard_blocks(module: nn.Module, mesh: torch.distributed.DeviceMesh) -> None:
    """Shards the smallest parts of a module that have `BLOCK` parameters or more."""
    for child in module.children():
        if sum(parameter.numel() for parameter in child.parameters()) >= BLOCK:
            shard_blocks(child, mesh)
            # a list has no pass of its own before which it could be brought together
            if not isinstance(child, nn.ModuleList | nn.ModuleDict):
                fully_shard(child, mesh=mesh)
