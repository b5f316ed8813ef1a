"""Each channel against its own mean and spread over the batch: what is left is the pattern."""

from torch import Tensor

EPSILON = 1e-6  # added to a deviation that divides, as PKD and CrossKD do


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each channel over images and locations.

    Args:
        features: (B, C, H, W), not empty.

    Returns:
        Two (1, C, 1, 1); the deviation of a single value is 0, not NaN.
    """
    unbiased = min(1, features[:, 0].numel() - 1)  # n - 1 would divide a single value by zero
    deviation = features.std(dim=(0, 2, 3), keepdim=True, correction=unbiased)
    return features.mean(dim=(0, 2, 3), keepdim=True), deviation


def standardize(features: Tensor) -> Tensor:
    """(B, C, H, W) with zero mean and unit variance a channel; a constant channel becomes 0."""
    mean, deviation = channel_statistics(features)
    return (features - mean) / (deviation + EPSILON)
