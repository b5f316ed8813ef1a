"""Normalisers that mean the same on one process and on many."""

import torch
import torch.distributed as dist
from torch import Tensor


def average_across_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all ranks, or `value` itself where no process group is initialised.

    DistributedDataParallel averages gradients over W ranks. A loss that each rank divides by the *mean* of the ranks'
    normalisers therefore has the gradient of (sum of the ranks' losses) / (sum of their normalisers): what one process
    would have computed on all the images. Every rank must call this equally often.

    Args:
        value: a normaliser, any shape; the same shape on every rank.

    Returns:
        A float32 copy, outside the graph.
    """
    average = value.detach().to(torch.float32, copy=True)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(average)
        average /= dist.get_world_size()
    return average
