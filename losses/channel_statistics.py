"""Each channel against its own mean and spread over the batch: what is left is the pattern."""

import torch
from torch import Tensor

EPSILON = 1e-6  # added to a deviation that divides, as PKD and CrossKD do
OVER = (0, 2, 3)  # images and locations


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each channel over images and locations.

    Args:
        features: (B, C, H, W), not empty.

    Returns:
        Two (1, C, 1, 1); the deviation of a single value is 0, not NaN.
    """
    mean = features.mean(dim=OVER, keepdim=True)
    return mean, _deviation(features - mean)


def standardize(features: Tensor) -> Tensor:
    """(B, C, H, W) with zero mean and unit variance a channel; a constant channel becomes 0."""
    centred = features - features.mean(dim=OVER, keepdim=True)
    return centred * (1 / (_deviation(centred) + EPSILON))


def _deviation(centred: Tensor) -> Tensor:
    """(1, C, 1, 1) of a map without its mean; by sums, as `Tensor.std` takes several times as long on a CPU."""
    unbiased = max(1, centred[:, 0].numel() - 1)  # a single value would be divided by zero
    variance = centred.square().sum(dim=OVER, keepdim=True) / unbiased
    # a root has no slope at 0
    return torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
