"""The precision losses are computed in."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is float64, so that gradients can be checked numerically.

    Args:
        x: any shape and type.

    Returns:
        The same shape, float64 for float64 and float32 for everything else.
    """
    return x if x.dtype == torch.float64 else x.float()
