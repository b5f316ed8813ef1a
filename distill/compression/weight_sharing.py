"""Weight sharing: a layer's weights become a few values, which are trained on (Deep Compression, arXiv 1510.00149)."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from students import Detector, SharedWeight

_ROUNDS = 50
_LEAST = 8  # entries for each value of the codebook; smaller tensors would save nothing


class Codebook(nn.Module):
    """A weight of which only the shared values are trained: the gradient of each is the sum over those that share it.

    Args:
        bits: of each index; the codebook holds 2^bits values.
    """

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook (2^bits,) of a weight; the indices are kept."""
        codebook, indices = cluster(weight, 2**self.bits)
        self.register_buffer("indices", indices)
        return codebook

    def forward(self, codebook: Tensor) -> Tensor:
        return codebook[self.indices]


def share_weights(detector: Detector, bits: int) -> list[str]:
    """Clusters the weights of the convolutions and linear layers, in place; small ones and the output layers stay.

    Args:
        detector: its state then holds codebooks and indices in place of those weights.
        bits: 1 to 8.

    Returns:
        The names of the layers that now share.
    """
    names = []
    for name, layer in list(detector.named_modules()):
        if not isinstance(layer, nn.Conv2d | nn.Linear) or layer in detector.output_layers:
            continue
        if layer.weight.numel() >= _LEAST * 2**bits:
            parametrize.register_parametrization(layer, "weight", Codebook(bits), unsafe=True)
            names.append(name)
    return names


def take_apart(detector: Detector) -> dict[str, SharedWeight]:
    """The shared weights by tensor name, and the detector's layers as they were before, with these values.

    Undoes `share_weights` in place.
    """
    shared = {}
    for name, layer in list(detector.named_modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        (codebook,) = layer.parametrizations["weight"]
        values = layer.parametrizations["weight"].original.detach().cpu().clone()
        shared[f"{name}.weight"] = SharedWeight(codebook.indices.cpu(), values, codebook.bits)
    for name, weight in shared.items():
        layer = detector.get_submodule(name.removesuffix(".weight"))
        device = layer.weight.device
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.weight = nn.Parameter(weight.weight.to(device))
    return shared


@torch.no_grad()
def cluster(weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """k-means of a weight's entries (Lloyd's algorithm), begun with values evenly spaced from the least to the largest.

    Args:
        weight: of any shape.
        number: of values.

    Returns:
        The values (number,), ascending, and the index (weight.shape) int64 of each entry's nearest.
    """
    entries = weight.detach().flatten().double()
    ends = float(entries.min()), float(entries.max())
    values = torch.linspace(*ends, number, dtype=torch.double, device=weight.device)
    for _ in range(_ROUNDS):
        indices = torch.bucketize(entries, (values[1:] + values[:-1]) / 2)
        counts = torch.bincount(indices, minlength=number)
        sums = torch.zeros_like(values).index_add_(0, indices, entries)
        # a value that nothing is nearest to stays where it is
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), values)
        if torch.equal(moved, values):
            break
        values = moved
    indices = torch.bucketize(entries, (values[1:] + values[:-1]) / 2)
    return values.to(weight.dtype), indices.view(weight.shape)
