"""YOLOv4 (Bochkovskiy 2020, arXiv 2004.10934)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from students.assignment import Objects
from students.yolo.assignment import Predicted, match_by_shape
from students.yolo.blocks import Bottleneck, Conv, PathAggregation, pool_around, scale_depth, scale_width
from students.yolo.darknet import load_darknet
from students.yolo.detector import YOLODetector
from students.yolo.head import AnchorHead
from students.yolo.loss import darknet_losses
from students.yolo.weights import require_multiples

ANCHORS = (
    ((12, 16), (19, 36), (40, 28)),
    ((36, 75), (76, 55), (72, 146)),
    ((142, 110), (192, 243), (459, 401)),
)
BOX_SCALES = (1.2, 1.1, 1.05)
LEAKY = partial(nn.LeakyReLU, 0.1)


class CSPStage(nn.Module):
    """Half the size, then residual blocks that a part of the channels skips (CSPNet, arXiv 1911.11929).

    Args:
        in_channels: of the map that comes in.
        channels: of what goes out.
        hidden: channels of each of the two parts.
        inner: channels within a residual block.
        number: residual blocks.
    """

    def __init__(self, in_channels: int, channels: int, hidden: int, inner: int, number: int):
        super().__init__()
        self.halve = Conv(in_channels, channels, 3, 2, nn.Mish)
        self.side = Conv(channels, hidden, act=nn.Mish)
        self.entry = Conv(channels, hidden, act=nn.Mish)
        self.blocks = nn.Sequential(*(Bottleneck(hidden, inner, act=nn.Mish) for _ in range(number)))
        self.exit = Conv(hidden, hidden, act=nn.Mish)
        self.join = Conv(2 * hidden, channels, act=nn.Mish)

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return self.join(torch.cat((self.exit(self.blocks(self.entry(x))), self.side(x)), dim=1))


class Backbone(nn.Module):
    """CSPDarknet53; maps of strides 8, 16 and 32."""

    def __init__(self, widths: list[int], depth: float):
        super().__init__()
        self.stem = Conv(3, widths[0], 3, act=nn.Mish)
        stages = []
        for n, (c, channels, number) in enumerate(zip(widths, widths[1:], (1, 2, 8, 8, 4))):
            hidden, inner = (channels, channels // 2) if n == 0 else (channels // 2, channels // 2)
            stages.append(CSPStage(c, channels, hidden, inner, scale_depth(number, depth)))
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[3:]


class Alternating(nn.Sequential):
    """1x1 and 3x3 convolutions in turn, the latter twice as wide."""

    def __init__(self, in_channels: int, channels: int, number: int = 5):
        layers = [Conv(in_channels, channels, act=LEAKY)]
        for _ in range(number // 2):
            layers += [Conv(channels, 2 * channels, 3, act=LEAKY), Conv(2 * channels, channels, act=LEAKY)]
        super().__init__(*layers)

    @property
    def out_channels(self) -> int:
        return self[-1].out_channels


class Pooling(nn.Module):
    """Spatial pyramid pooling (arXiv 1406.4729) between convolutions."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.before = Alternating(in_channels, channels, 3)
        self.after = Alternating(4 * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(torch.cat((*(pool_around(x, kernel) for kernel in (13, 9, 5)), x), dim=1))


class Neck(PathAggregation):
    """With alternating convolutions."""

    def __init__(self, widths: list[int]):
        super().__init__()
        c3, c4, c5 = widths
        self.pooling = Pooling(c5, c4)
        self.reduce5 = Conv(c4, c3, act=LEAKY)
        self.lateral4 = Conv(c4, c3, act=LEAKY)
        self.down4 = Alternating(2 * c3, c3)
        self.reduce4 = Conv(c3, c3 // 2, act=LEAKY)
        self.lateral3 = Conv(c3, c3 // 2, act=LEAKY)
        self.down3 = Alternating(c3, c3 // 2)
        self.halve3 = Conv(c3 // 2, c3, 3, 2, LEAKY)
        self.up4 = Alternating(2 * c3, c3)
        self.halve4 = Conv(c3, c4, 3, 2, LEAKY)
        self.up5 = Alternating(2 * c4, c4)


class YOLOv4Detector(YOLODetector):
    """YOLOv4: CSPDarknet53, pooling and PAN, anchors by shape.

    Args:
        class_names: the classes, in label order.
        width: multiple of the original's channels.
        depth: multiple of its residual blocks.
        weights: `none`, or the path of a Darknet .weights file.
        new_head: start the class layers anew, whatever the weights know.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    def __init__(
        self,
        class_names: list[str],
        width: float = 1.0,
        depth: float = 1.0,
        weights: str = "none",
        new_head: bool = False,
    ):
        require_multiples(class_names, width, depth)
        # in steps of 16, so that half of them is whole
        widths = [2 * scale_width(channels // 2, width) for channels in (32, 64, 128, 256, 512, 1024)]
        neck = Neck(widths[3:])
        towers = [Conv(c, 2 * c, 3, act=LEAKY) for c in neck.out_channels]
        head = AnchorHead([tower.out_channels for tower in towers], len(class_names), ANCHORS, BOX_SCALES, towers)
        super().__init__(class_names, Backbone(widths, depth), neck, head, norm=(1e-5, 0.1))
        if weights != "none":
            self.notes = load_darknet(self, list(self.darknet_order()), Path(weights), new_head)

    @classmethod
    def told_classes(cls, weights: str) -> list[str]:
        return []  # a Darknet file has no names

    def darknet_order(self) -> Iterator[Conv | int]:
        """The convolutions in the order that the authors' configuration lists them in, and in their places the levels
        whose detection layer comes there."""
        neck, towers = self.neck, self.head.towers
        down = (neck.pooling, neck.reduce5, neck.lateral4, neck.down4, neck.reduce4, neck.lateral3, neck.down3)
        yield from convolutions(self.backbone, *down, towers[0])
        yield 0
        yield from convolutions(neck.halve3, neck.up4, towers[1])
        yield 1
        yield from convolutions(neck.halve4, neck.up5, towers[2])
        yield 2

    def compute_loss(self, predicted: Predicted, objects: Objects) -> dict[str, Tensor]:
        return darknet_losses(predicted, objects, match_by_shape(predicted, objects))


def convolutions(*modules: nn.Module) -> Iterator[Conv]:
    """All within modules, in the order of their definition."""
    return (part for module in modules for part in module.modules() if isinstance(part, Conv))
