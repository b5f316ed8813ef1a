"""Normalisers that mean the same on one process and on many."""

import torch.distributed as dist
from torch import Tensor

from losses.precision import at_least_float32

SMALLEST_WEIGHT_SUM = 1e-6  # a weighted mean stays bounded however small its weights: only 0 / 0 has to be avoided


def average_across_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all ranks, or `value` itself where no process group is initialised.

    DistributedDataParallel averages gradients over W ranks. A loss that each rank divides by the *mean* of the ranks'
    normalisers therefore has the gradient of (sum of the ranks' losses) / (sum of their normalisers): what one process
    would have computed on all the images. Every rank must call this equally often.

    Args:
        value: a normaliser, any shape; the same shape on every rank.

    Returns:
        A copy, float32 or better, outside the graph.
    """
    average = at_least_float32(value.detach()).clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(average)
        average /= dist.get_world_size()
    return average


def share_normalizer(losses: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Losses that were divided by this rank's own count, as if divided by the mean of all ranks'; both at least 1.

    For losses of other packages, which know nothing of ranks.

    Args:
        losses: by name.
        count: what they were divided by; 0 where they were divided by 1 in its place.
    """
    average = average_across_ranks(next(iter(losses.values())).new_full((), count)).clamp(min=1)
    return {name: loss * (max(1, count) / average) for name, loss in losses.items()}


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """sum weight * values / sum weight, the second sum averaged over ranks and at least 1e-6.

    Args:
        values: any shape.
        weight: the same shape, not negative; numbers or a mask. Detached.

    Returns:
        A scalar; 0 where there are no values, or all weigh nothing.
    """
    weight = at_least_float32(weight.detach())
    return (weight * values).sum() / average_across_ranks(weight.sum()).clamp(min=SMALLEST_WEIGHT_SUM)
