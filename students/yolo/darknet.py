"""Reads Darknet's .weights files: a header, then all numbers of all layers, one after the other, without names."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from students.yolo.blocks import Conv
from students.yolo.weights import fill_head

if TYPE_CHECKING:
    from students.yolo.detector import YOLODetector


def read_darknet(path: Path) -> Tensor:
    """All numbers behind the header, (N,) float32.

    The header is three int32 of the version, and how many images were seen: int64 since version 0.2, before int32.

    Raises:
        ValueError: no such file, or one that cannot be such.
    """
    if not path.is_file():
        raise ValueError(f"weights: no file {path}; allowed are none, or the path of a Darknet .weights file")
    content = path.read_bytes()
    version = np.frombuffer(content[:12], dtype="<i4") if len(content) >= 12 else ()
    sane = len(version) == 3 and 0 <= version[0] < 1000 and 0 <= version[1] < 1000
    start = 20 if sane and version[0] * 10 + version[1] >= 2 else 16
    if not sane or len(content) < start or (len(content) - start) % 4:
        raise ValueError(f"weights: {path} is no Darknet file (its header or length is wrong); give a .weights file")
    return torch.from_numpy(np.frombuffer(content, dtype="<f4", offset=start).copy())


@torch.no_grad()
def load_darknet(detector: "YOLODetector", order: Sequence[Conv | int], path: Path, new_head: bool) -> list[str]:
    """Fills a new detector from a Darknet file, to the last number.

    A convolution's batch norm comes first: bias, weight, mean and variance; then its own weight. A detection layer has
    none: its bias, then its weight.

    Args:
        detector: changed in place.
        order: its convolutions as in the file, and the levels whose detection layer comes in their place.
        path: of the file.
        new_head: leave the class layers as they are; the file may have other classes then.

    Returns:
        What a user should be told.

    Raises:
        ValueError: the file cannot be read, has more or fewer numbers than the network, or other classes.
    """
    numbers = read_darknet(path)
    head = detector.head
    anchors = head.anchor_sizes.shape[1]
    columns = [layer.in_channels for layer in head.boxes]
    others = sum(tensor.numel() for item in order if isinstance(item, Conv) for tensor in _tensors(item))
    # a file does not tell its classes, but they follow from its length
    rows, rest = divmod(len(numbers) - others, sum(c + 1 for c in columns))
    if rest or rows % anchors or rows <= 5 * anchors:
        needed = others + anchors * (5 + len(detector.class_names)) * sum(c + 1 for c in columns)
        first = next(item for item in order if isinstance(item, Conv)).conv.weight
        raise ValueError(
            f"weights: {path} holds {len(numbers)} numbers, which is this network with no number of classes: with "
            f"{len(detector.class_names)} it has {needed}, its first convolution {tuple(first.shape)}; give the "
            "settings it was made with"
        )
    published: dict[str, Tensor] = {}
    filled = []
    place = 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        place += int(np.prod(shape))
        return numbers[place - int(np.prod(shape)) : place].view(shape)

    for item in order:
        if isinstance(item, Conv):
            filled += [(tensor, take(*tensor.shape)) for tensor in _tensors(item)]
        else:
            published[f"bias.{item}"] = take(anchors, rows // anchors)
            published[f"weight.{item}"] = take(anchors, rows // anchors, columns[item], 1, 1)
    notes = fill_head(detector, published, (), str(path), new_head)
    for tensor, values in filled:
        tensor.copy_(values)
    return notes


def _tensors(block: Conv) -> tuple[Tensor, ...]:
    """In the file's order."""
    norm = block.bn
    return norm.bias, norm.weight, norm.running_mean, norm.running_var, block.conv.weight
