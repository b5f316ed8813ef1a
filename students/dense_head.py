"""What all dense heads share: two towers over every pyramid level, class scores, and boxes around each location."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.assignment import Objects


class SharedConv(nn.Module):
    """A 3x3 convolution shared by all levels, with a batch norm of its own a level (RTMDet, arXiv 2212.07784).

    Levels differ in their statistics, so one shared batch norm would blur them; group norm would tie channels together
    that a pruner wants to take apart.
    """

    def __init__(self, channels: int, num_levels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(num_levels))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """(B, C, H, W) of pyramid level number `level`, to the same shape; the activation is left to the caller."""
        return self.norms[level](self.conv(x))


class Predictions(NamedTuple):
    """All that a head predicts for a batch: N predictions over levels, locations and anchors, in this order, float32.

    Attributes:
        logits: (B, N, K) before the sigmoid.
        boxes: (B, N, 4) xyxy in pixels.
        box_logits: (B, N, 4, bins) before the softmax; None for heads without distributions.
        locations: (N, 2) centre of the prediction's cell, x and y in pixels.
        strides: (N,) pixels.
        level_sizes: how many of the N belong to each level.
    """

    logits: Tensor
    boxes: Tensor
    box_logits: Tensor | None
    locations: Tensor
    strides: Tensor
    level_sizes: tuple[int, ...]


class DenseHead(nn.Module, ABC):
    """Two towers of shared convolutions, one to class logits and one to boxes (RetinaNet, arXiv 1708.02002).

    A head says how its last layer is read as distances to a box's edges, which location answers for which object, and
    what it is told; all else is the same for all.

    Args:
        channels: pyramid channels.
        num_classes: classes without background.
        num_levels: pyramid levels.
        depth: 3x3 convolutions in each tower; at least 1.

    Attributes:
        anchors: predictions at each location.
        box_bins: length of the distributions over distances, 0 if there are none.
        first_box: what the layer that boxes are read from gives at first, everywhere.
    """

    anchors: ClassVar[int] = 1
    box_bins: ClassVar[int] = 0
    first_box: ClassVar[float] = 0.0

    def __init__(self, channels: int, num_classes: int, num_levels: int, depth: int):
        super().__init__()
        self.class_tower = nn.ModuleList(SharedConv(channels, num_levels) for _ in range(depth))
        self.box_tower = nn.ModuleList(SharedConv(channels, num_levels) for _ in range(depth))
        self.class_logits = nn.Conv2d(channels, self.anchors * num_classes, 3, padding=1)
        self.box_distances = nn.Conv2d(channels, self.anchors * 4 * max(1, self.box_bins), 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        nn.init.constant_(self.class_logits.bias, -math.log(99))  # a first score of 0.01, as in focal loss
        nn.init.constant_(self.box_distances.bias, self.first_box)

    def forward(self, features: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
        """Class logits, box distances and, where there are any, box logits of all levels; see `DenseOutput`."""
        begun = [self.begin(feature, level, self.depth) for level, feature in enumerate(features)]
        return tuple(zip(*(self.finish(*maps, level, self.depth) for level, maps in enumerate(begun))))

    @property
    def depth(self) -> int:
        """Convolutions in each tower."""
        return len(self.class_tower)

    def begin(self, feature: Tensor, level: int, depth: int) -> tuple[Tensor, Tensor]:
        """What both towers hold after `depth` convolutions on one pyramid level, the last activation still to come."""
        x, y = self.class_tower[0](feature, level), self.box_tower[0](feature, level)
        for class_conv, box_conv in zip(self.class_tower[1:depth], self.box_tower[1:depth]):
            x, y = class_conv(F.relu(x), level), box_conv(F.relu(y), level)
        return x, y

    def finish(self, x: Tensor, y: Tensor, level: int, depth: int) -> tuple[Tensor, ...]:
        """One level of what `forward` gives, from what `begin` gave for the same depth."""
        for class_conv, box_conv in zip(self.class_tower[depth:], self.box_tower[depth:]):
            x, y = class_conv(F.relu(x), level), box_conv(F.relu(y), level)
        return self.class_logits(F.relu(x)), *self.read_boxes(self.box_distances(F.relu(y)))

    @abstractmethod
    def read_boxes(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Distances (B, A*4, H, W) in strides, and box logits if the head has any, from its last layer's outputs."""

    @abstractmethod
    def loss(self, predicted: Predictions, objects: Objects) -> dict[str, Tensor]:
        """The losses `classification` and `box`, weighted against each other, float32 scalars."""


def wanted_scores(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """(B, N, K) like the logits: each prediction's quality (B, N) at its label (B, N), 0 elsewhere."""
    return torch.zeros_like(logits).scatter_(-1, labels[..., None], quality[..., None])
