"""Weights of which many have the same value: a short codebook, and for each weight its number in there."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class SharedWeight(NamedTuple):
    """A weight as numbers in a codebook (Deep Compression, Han 2016, arXiv 1510.00149).

    Attributes:
        indices: of the weight's shape, int64, below 2^bits.
        codebook: (2^bits,) float32, or fewer where the weight has fewer entries.
        bits: of each index.
    """

    indices: Tensor
    codebook: Tensor
    bits: int

    @property
    def weight(self) -> Tensor:
        return self.codebook[self.indices]


def pack(shared: SharedWeight) -> Tensor:
    """The indices one behind the other, `bits` bits each, the highest first; (ceil(N * bits / 8),) uint8."""
    numbers = shared.indices.flatten().cpu().numpy().astype(np.uint8)
    digits = np.unpackbits(numbers[:, None], axis=1)[:, 8 - shared.bits :]
    return torch.from_numpy(np.packbits(digits))


def unpack(packed: Tensor, codebook: Tensor, bits: int, shape: tuple[int, ...]) -> SharedWeight:
    """What `pack` took apart."""
    count = int(np.prod(shape))
    digits = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    whole = np.concatenate((np.zeros((count, 8 - bits), np.uint8), digits), axis=1)
    indices = torch.from_numpy(np.packbits(whole, axis=1)[:, 0].astype(np.int64))
    return SharedWeight(indices.view(shape), codebook, bits)
