"""The first family: any timm backbone, an FPN or PAN, and a dense head."""

import torch
from torch import Tensor, nn

from students.assignment import pad_targets
from students.backbone import Backbone
from students.dense_head import DenseHead, Predictions
from students.detector import DenseOutput, Detections, Detector
from students.gfl_head import GFLHead
from students.locations import flatten_levels, grid_locations, map_shapes, to_boxes
from students.nms import IOU_THRESHOLD, MAX_CANDIDATES, MAX_DETECTIONS, SCORE_THRESHOLD, select
from students.pyramid import NECKS
from students.retinanet_head import RetinaNetHead
from students.task_aligned_head import TaskAlignedHead

HEADS: dict[str, type[DenseHead]] = {"task_aligned": TaskAlignedHead, "gfl": GFLHead, "retinanet": RetinaNetHead}


class DenseDetector(Detector):
    """A one-stage detector; what it predicts at a location, and how that is trained, is its head's.

    Args:
        class_names: the classes, in label order.
        backbone: a timm model name.
        weights: the backbone's first weights: `none`, `imagenet`, or the path of a .pth or .safetensors file.
        neck: `fpn` or `pan`.
        channels: width of the pyramid and of the head.
        levels: pyramid levels, ascending and without gaps; level n has stride 2^n. Levels above 5 are made by the neck.
        head: one of `HEADS`.
        head_depth: 3x3 convolutions in each of the head's two towers.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    separate_classes = True

    def __init__(
        self,
        class_names: list[str],
        backbone: str,
        weights: str = "none",
        neck: str = "fpn",
        channels: int = 96,
        levels: tuple[int, ...] = (3, 4, 5),
        head: str = "task_aligned",
        head_depth: int = 2,
    ):
        super().__init__()
        if not class_names:
            raise ValueError("class_names: the list of classes is empty; a detector needs at least one")
        if not levels:
            raise ValueError("levels: the list is empty; give the pyramid's levels, such as [3, 4, 5]")
        if list(levels) != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError(f"levels: {list(levels)} must ascend without gaps, such as [3, 4, 5]")
        from_backbone = [level for level in levels if level <= 5]
        if not from_backbone:
            raise ValueError(f"levels: {list(levels)} has none that a backbone gives; start at 5 or below")
        self.class_names = list(class_names)
        self._strides = tuple(2**level for level in levels)
        self.backbone = Backbone(backbone, tuple(2**level for level in from_backbone), weights)
        self.neck = NECKS[neck](self.backbone.channels, channels, num_extra=len(levels) - len(from_backbone))
        self.head = HEADS[head](channels, len(class_names), len(levels), head_depth)
        self.anchors, self.box_bins = self.head.anchors, self.head.box_bins
        mean, std = self.backbone.normalization
        # buffers, not constants: a saved detector brings along the normalisation that its weights were trained with
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> DenseOutput:
        features = self.pyramid(images)
        return DenseOutput(features, *self.head(features))

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.neck(self.backbone((images - self.mean) / self.std))

    def loss(self, output: DenseOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The head's `classification` and `box`; see `DenseHead.loss` of each."""
        return self.head.loss(self._predictions(output), pad_targets(targets, output.class_logits[0].device))

    def candidates(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        """See `Detector.candidates`; N are all predictions of all levels."""
        predicted = self._predictions(output)
        return predicted.boxes, predicted.logits.sigmoid()

    @torch.no_grad()
    def decode(
        self,
        output: DenseOutput,
        image_sizes: list[tuple[int, int]],
        score_threshold: float = SCORE_THRESHOLD,
        iou_threshold: float = IOU_THRESHOLD,
        max_candidates: int = MAX_CANDIDATES,
        max_detections: int = MAX_DETECTIONS,
    ) -> list[Detections]:
        """Class-wise NMS over the best candidates; limits as in `students.nms.select`, see `Detector.decode`."""
        limits = (score_threshold, iou_threshold, max_candidates, max_detections)
        return select(*self.candidates(output), image_sizes, *limits)

    @property
    def strides(self) -> tuple[int, ...]:
        return self._strides

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return self.neck.output_channels

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.head.class_logits, self.head.box_distances)

    @property
    def class_layers(self) -> tuple[nn.Module, ...]:
        return (self.head.class_logits,)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())

    def _predictions(self, output: DenseOutput) -> Predictions:
        shapes = map_shapes(output.class_logits)
        locations, strides = grid_locations(shapes, self._strides, output.class_logits[0].device)
        if self.anchors > 1:
            locations, strides = (x.repeat_interleave(self.anchors, dim=0) for x in (locations, strides))
        distances = flatten_levels(output.box_distances, self.anchors).float()
        distributions = None
        if output.box_logits:
            distributions = flatten_levels(output.box_logits, self.anchors).float().unflatten(-1, (4, self.box_bins))
        return Predictions(
            logits=flatten_levels(output.class_logits, self.anchors).float(),
            boxes=to_boxes(distances, locations, strides),
            box_logits=distributions,
            locations=locations,
            strides=strides,
            level_sizes=tuple(height * width * self.anchors for height, width in shapes),
        )
