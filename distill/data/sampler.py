"""The order in which an epoch visits a data set, or a labelled and an unlabelled one side by side."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

Address = tuple[int, int]  # position in the index, epoch
MixedAddress = tuple[int, int, int]  # 0 for labelled or 1 for unlabelled, position in that index, epoch


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
        self.seen = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next pass is for."""
        self.epoch = epoch

    def start_after(self, seen: int) -> None:
        """Makes the next pass, and no other, leave out so many images: the epoch has been through them already."""
        self.seen = seen

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Address]:
        epoch, seen, self.seen = self.epoch, self.seen, 0  # a change during the pass is for the next one
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for position in order[seen:].tolist():
            yield position, epoch


class MixedSampler(Sampler[MixedAddress]):
    """Yields every labelled image once, and unlabelled ones between them in a fixed ratio.

    The mix is one stream: a batch that is cut off it, or the batches of several processes together, holds its share of
    unlabelled images to within one. Those go on where the last epoch stopped, and begin in a new order when all have
    been seen; an epoch's stream depends on the seed and the epoch alone.

    Args:
        labelled: number of labelled images.
        unlabelled: number of unlabelled images.
        ratio: share of unlabelled images, above 0 and below 1.
        shuffle: whether to visit both in random order.
        seed: of the order.
    """

    def __init__(self, labelled: int, unlabelled: int, ratio: Fraction, shuffle: bool, seed: int = 0):
        self.labelled = EpochSampler(labelled, shuffle, seed)
        self.unlabelled = EpochSampler(unlabelled, shuffle, seed + 1)
        self.places = mixed_places(mixed_length(labelled, ratio), ratio)
        self.seen = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next pass is for."""
        self.labelled.set_epoch(epoch)

    def start_after(self, seen: int) -> None:
        """Makes the next pass, and no other, leave out so many images: the epoch has been through them already."""
        self.seen = seen

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[MixedAddress]:
        sources = iter(self.labelled), self._go_on(self.labelled.epoch * sum(self.places))
        seen, self.seen = self.seen, 0
        stream = ((source, *next(sources[source])) for source in self.places)
        yield from islice(stream, seen, None)

    def _go_on(self, seen: int) -> Iterator[Address]:
        """Unlabelled images without end, after so many; a pass over all of them counts as their epoch."""
        epoch, start = divmod(seen, len(self.unlabelled))
        while True:
            self.unlabelled.set_epoch(epoch)
            yield from islice(self.unlabelled, start, None)
            epoch, start = epoch + 1, 0


def mixed_length(labelled: int, ratio: Fraction) -> int:
    """The longest stream with so many labelled images."""
    return int(labelled / (1 - ratio))


def mixed_places(number: int, ratio: Fraction) -> list[int]:
    """0 for labelled or 1 for unlabelled, for each of the first places of a stream, as even as whole images can be."""
    share, of = ratio.numerator, ratio.denominator
    return [(place + 1) * share // of - place * share // of for place in range(number)]
