"""YOLOv5, in its published sizes n, s, m, l and x (release 6)."""

import torch
from torch import Tensor, nn

from students.assignment import Objects
from students.yolo.assignment import Predicted, match_by_ratio
from students.yolo.blocks import C3, SPPF, Conv, enlarge_to, scale_depth, scale_width
from students.yolo.detector import YOLODetector
from students.yolo.head import AnchorHead
from students.yolo.loss import Gains, balanced_losses
from students.yolo.weights import load_weights, require_multiples

SIZES = {"n": (0.25, 0.33), "s": (0.5, 0.33), "m": (0.75, 0.67), "l": (1.0, 1.0), "x": (1.25, 1.33)}  # width, depth
ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
GAINS = Gains(box=0.05, objectness=1.0, classification=0.5)


class Backbone(nn.Module):
    """CSPDarknet with C3 blocks; maps of strides 8, 16 and 32."""

    def __init__(self, widths: list[int], depth: float):
        super().__init__()
        self.stem = Conv(3, widths[0], 6, 2, padding=2)
        stages = zip(widths, widths[1:], (3, 6, 9, 3))
        self.stages = nn.ModuleList(
            nn.Sequential(Conv(c, wider, 3, 2), C3(wider, wider, scale_depth(number, depth)))
            for c, wider, number in stages
        )
        self.pooling = SPPF(widths[-1], widths[-1])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [*maps[2:4], self.pooling(maps[4])]


class Neck(nn.Module):
    """Top-down, then bottom-up (PAN, arXiv 1803.01534), by C3 blocks over joined maps."""

    def __init__(self, widths: list[int], depth: float):
        super().__init__()
        c3, c4, c5 = widths[2:]
        number = scale_depth(3, depth)
        self.reduce5 = Conv(c5, c4)
        self.down4 = C3(2 * c4, c4, number, shortcut=False)
        self.reduce4 = Conv(c4, c3)
        self.down3 = C3(2 * c3, c3, number, shortcut=False)
        self.halve3 = Conv(c3, c3, 3, 2)
        self.up4 = C3(2 * c3, c4, number, shortcut=False)
        self.halve4 = Conv(c4, c4, 3, 2)
        self.up5 = C3(2 * c4, c5, number, shortcut=False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        p3, p4, p5 = maps
        p5 = self.reduce5(p5)
        p4 = self.reduce4(self.down4(torch.cat((enlarge_to(p5, p4), p4), dim=1)))
        p3 = self.down3(torch.cat((enlarge_to(p4, p3), p3), dim=1))
        p4 = self.up4(torch.cat((self.halve3(p3), p4), dim=1))
        return [p3, p4, self.up5(torch.cat((self.halve4(p4), p5), dim=1))]

    @property
    def out_channels(self) -> tuple[int, ...]:
        return self.down3.out_channels, self.up4.out_channels, self.up5.out_channels


class YOLOv5Detector(YOLODetector):
    """YOLOv5 (release 6): C3 blocks, SPPF, anchors by ratio.

    Args:
        class_names: the classes, in label order.
        size: n, s, m, l or x: sets `width` and `depth`.
        width: multiple of l's channels, in place of the size's.
        depth: multiple of l's blocks, in place of the size's.
        weights: `none`, or the path of a published .pt file, or of a .safetensors file with its names; see
            `students.yolo.weights`.
        new_head: start the class layers anew, whatever the weights know.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    def __init__(
        self,
        class_names: list[str],
        size: str = "s",
        width: float | None = None,
        depth: float | None = None,
        weights: str = "none",
        new_head: bool = False,
    ):
        if size not in SIZES:
            raise ValueError(f"size: {size!r} does not exist; choose {', '.join(SIZES)}")
        of_size = dict(zip(("width", "depth"), SIZES[size]))
        width, depth = width or of_size["width"], depth or of_size["depth"]
        require_multiples(class_names, width, depth)
        widths = [scale_width(channels, width) for channels in (64, 128, 256, 512, 1024)]
        head = AnchorHead(widths[2:], len(class_names), ANCHORS)
        super().__init__(class_names, Backbone(widths, depth), Neck(widths, depth), head)
        self.notes = load_weights(self, weights, new_head)

    def compute_loss(self, predicted: Predicted, objects: Objects) -> dict[str, Tensor]:
        return balanced_losses(predicted, objects, match_by_ratio(predicted, objects), GAINS)
