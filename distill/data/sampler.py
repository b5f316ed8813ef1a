"""The order in which an epoch visits a data set."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Address = tuple[int, int]  # position in the index, epoch


class EpochSampler(Sampler[Address]):
    """Yields (position, epoch) for every image once; the order depends on the seed and the epoch alone.

    Args:
        length: number of images.
        shuffle: whether to visit them in random order.
        seed: of the order.
    """

    def __init__(self, length: int, shuffle: bool, seed: int = 0):
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next pass is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Address]:
        epoch = self.epoch  # a change during the pass is for the next one
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for position in order.tolist():
            yield position, epoch
