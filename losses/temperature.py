"""Softening: the one thing that a temperature does."""

from torch import Tensor

from losses.precision import at_least_float32


def soften(values: Tensor, temperature: float) -> Tensor:
    """values / temperature, in float32 or better.

    Args:
        values: any shape, what a softmax or a sigmoid is taken of afterwards.
        temperature: above 1 it makes them more even, below 1 sharper.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: found {temperature}; it must be above 0, and 1 softens nothing")
    return at_least_float32(values) / temperature
