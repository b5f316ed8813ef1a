"""The precision that every loss computes in."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Float64 stays, so that gradients can be checked numerically; everything else, half precision too, is float32.

    Args:
        values: any shape, any number type.

    Returns:
        The same values, in the graph; the tensor itself where nothing changes.
    """
    return values if values.dtype == torch.float64 else values.float()
