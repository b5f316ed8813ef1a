"""Feature pyramids over a backbone's maps: FPN (arXiv 1612.03144) and PAN (arXiv 1803.01534)."""

import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm, without activation; same padding."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels)
    )


class FPN(nn.Module):
    """Top-down pyramid: 1x1 laterals, nearest upsampling, addition, a 3x3 convolution a level.

    Batch norm follows each convolution, unlike in the paper: small students train from scratch. Levels beyond the
    backbone's are made by 3x3 convolutions of stride 2 on the coarsest one (RetinaNet, arXiv 1708.02002).

    Args:
        in_channels: channels of the backbone's maps, fine to coarse.
        channels: channels of every pyramid level.
        num_extra: levels coarser than the backbone's.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int, num_extra: int = 0):
        super().__init__()
        self.laterals = nn.ModuleList(conv_norm(c, channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in in_channels)
        self.extra = nn.ModuleList(conv_norm(channels, channels, 3, stride=2) for _ in range(num_extra))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """Pyramid maps (B, C, H, W), fine to coarse, with H and W of the inputs, then halved for each extra level."""
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        levels = [output(x) for output, x in zip(self.outputs, merged)]
        for downsample in self.extra:
            levels.append(downsample(levels[-1]))
        return tuple(levels)

    @property
    def output_channels(self) -> tuple[int, ...]:
        """Channels of each level, read from the live weights."""
        return tuple(block[0].out_channels for block in (*self.outputs, *self.extra))


class PAN(nn.Module):
    """An FPN followed by a bottom-up path: each level adds the finer one, halved by a 3x3 convolution of stride 2.

    Args as in `FPN`; extra levels are made from the last one of the bottom-up path.
    """

    def __init__(self, in_channels: tuple[int, ...], channels: int, num_extra: int = 0):
        super().__init__()
        self.top_down = FPN(in_channels, channels)
        steps = range(len(in_channels) - 1)
        self.downsamples = nn.ModuleList(conv_norm(channels, channels, 3, stride=2) for _ in steps)
        self.outputs = nn.ModuleList(conv_norm(channels, channels, 3) for _ in steps)
        self.extra = nn.ModuleList(conv_norm(channels, channels, 3, stride=2) for _ in range(num_extra))

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        """Pyramid maps (B, C, H, W), fine to coarse, with H and W of the inputs, then halved for each extra level."""
        finest, *coarser = self.top_down(maps)
        levels = [finest]
        for downsample, output, x in zip(self.downsamples, self.outputs, coarser):
            levels.append(output(F.relu(downsample(levels[-1]) + x)))
        for downsample in self.extra:
            levels.append(downsample(levels[-1]))
        return tuple(levels)

    @property
    def output_channels(self) -> tuple[int, ...]:
        """Channels of each level, read from the live weights."""
        return (self.top_down.output_channels[0], *(b[0].out_channels for b in (*self.outputs, *self.extra)))


NECKS = {"fpn": FPN, "pan": PAN}
