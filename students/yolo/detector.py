"""What all YOLO detectors share behind the contract."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from students.assignment import Objects, pad_targets
from students.detector import DenseOutput, Detections, Detector
from students.locations import flatten_levels, grid_locations, map_shapes, to_boxes
from students.nms import select
from students.yolo.assignment import Predicted
from students.yolo.blocks import RepConv
from students.yolo.head import STRIDES, AnchorHead, joint_logits


class YOLOOutput(NamedTuple):
    """A `DenseOutput` whose class scores are those of the anchor's class and of there being an object, multiplied.

    Attributes:
        features: see `DenseOutput`, and so the next three.
        class_logits: of the product.
        box_distances: around the centres of the cells, whichever cell the box's centre lies in.
        box_logits: empty.
        conditional_logits: (B, A*K, H, W) each, of each class given an object.
        objectness: (B, A, H, W) each, before the sigmoid.
    """

    features: tuple[Tensor, ...]
    class_logits: tuple[Tensor, ...]
    box_distances: tuple[Tensor, ...]
    box_logits: tuple[Tensor, ...]
    conditional_logits: tuple[Tensor, ...]
    objectness: tuple[Tensor, ...]


class YOLODetector(Detector):
    """A one-stage detector with three anchors a location on the levels P3 to P5.

    Args:
        class_names: the classes, in label order.
        backbone: from images to maps of strides 8, 16 and 32.
        neck: from these to the pyramid; has `out_channels`.
        head: reads the pyramid.
        norm: epsilon and momentum of all batch norms.

    Raises:
        ValueError: there are no classes.
    """

    anchors = 3

    def __init__(
        self,
        class_names: Sequence[str],
        backbone: nn.Module,
        neck: nn.Module,
        head: AnchorHead,
        norm: tuple[float, float] = (1e-3, 0.03),
    ):
        super().__init__()
        self.class_names = list(class_names)
        self.backbone, self.neck, self.head = backbone, neck, head
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = norm

    def forward(self, images: Tensor) -> YOLOOutput:
        features = self.pyramid(images)
        classes, objectness, distances = map(tuple, self.head(features))
        joint = tuple(map(joint_logits, classes, objectness))
        return YOLOOutput(features, joint, distances, (), classes, objectness)

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.neck(self.backbone(images)))

    def loss(self, output: YOLOOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`classification`, `objectness` and `box`, in the proportions of the original's recipe."""
        predicted = Predicted(
            boxes=self._boxes(output),
            classes=flatten_levels(output.conditional_logits, self.anchors).float(),
            objectness=flatten_levels(output.objectness, self.anchors)[..., 0].float(),
            shapes=map_shapes(output.objectness),
            anchor_sizes=self.head.anchor_sizes.float(),
        )
        return self.compute_loss(predicted, pad_targets(targets, predicted.boxes.device))

    @abstractmethod
    def compute_loss(self, predicted: Predicted, objects: Objects) -> dict[str, Tensor]:
        """The losses of all predictions for a batch's objects."""

    def candidates(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        """See `Detector.candidates`; N are the anchors of all locations of all levels."""
        return self._boxes(output), flatten_levels(output.class_logits, self.anchors).float().sigmoid()

    @torch.no_grad()
    def decode(self, output: DenseOutput, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        """Class-wise NMS over the best candidates, where an anchor may be several classes; see `Detector.decode`."""
        return select(*self.candidates(output), image_sizes)

    def traced(self, output: YOLOOutput, num_boxes: int | None = None) -> list[Tensor]:
        return [*output.features, *output.conditional_logits, *output.objectness, *output.box_distances]

    def deployed(self) -> Detector:
        """A copy in eval mode whose re-parameterised convolutions are merged; itself where there are none."""
        if not any(isinstance(module, RepConv) for module in self.modules()):
            return self
        merged = copy.deepcopy(self).eval()
        for name, module in list(merged.named_modules()):
            if isinstance(module, RepConv):
                parent, _, leaf = name.rpartition(".")
                setattr(merged.get_submodule(parent), leaf, module.merged())
        return merged

    @property
    def strides(self) -> tuple[int, ...]:
        return STRIDES

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return self.neck.out_channels

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (*self.head.class_logits, *self.head.objectness, *self.head.boxes)

    @property
    def class_layers(self) -> tuple[nn.Conv2d, ...]:
        return tuple(self.head.class_logits)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def _boxes(self, output: DenseOutput) -> Tensor:
        """(B, N, 4) xyxy in pixels, float32."""
        shapes = map_shapes(output.class_logits)
        locations, strides = grid_locations(shapes, STRIDES, output.class_logits[0].device)
        locations, strides = (x.repeat_interleave(self.anchors, dim=0) for x in (locations, strides))
        return to_boxes(flatten_levels(output.box_distances, self.anchors).float(), locations, strides)
