"""A teacher that sees the student's images at a size of its own."""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from students import DenseOutput, Detections, Detector


class ScaledDetector(Detector):
    """A detector that looks at every image enlarged or reduced; its caller deals in pixels of the images as they came.

    A stride of 16 on images twice as large is one of 8 here, and its cells are those of a student's level of stride 8:
    what either says in strides at a location can be compared. Images are resized bilinearly, so an enlarged one shows
    nothing that the given one does not hold.

    Args:
        detector: any detector.
        scale: its images' height and width, as a multiple of those given.
    """

    def __init__(self, detector: Detector, scale: float):
        super().__init__()
        self.detector, self.scale = detector, scale
        self.anchors, self.box_bins, self.unknown = detector.anchors, detector.box_bins, detector.unknown
        self.notes, self.detects, self.learns = detector.notes, detector.detects, detector.learns
        self.scores_locations, self.decoded_fields = detector.scores_locations, detector.decoded_fields

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked for is the detector's: its classes, its recipe, its parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("detector"), name)

    def forward(self, images: Tensor) -> DenseOutput:
        return self.detector(self._resized(images))

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.detector.pyramid(self._resized(images))

    def loss(self, output: DenseOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.detector.loss(output, [target | {"boxes": target["boxes"] * self.scale} for target in targets])

    def decode(self, output: DenseOutput, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        found = self.detector.decode(output, [self._scaled(size) for size in image_sizes])
        return [replace(detections, boxes=detections.boxes / self.scale) for detections in found]

    def traced(self, output: DenseOutput, num_boxes: int | None = None) -> list[Tensor]:
        return self.detector.traced(output, num_boxes)

    def deployed(self) -> "ScaledDetector":
        deployed = self.detector.deployed()
        return self if deployed is self.detector else ScaledDetector(deployed, self.scale)

    @property
    def strides(self) -> tuple[float, ...]:
        return tuple(stride / self.scale for stride in self.detector.strides)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return self.detector.feature_channels

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return self.detector.output_layers

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.detector.normalization

    def _resized(self, images: Tensor) -> Tensor:
        size = self._scaled(tuple(images.shape[-2:]))
        return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=self.scale < 1)

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        return round(size[0] * self.scale), round(size[1] * self.scale)
