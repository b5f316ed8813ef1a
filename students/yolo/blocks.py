"""What the YOLO networks are made of.

Layers within a block have the names that public checkpoints give them, and blocks stand in the order that those list
them in: together that is how weights find their place, see `students.yolo.weights`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.folding import fold_norm

Activation = Callable[[], nn.Module]


def scale_width(channels: int, width: float) -> int:
    """Channels of a network whose widths are a multiple of the original's, in steps of 8."""
    return math.ceil(channels * width / 8) * 8


def scale_depth(number: int, depth: float) -> int:
    """Repetitions of a block in a network whose depth is a multiple of the original's; at least 1."""
    return max(1, round(number * depth))


class Conv(nn.Module):
    """Convolution, batch norm, activation; padded so that a stride of 1 keeps the size."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int = 1,
        stride: int = 1,
        act: Activation = nn.SiLU,
        padding: int | None = None,
    ):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, added to what came in where that is asked for."""

    def __init__(self, channels: int, inner: int, shortcut: bool = True, act: Activation = nn.SiLU):
        super().__init__()
        self.cv1 = Conv(channels, inner, 1, act=act)
        self.cv2 = Conv(inner, channels, 3, act=act)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C3(nn.Module):
    """YOLOv5's cross-stage partial block (CSPNet, arXiv 1911.11929): half of the channels skip the bottlenecks."""

    def __init__(self, in_channels: int, channels: int, number: int, shortcut: bool = True):
        super().__init__()
        inner = channels // 2
        self.cv1 = Conv(in_channels, inner)
        self.cv2 = Conv(in_channels, inner)
        self.cv3 = Conv(2 * inner, channels)
        self.m = nn.Sequential(*(Bottleneck(inner, inner, shortcut) for _ in range(number)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))

    @property
    def out_channels(self) -> int:
        return self.cv3.out_channels


class SPPF(nn.Module):
    """Spatial pyramid pooling (arXiv 1406.4729) by three 5x5 poolings in a row, which are one each of 5, 9 and 13."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.cv1 = Conv(in_channels, in_channels // 2)
        self.cv2 = Conv(in_channels // 2 * 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(pool_around(maps[-1], 5))
        return self.cv2(torch.cat(maps, dim=1))


class SPPCSPC(nn.Module):
    """YOLOv7's spatial pyramid pooling within a cross-stage partial block."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.cv1 = Conv(in_channels, channels)
        self.cv2 = Conv(in_channels, channels)
        self.cv3 = Conv(channels, channels, 3)
        self.cv4 = Conv(channels, channels)
        self.cv5 = Conv(4 * channels, channels)
        self.cv6 = Conv(channels, channels, 3)
        self.cv7 = Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv4(self.cv3(self.cv1(x)))
        y = torch.cat((y, *(pool_around(y, kernel) for kernel in (5, 9, 13))), dim=1)
        return self.cv7(torch.cat((self.cv6(self.cv5(y)), self.cv2(x)), dim=1))


class RepConv(nn.Module):
    """A 3x3 convolution that is trained with a 1x1 one beside it, each with its batch norm (RepVGG, arXiv 2101.03697).

    YOLOv7 has it without the third branch, the identity. `merged` gives the one convolution that does the same.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.rbr_dense = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.rbr_dense(x) + self.rbr_1x1(x))

    @property
    def out_channels(self) -> int:
        return self.rbr_dense[0].out_channels

    @torch.no_grad()
    def merged(self) -> nn.Sequential:
        """The same function, for statistics that no longer change, as one convolution and the activation."""
        weights, biases = zip(*(fold_norm(*branch) for branch in (self.rbr_dense, self.rbr_1x1)))
        out_channels, in_channels = weights[0].shape[:2]
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1).to(weights[0])
        conv.weight.copy_(weights[0] + F.pad(weights[1], (1, 1, 1, 1)))
        conv.bias.copy_(sum(biases))
        return nn.Sequential(conv, self.act)


class PathAggregation(nn.Module):
    """YOLOv4's and YOLOv7's neck: pooling on the coarsest map, then top-down and bottom-up over joined maps (PAN, arXiv
    1803.01534). What the parts are is the network's; it has all that `forward` names."""

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Pyramid maps of strides 8, 16 and 32, from the backbone's."""
        p3, p4, p5 = maps
        p5 = self.pooling(p5)
        p4 = self.down4(torch.cat((self.lateral4(p4), enlarge_to(self.reduce5(p5), p4)), dim=1))
        p3 = self.down3(torch.cat((self.lateral3(p3), enlarge_to(self.reduce4(p4), p3)), dim=1))
        p4 = self.up4(torch.cat((self.halve3(p3), p4), dim=1))
        return [p3, p4, self.up5(torch.cat((self.halve4(p4), p5), dim=1))]

    @property
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each level, read from the live weights."""
        return self.down3.out_channels, self.up4.out_channels, self.up5.out_channels


def pool_around(x: Tensor, kernel: int) -> Tensor:
    """The largest value around each cell, the map as large as it was."""
    return F.max_pool2d(x, kernel, stride=1, padding=kernel // 2)


def enlarge_to(x: Tensor, other: Tensor) -> Tensor:
    """A map at the next finer one's height and width; where these are odd, more than half of it."""
    return F.interpolate(x, size=other.shape[-2:], mode="nearest")
