"""YOLOv7 and YOLOv7-tiny (Wang 2022, arXiv 2207.02696)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.assignment import Objects
from students.yolo.assignment import Predicted, choose_by_cost, match_by_ratio
from students.yolo.blocks import (
    SPPCSPC,
    Activation,
    Conv,
    PathAggregation,
    RepConv,
    pool_around,
    scale_depth,
    scale_width,
)
from students.yolo.detector import YOLODetector
from students.yolo.head import AnchorHead
from students.yolo.loss import Gains, balanced_losses
from students.yolo.weights import load_weights, require_multiples

ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
TINY_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
LEAKY = partial(nn.LeakyReLU, 0.1)


class ELAN(nn.Module):
    """Efficient layer aggregation: a row of 3x3 convolutions of which some results are joined.

    Args:
        in_channels: of the map that comes in.
        hidden: channels of the two 1x1 convolutions that it goes through first.
        inner: channels of each 3x3 convolution.
        channels: of what goes out.
        number: 3x3 convolutions.
        every: of how many of them one is joined.
        act: after each convolution.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        inner: int,
        channels: int,
        number: int,
        every: int,
        act: Activation = nn.SiLU,
    ):
        super().__init__()
        self.side = Conv(in_channels, hidden, act=act)
        self.entry = Conv(in_channels, hidden, act=act)
        self.row = nn.ModuleList(Conv(inner if n else hidden, inner, 3, act=act) for n in range(number))
        self.every = every
        self.exit = Conv(2 * hidden + number // every * inner, channels, act=act)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.side(x), self.entry(x)]
        y = maps[-1]
        for n, conv in enumerate(self.row, 1):
            y = conv(y)
            if n % self.every == 0:
                maps.append(y)
        return self.exit(torch.cat(maps[::-1], dim=1))

    @property
    def out_channels(self) -> int:
        return self.exit.out_channels


class Halving(nn.Module):
    """Half the size in two ways, joined: by pooling, and by a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.pooled = Conv(in_channels, channels)
        self.entry = Conv(in_channels, channels)
        self.strided = Conv(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.strided(self.entry(x)), self.pooled(halve(x))), dim=1)


def halve(x: Tensor) -> Tensor:
    """The largest value of each 2x2 cells; an odd side's last cells count, so that both ways to halve agree."""
    return F.max_pool2d(x, 2, ceil_mode=True)


class Backbone(nn.Module):
    """Maps of strides 8, 16 and 32, of 512, 1024 and 1024 channels at width 1."""

    def __init__(self, width: float, depth: float):
        super().__init__()
        c32, c64, c128, c256, c512, c1024 = (scale_width(c, width) for c in (32, 64, 128, 256, 512, 1024))
        number = 2 * scale_depth(2, depth)
        self.stem = nn.Sequential(Conv(3, c32, 3), Conv(c32, c64, 3, 2), Conv(c64, c64, 3), Conv(c64, c128, 3, 2))
        self.stage2 = ELAN(c128, c64, c64, c256, number, 2)
        self.stage3 = nn.Sequential(Halving(c256, c128), ELAN(2 * c128, c128, c128, c512, number, 2))
        self.stage4 = nn.Sequential(Halving(c512, c256), ELAN(2 * c256, c256, c256, c1024, number, 2))
        self.stage5 = nn.Sequential(Halving(c1024, c512), ELAN(2 * c512, c256, c256, c1024, number, 2))
        self.out_channels = c512, c1024, c1024

    def forward(self, images: Tensor) -> list[Tensor]:
        p3 = self.stage3(self.stage2(self.stem(images)))
        p4 = self.stage4(p3)
        return [p3, p4, self.stage5(p4)]


class Neck(PathAggregation):
    """With ELAN blocks, and halved in two ways."""

    def __init__(self, in_channels: tuple[int, ...], width: float, depth: float):
        super().__init__()
        c3, c4, c5 = in_channels
        c64, c128, c256, c512 = (scale_width(c, width) for c in (64, 128, 256, 512))
        number = scale_depth(4, depth)
        self.pooling = SPPCSPC(c5, c512)
        self.reduce5 = Conv(c512, c256)
        self.lateral4 = Conv(c4, c256)
        self.down4 = ELAN(2 * c256, c256, c128, c256, number, 1)
        self.reduce4 = Conv(c256, c128)
        self.lateral3 = Conv(c3, c128)
        self.down3 = ELAN(2 * c128, c128, c64, c128, number, 1)
        self.halve3 = Halving(c128, c128)
        self.up4 = ELAN(2 * c128 + c256, c256, c128, c256, number, 1)
        self.halve4 = Halving(c256, c256)
        self.up5 = ELAN(2 * c256 + c512, c512, c256, c512, number, 1)


class TinyBackbone(nn.Module):
    """Maps of strides 8, 16 and 32, of 128, 256 and 512 channels at width 1."""

    def __init__(self, width: float, depth: float):
        super().__init__()
        widths = [scale_width(c, width) for c in (32, 64, 128, 256, 512)]
        number = scale_depth(2, depth)
        self.stem = nn.Sequential(Conv(3, widths[0], 3, 2, LEAKY), Conv(widths[0], widths[1], 3, 2, LEAKY))
        entries = [widths[1], *widths[1:]]
        self.stages = nn.ModuleList(
            ELAN(entry, hidden, hidden, channels, number, 1, LEAKY)
            for entry, hidden, channels in zip(entries, widths, widths[1:])
        )
        self.out_channels = tuple(widths[2:])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stages[0](self.stem(images))]
        for stage in self.stages[1:]:
            maps.append(stage(halve(maps[-1])))
        return maps[1:]


class TinyPooling(nn.Module):
    """Spatial pyramid pooling beside a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.side = Conv(in_channels, channels, act=LEAKY)
        self.entry = Conv(in_channels, channels, act=LEAKY)
        self.join = Conv(4 * channels, channels, act=LEAKY)
        self.exit = Conv(2 * channels, channels, act=LEAKY)

    def forward(self, x: Tensor) -> Tensor:
        y = self.entry(x)
        y = self.join(torch.cat((*(pool_around(y, kernel) for kernel in (13, 9, 5)), y), dim=1))
        return self.exit(torch.cat((y, self.side(x)), dim=1))


class TinyNeck(PathAggregation):
    """With shorter ELAN blocks, and halved by convolutions alone."""

    def __init__(self, in_channels: tuple[int, ...], width: float, depth: float):
        super().__init__()
        c3, c4, c5 = in_channels
        c32, c64, c128, c256 = (scale_width(c, width) for c in (32, 64, 128, 256))
        number = scale_depth(2, depth)
        self.pooling = TinyPooling(c5, c256)
        self.reduce5 = Conv(c256, c128, act=LEAKY)
        self.lateral4 = Conv(c4, c128, act=LEAKY)
        self.down4 = ELAN(2 * c128, c64, c64, c128, number, 1, LEAKY)
        self.reduce4 = Conv(c128, c64, act=LEAKY)
        self.lateral3 = Conv(c3, c64, act=LEAKY)
        self.down3 = ELAN(2 * c64, c32, c32, c64, number, 1, LEAKY)
        self.halve3 = Conv(c64, c128, 3, 2, LEAKY)
        self.up4 = ELAN(2 * c128, c64, c64, c128, number, 1, LEAKY)
        self.halve4 = Conv(c128, c256, 3, 2, LEAKY)
        self.up5 = ELAN(2 * c256, c128, c128, c256, number, 1, LEAKY)


class YOLOv7Detector(YOLODetector):
    """YOLOv7: ELAN blocks, re-parameterised convolutions before the head, assignment by cost.

    What the original learns beside its detection layers to be added and multiplied there (implicit knowledge, YOLOR,
    arXiv 2105.04206) is part of these layers here, as it is when the original is deployed.

    Args:
        class_names: the classes, in label order.
        width: multiple of the original's channels.
        depth: multiple of the convolutions in its ELAN blocks.
        weights: see `YOLOv5Detector`, and so the last.
        new_head: start the class layers anew, whatever the weights know.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    gains = Gains(box=0.05, objectness=0.7, classification=0.3)

    def __init__(
        self,
        class_names: list[str],
        width: float = 1.0,
        depth: float = 1.0,
        weights: str = "none",
        new_head: bool = False,
    ):
        require_multiples(class_names, width, depth)
        backbone, neck, towers, anchors = self.parts(width, depth)
        head = AnchorHead([tower.out_channels for tower in towers], len(class_names), anchors, towers=towers)
        super().__init__(class_names, backbone, neck, head)
        self.notes = load_weights(self, weights, new_head)

    @staticmethod
    def parts(width: float, depth: float) -> tuple[nn.Module, nn.Module, list[nn.Module], tuple]:
        """Backbone, neck, the head's towers and anchors."""
        backbone = Backbone(width, depth)
        neck = Neck(backbone.out_channels, width, depth)
        towers = [RepConv(c, scale_width(wider, width)) for c, wider in zip(neck.out_channels, (256, 512, 1024))]
        return backbone, neck, towers, ANCHORS

    def compute_loss(self, predicted: Predicted, objects: Objects) -> dict[str, Tensor]:
        matches = choose_by_cost(match_by_ratio(predicted, objects), predicted, objects)
        return balanced_losses(predicted, objects, matches, self.gains)


class YOLOv7TinyDetector(YOLOv7Detector):
    """YOLOv7-tiny: shorter ELAN blocks, leaky ReLU, plain convolutions before the head; arguments as in
    `YOLOv7Detector`."""

    gains = Gains(box=0.05, objectness=1.0, classification=0.5)

    @staticmethod
    def parts(width: float, depth: float) -> tuple[nn.Module, nn.Module, list[nn.Module], tuple]:
        backbone = TinyBackbone(width, depth)
        neck = TinyNeck(backbone.out_channels, width, depth)
        wider = [scale_width(channels, width) for channels in (128, 256, 512)]
        towers = [Conv(c, channels, 3, act=LEAKY) for c, channels in zip(neck.out_channels, wider)]
        return backbone, neck, towers, TINY_ANCHORS
