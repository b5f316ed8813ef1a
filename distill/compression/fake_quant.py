"""Rounding to 8 bits as a part of the network, so that it can be calibrated, and trained through."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LEVELS = 255  # of activations, uint8, from 0
CALIBRATIONS = ("minmax", "percentile", "mse")
_BINS = 2048
_PERCENTILE = 0.9999
_CANDIDATES = 100  # ranges that are tried for the least squared error


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to 256 evenly spaced values, the same for all its channels, 0 among them.

    The gradient passes as if nothing was rounded, and is 0 where a value was clipped (Bengio 2013, arXiv 1308.3432).
    Until `set_range` is called nothing is rounded.

    Attributes:
        scale: between two neighbouring values; 0 until it is known.
        zero_point: the integer that stands for 0.
        recorder: is given what passes, in place of rounding it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.recorder = None

    def forward(self, x: Tensor) -> Tensor:
        if self.recorder is not None:
            self.recorder.add(x)
            return x
        return torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, LEVELS).to(x.dtype)

    def set_range(self, low: float, high: float) -> None:
        """Spreads the values from `low` to `high`, a range that is widened where it does not hold 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max(high - low, 1e-6) / LEVELS
        self.scale.fill_(scale)
        self.zero_point.fill_(min(round(-low / scale), LEVELS))


class WeightQuantizer(nn.Module):
    """Rounds a weight (C, ...) to integers times a scale a row, symmetric around 0: the largest of a row stays.

    Args:
        bits: 8, or 7 for processors whose instructions add two products in 16 bits, see `int8.weight_bits`.
    """

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.largest = 2 ** (bits - 1) - 1

    def forward(self, weight: Tensor) -> Tensor:
        zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        limits = -self.largest, self.largest
        return torch.fake_quantize_per_channel_affine(weight, self.scale(weight), zeros, 0, *limits)

    def scale(self, weight: Tensor) -> Tensor:
        """(C,) of each row."""
        return weight.detach().flatten(1).abs().amax(dim=1).clamp(min=1e-8) / self.largest

    def to_integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The integers, int8 like the weight, and the scales (C,) that give its rounded self when multiplied."""
        scale = self.scale(weight)
        rows = scale.view(-1, *[1] * (weight.dim() - 1))
        return (weight.detach() / rows).round().clamp(-self.largest, self.largest).to(torch.int8), scale


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], method: str = "percentile") -> None:
    """Sets the range of every `ActivationQuantizer` by what passes it, all of them unrounded.

    Args:
        model: in eval mode.
        batches: images (B, 3, H, W); gone through twice, so no iterator. At least one.
        method: `minmax` takes all that was seen; `percentile` leaves out 0.01% at either end; `mse` takes the range
            with the least squared error, clipped values included.

    Raises:
        ValueError: no batches, or no such method.
    """
    if method not in CALIBRATIONS:
        raise ValueError(f"calibration: found {method!r}; there is {', '.join(CALIBRATIONS)}")
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    extremes = [_Extremes() for _ in quantizers]
    with _recording(quantizers, extremes):
        for images in batches:
            model(images)
    if extremes and extremes[0].low is None:
        raise ValueError("calibration: there are no images; at least one is needed to find the ranges")
    if method == "minmax":
        ranges = [(seen.low, seen.high) for seen in extremes]
    else:
        counts = [_Histogram(seen.low, seen.high) for seen in extremes]
        with _recording(quantizers, counts):
            for images in batches:
                model(images)
        ranges = [getattr(histogram, method)() for histogram in counts]
    for quantizer, (low, high) in zip(quantizers, ranges):
        quantizer.set_range(low, high)


class _Extremes:
    """The least and the largest that was seen."""

    low: float | None = None
    high: float | None = None

    def add(self, x: Tensor) -> None:
        low, high = (float(value) for value in x.aminmax())
        self.low = low if self.low is None else min(low, self.low)
        self.high = high if self.high is None else max(high, self.high)


class _Histogram:
    """How often what was seen, in bins of one width from `low` to `high`."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, max(high, low + 1e-6)
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.centres = self.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * self.width

    @property
    def width(self) -> float:
        return (self.high - self.low) / _BINS

    def add(self, x: Tensor) -> None:
        self.counts += torch.histc(x.float(), _BINS, self.low, self.high).double().cpu()

    def percentile(self) -> tuple[float, float]:
        share = self.counts.cumsum(0) / self.counts.sum()
        low, high = (int((share >= level).nonzero()[0]) for level in (1 - _PERCENTILE, _PERCENTILE))
        # what lies in the outermost bins is not clipped: there the ends are known
        return self.low + low * self.width, self.low + (high + 1) * self.width

    def mse(self) -> tuple[float, float]:
        """Both ends shrink alike: the shares of the whole range from 1% to 100% are tried."""
        ranges = [(self.low * k / _CANDIDATES, self.high * k / _CANDIDATES) for k in range(1, _CANDIDATES + 1)]
        return min(ranges, key=lambda ends: self._squared_error(*ends))

    def _squared_error(self, low: float, high: float) -> float:
        trial = ActivationQuantizer()
        trial.set_range(low, high)
        scale, zero = float(trial.scale), int(trial.zero_point)
        rounded = ((self.centres / scale).round() + zero).clamp(0, LEVELS).sub(zero).mul(scale)
        return float(((self.centres - rounded).square() * self.counts).sum())


@contextmanager
def _recording(quantizers, recorders):
    for quantizer, recorder in zip(quantizers, recorders):
        quantizer.recorder = recorder
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.recorder = None
