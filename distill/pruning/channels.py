"""What is known of channels while a network is followed: which labels are the same channel, and which must stay.

Every dimension of every tensor carries labels: for each of its indices the channel that lies there, or None where the
size changes with no channel (batch, height, width). The labels of a parameter or buffer are its own; the rules of
`distill.pruning.rules` say which of them are the same channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from students.plan import named_tensors

Labels = list[np.ndarray | None]  # one entry a dimension
FIXED = 0  # the label of an index, among others that are channels, where there is none: padding, say


class Entry(NamedTuple):
    """One index of one dimension of a parameter or buffer; without a name for `FIXED` and what `Channels.new` makes."""

    name: str
    dim: int
    index: int


class Channels:
    """The labels of all tensors that a module computes.

    Args:
        module: whose parameters and buffers have channels; what else it meets, images and constants, has none.

    Attributes:
        entries: what each label stands for.
        frozen: why a channel must stay, by label.
        numbers: labels that an int which a module keeps counts, by the int's dotted name.
        running: the module that runs, with all that called it, innermost last.
    """

    def __init__(self, module: nn.Module):
        self.entries = [Entry("", 0, 0)]
        self.frozen: dict[int, str] = {FIXED: "it has a fixed size"}
        self.numbers: dict[str, np.ndarray] = {}
        self.running = [module]
        self._names = {id(tensor): name for name, tensor in named_tensors(module).items()}
        self._module_names = {part: name for name, part in module.named_modules()}
        self._labels: dict[int, Labels] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice
        self._same: list[tuple[np.ndarray, np.ndarray]] = []

    def __getitem__(self, tensor: Tensor) -> Labels:
        """Labels of each dimension; those of a parameter or buffer are new when it is first met."""
        if id(tensor) not in self._labels:
            name = self._names.get(id(tensor))
            # the places within a kernel are no channels; of a single index nothing can go
            named = [name and n > 1 and (dim < 2 or tensor.dim() < 4) for dim, n in enumerate(tensor.shape)]
            self[tensor] = [self.new(name, dim, tensor.shape[dim]) if has else None for dim, has in enumerate(named)]
        return self._labels[id(tensor)]

    def __setitem__(self, tensor: Tensor, labels: Labels) -> None:
        for size, label in zip(tensor.shape, labels, strict=True):
            assert label is None or len(label) == size, f"{tuple(tensor.shape)} cannot have {len(label)} labels"
        self._labels[id(tensor)] = [None if n == 1 else label for n, label in zip(tensor.shape, labels)]
        self._alive.append(tensor)

    def new(self, name: str, dim: int, size: int) -> np.ndarray:
        """Labels that nothing has yet; without a name they belong to no tensor and follow what they come to meet."""
        start = len(self.entries)
        self.entries += [Entry(name, dim, index) for index in range(size)]
        return np.arange(start, start + size)

    def same(self, one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        """Says that two dimensions hold the same channels; what meets a size that never changes must stay."""
        if one is None or other is None:
            self.freeze([one, other], f"it meets a fixed width in {self.here}")
            return other if one is None else one
        one, other = (label.ravel() for label in np.broadcast_arrays(one, other))
        self.freeze([one[other == FIXED], other[one == FIXED]], f"it meets a fixed width in {self.here}")
        both = (one != FIXED) & (other != FIXED) & (one != other)
        if both.any():
            self._same.append((one[both], other[both]))
        return one

    def freeze(self, labels: Sequence[np.ndarray | None], reason: str) -> None:
        """Says that these channels must stay, and why."""
        for label in labels:
            if label is not None:
                for one in np.unique(label).tolist():
                    self.frozen.setdefault(one, reason)

    def follow_numbers(self, widths: Sequence[np.ndarray]) -> None:
        """Looks for ints that the running module keeps of these widths: it may read them where it splits channels."""
        module = self.running[-1]
        name = self._module_names[module]
        sizes = {len(width): width for width in reversed(widths) if len(width) > 1}
        for key, value in vars(module).items():
            if type(value) is int and value in sizes:
                self.numbers.setdefault(f"{name}.{key}", sizes[value])
            elif isinstance(value, list | tuple) and [*value] == [len(width) for width in widths[: len(value)]]:
                for place, width in enumerate(widths[: len(value)]):
                    self.numbers.setdefault(f"{name}.{key}.{place}", width)

    def resolve(self) -> np.ndarray:
        """(labels,) the channel that each label belongs to, as a number."""
        total = len(self.entries)
        if not self._same:
            return np.arange(total)
        one, other = (np.concatenate(side) for side in zip(*self._same))
        links = coo_matrix((np.ones(len(one), dtype=bool), (one, other)), shape=(total, total))
        return connected_components(links, directed=False)[1]

    @property
    def here(self) -> str:
        """Where the present operation runs, for messages."""
        return self.place(self.running[-1])

    def place(self, module: nn.Module) -> str:
        return f"{self._module_names[module] or 'the detector'} ({type(module).__name__})"
