"""What all YOLO heads share: for each anchor of each cell a box, whether there is an object, and of which class."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses.precision import at_least_float32

STRIDES = (8, 16, 32)
Anchors = Sequence[Sequence[tuple[int, int]]]  # by level, fine to coarse: width and height in pixels
LARGEST_GROWTH = math.log(1000 / 16)  # in log scale; a fresh network must not overflow


class AnchorHead(nn.Module):
    """A 1x1 convolution a level for each of the three things that are said of an anchor.

    Public checkpoints hold the three as one layer; apart, classes can be learnt anew, or put into another order,
    without touching the rest, and it costs the same.

    Args:
        in_channels: pyramid channels, fine to coarse.
        num_classes: classes without background.
        anchors: width and height in pixels, equally many a level.
        box_scales: for each level, how far a sigmoid moves a box's centre, in cells (YOLOv4, arXiv 2004.10934); sizes
            are then exponentials. Where None, centres move by 2 cells and sizes are squares of up to four times the
            anchor's, as since YOLOv5.
        towers: a module a level that the pyramid goes through first.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        anchors: Anchors,
        box_scales: Sequence[float] | None = None,
        towers: Sequence[nn.Module] | None = None,
    ):
        super().__init__()
        number = len(anchors[0])
        self.box_scales = box_scales
        self.towers = nn.ModuleList(towers or (nn.Identity() for _ in in_channels))
        self.boxes = nn.ModuleList(nn.Conv2d(c, number * 4, 1) for c in in_channels)
        self.objectness = nn.ModuleList(nn.Conv2d(c, number, 1) for c in in_channels)
        self.class_logits = nn.ModuleList(nn.Conv2d(c, number * num_classes, 1) for c in in_channels)
        # with the weights, not only in the code: a checkpoint may have anchors of its own
        self.register_buffer("anchor_sizes", torch.tensor(anchors, dtype=torch.float32))  # (levels, A, 2) pixels
        for objectness, classes, stride in zip(self.objectness, self.class_logits, STRIDES):
            # as if each image of 640x640 pixels had 8 objects, and these had each class alike
            nn.init.constant_(objectness.bias, math.log(8 * stride**2 / 640**2))
            nn.init.constant_(classes.bias, math.log(0.6 / (num_classes - 0.99)))

    def forward(self, features: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of each level: class logits (B, A*K, H, W) given an object, objectness logits (B, A, H, W), and box distances
        (B, A*4, H, W), see `DenseOutput`."""
        maps = [tower(x) for tower, x in zip(self.towers, features)]
        classes = [layer(x) for layer, x in zip(self.class_logits, maps)]
        objectness = [layer(x) for layer, x in zip(self.objectness, maps)]
        return classes, objectness, [self.read_boxes(layer(x), n) for n, (layer, x) in enumerate(zip(self.boxes, maps))]

    def read_boxes(self, outputs: Tensor, level: int) -> Tensor:
        """Distances (B, A*4, H, W) in strides, from what the box layer of a level says."""
        sizes = at_least_float32(self.anchor_sizes[level])[..., None, None] / STRIDES[level]
        values = at_least_float32(outputs).unflatten(1, (-1, 4))  # (B, A, 4, H, W): x, y, width, height
        if self.box_scales is None:
            centre, half = 2 * values[:, :, :2].sigmoid() - 1, sizes * (2 * values[:, :, 2:].sigmoid()).square() / 2
        else:
            centre = self.box_scales[level] * (values[:, :, :2].sigmoid() - 0.5)
            half = sizes * values[:, :, 2:].clamp(max=LARGEST_GROWTH).exp() / 2
        return torch.cat((half - centre, half + centre), dim=2).flatten(1, 2)


def joint_logits(classes: Tensor, objectness: Tensor) -> Tensor:
    """Logits of the product of two probabilities: of a class given an object, and of an object.

    1 / ((1 + e^-o)(1 + e^-c)) has the odds 1 / (e^-o + e^-c + e^(-o-c)).

    Args:
        classes: (B, A*K, H, W) logits, anchor by anchor.
        objectness: (B, A, H, W) logits.

    Returns:
        Like `classes`.
    """
    c = classes.unflatten(1, (objectness.shape[1], -1))
    o = objectness[:, :, None].expand_as(c)
    return -torch.stack((-o, -c, -o - c)).logsumexp(dim=0).flatten(1, 2)
