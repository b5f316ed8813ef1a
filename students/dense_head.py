"""An anchor-free dense head: class scores and edge distances at every location of every pyramid level."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


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


class DenseHead(nn.Module):
    """Two towers of shared convolutions, one to class logits and one to distances (FCOS, arXiv 1904.01355).

    There is no centerness branch: the class score is trained to be the quality of its box.

    Args:
        channels: pyramid channels.
        num_classes: classes without background.
        num_levels: pyramid levels.
        depth: 3x3 convolutions in each tower; at least 1.
    """

    def __init__(self, channels: int, num_classes: int, num_levels: int, depth: int):
        super().__init__()
        self.class_tower = nn.ModuleList(SharedConv(channels, num_levels) for _ in range(depth))
        self.box_tower = nn.ModuleList(SharedConv(channels, num_levels) for _ in range(depth))
        self.class_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.box_distances = nn.Conv2d(channels, 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        nn.init.constant_(self.class_logits.bias, -math.log(99))  # a first score of 0.01, as in focal loss
        nn.init.constant_(self.box_distances.bias, 2.0)  # a first box of about 4 strides, an object's usual size

    def forward(self, features: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Class logits (B, K, H, W) and distances (B, 4, H, W) in strides, for each level (B, C, H, W)."""
        begun = [self.begin(feature, level, self.depth) for level, feature in enumerate(features)]
        logits, distances = zip(*(self.finish(*maps, level, self.depth) for level, maps in enumerate(begun)))
        return logits, distances

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

    def finish(self, x: Tensor, y: Tensor, level: int, depth: int) -> tuple[Tensor, Tensor]:
        """Logits and distances of one level, from what `begin` gave for the same depth."""
        for class_conv, box_conv in zip(self.class_tower[depth:], self.box_tower[depth:]):
            x, y = class_conv(F.relu(x), level), box_conv(F.relu(y), level)
        return self.class_logits(F.relu(x)), F.softplus(self.box_distances(F.relu(y)))
