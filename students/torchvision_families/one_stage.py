"""One-stage detectors of torchvision: raw outputs of its heads, brought into the form that all dense heads share."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from students.detector import IMPOSSIBLE, Detections, Limits, channels_of
from students.locations import grid_locations, map_shapes, to_boxes
from students.torchvision_families.backbone import pyramid_channels
from students.torchvision_families.base import TorchvisionDetector, grid_anchors


class AnchorOutput(NamedTuple):
    """A `DenseOutput`, and what torchvision's losses and post-processing read.

    C are the head's own classes, the background first. Anchors are counted within a location, locations row by row.

    Attributes:
        features: see `DenseOutput`, and so the next three.
        class_logits: where the head ends in a softmax, those whose sigmoid is its probability.
        box_distances: see `DenseOutput`.
        box_logits: empty.
        raw_logits: (B, A*C, H, W) each, as the head gives them.
        raw_boxes: (B, A*4, H, W) each, encoded against the anchors.
        anchor_boxes: (H*W*A, 4) each, xyxy in pixels, float32.
        centerness: (B, A, H, W) each, before the sigmoid; empty for heads without it.
    """

    features: tuple[Tensor, ...]
    class_logits: tuple[Tensor, ...]
    box_distances: tuple[Tensor, ...]
    box_logits: tuple[Tensor, ...]
    raw_logits: tuple[Tensor, ...]
    raw_boxes: tuple[Tensor, ...]
    anchor_boxes: tuple[Tensor, ...]
    centerness: tuple[Tensor, ...] = ()


class OneStageDetector(TorchvisionDetector):
    """A detector with anchors, or anchor points, at every location of every level."""

    decoded_fields = ("raw_logits", "raw_boxes", "centerness")

    def forward(self, images: Tensor) -> AnchorOutput:
        features = self.pyramid(images)
        raw_logits, raw_boxes, centerness = self.run_head(features)
        anchor_boxes = self.make_anchors(features, tuple(images.shape[-2:]))
        distances = tuple(self._to_distances(*level) for level in zip(raw_boxes, anchor_boxes, self.strides))
        class_logits = tuple(self._to_class_logits(level) for level in raw_logits)
        return AnchorOutput(features, class_logits, distances, (), raw_logits, raw_boxes, anchor_boxes, centerness)

    def loss(self, output: AnchorOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """torchvision's own losses; where targets have `scores`, those of `soft_losses` in their place."""
        predictions = {name: torch.cat(levels, dim=1) for name, levels in self._predictions(output).items()}
        anchors = [torch.cat(output.anchor_boxes)] * len(targets)
        levels = [len(level) for level in output.anchor_boxes]
        return self.compute_loss(self.to_head_targets(targets), predictions, anchors, levels)

    @torch.no_grad()
    def decode(self, output: AnchorOutput, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        """torchvision's own post-processing, with its thresholds; see `Detector.decode`."""
        return self.to_detections(self.postprocess(self._predictions(output), output.anchor_boxes, image_sizes))

    def candidates(self, output: AnchorOutput) -> tuple[Tensor, Tensor]:
        """See `Detector.candidates`; FCOS' scores take in how central the location is."""
        locations, strides = grid_locations(
            map_shapes(output.class_logits), self.strides, output.class_logits[0].device
        )
        anchors = [level.shape[1] // 4 for level in output.box_distances]
        cells = [level.shape[-2] * level.shape[-1] for level in output.box_distances]
        of_each = [
            torch.cat([x.repeat_interleave(n, dim=0) for x, n in zip(values.split(cells), anchors)])
            for values in (locations, strides)
        ]
        distances = torch.cat([flatten_predictions(level, 4) for level in output.box_distances], dim=1)
        number = len(self.class_names)
        scores = (
            torch.cat([flatten_predictions(level, number) for level in output.class_logits], dim=1).float().sigmoid()
        )
        if output.centerness:
            central = torch.cat([flatten_predictions(level, 1) for level in output.centerness], dim=1).float().sigmoid()
            scores = (scores * central).sqrt()
        return to_boxes(distances.float(), *of_each), scores

    @property
    def limits(self) -> Limits:
        """torchvision's own, but that the best candidates are chosen from all levels and classes together."""
        model = self.model
        most = model.topk_candidates * len(self.strides)
        return Limits(model.score_thresh, model.nms_thresh, most, model.detections_per_img)

    def hide_classes(self, output: AnchorOutput, labels: tuple[int, ...]) -> AnchorOutput:
        """See `Detector.hide_classes`; what the loss reads is hidden, too, unless the head ends in a softmax."""
        output = super().hide_classes(output, labels)
        if not labels or not self.separate_classes:
            return output
        of_head, channels = tuple(self.class_channels[list(labels)].tolist()), output.raw_logits[0].shape[1]
        hidden = channels_of(of_head, channels // self.head_classes, channels, output.raw_logits[0].device)
        return output._replace(raw_logits=tuple(x.masked_fill(hidden, IMPOSSIBLE) for x in output.raw_logits))

    def traced(self, output: AnchorOutput, num_boxes: int | None = None) -> list[Tensor]:
        return [*output.features, *output.raw_logits, *output.raw_boxes, *output.centerness]

    @abstractmethod
    def run_head(
        self, features: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Raw logits, raw boxes and centerness, see `AnchorOutput`."""

    @abstractmethod
    def make_anchors(self, features: tuple[Tensor, ...], image_size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Anchor boxes of each level, (H*W*A, 4) xyxy in pixels."""

    @abstractmethod
    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        """Boxes (N, 4) xyxy in pixels, from what the head says (N, 4) of anchors (N, 4)."""

    @abstractmethod
    def compute_loss(
        self, targets: list[dict[str, Tensor]], predictions: dict[str, Tensor], anchors: list[Tensor], levels: list[int]
    ) -> dict[str, Tensor]:
        """torchvision's losses, or the soft ones.

        Args:
            targets: with the head's labels; they may have scores.
            predictions: (B, N, .) by torchvision's names, N over all levels.
            anchors: (N, 4) for each image.
            levels: how many of the N belong to each level.
        """

    @abstractmethod
    def postprocess(
        self,
        predictions: dict[str, list[Tensor]],
        anchors: tuple[Tensor, ...],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """torchvision's detections; arguments as in `compute_loss`, but level by level, the same for all images."""

    def to_sigmoid(self, logits: Tensor) -> Tensor:
        """(B, A, C, H, W) raw logits to those of a sigmoid a class, where they are not."""
        return logits

    def _to_class_logits(self, raw_logits: Tensor) -> Tensor:
        by_class = self.to_sigmoid(raw_logits.unflatten(1, (-1, self.head_classes)))
        return by_class.index_select(2, self.class_channels).flatten(1, 2)

    def _to_distances(self, raw_boxes: Tensor, anchors: Tensor, stride: int) -> Tensor:
        batch, _, height, width = raw_boxes.shape
        encoded = flatten_predictions(raw_boxes, 4).float()
        boxes = self.decode_boxes(encoded.flatten(0, 1), anchors.repeat(batch, 1))
        # (B, H, W, A, 4), in strides from the top left corner of the image
        boxes = boxes.view(batch, height, width, -1, 4) / stride
        y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in (height, width))
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]
        distances = torch.cat((centres - boxes[..., :2], boxes[..., 2:] - centres), dim=-1)
        return distances.flatten(3).permute(0, 3, 1, 2)

    def _predictions(self, output: AnchorOutput) -> dict[str, list[Tensor]]:
        """(B, H*W*A, .) of each level, float32, by torchvision's names."""
        columns = {
            "cls_logits": (output.raw_logits, self.head_classes),
            "bbox_regression": (output.raw_boxes, 4),
            "bbox_ctrness": (output.centerness, 1),
        }
        return {
            name: [flatten_predictions(level, width).float() for level in levels]
            for name, (levels, width) in columns.items()
            if levels
        }


class PyramidDetector(OneStageDetector):
    """A one-stage detector on a pyramid with the levels P3 to P7, with a sigmoid a class."""

    separate_classes = True

    def make_anchors(self, features, image_size):
        return grid_anchors(self.model.anchor_generator, features, image_size)

    def postprocess(self, predictions, anchors, image_sizes):
        return self.model.postprocess_detections(predictions, [list(anchors)] * len(image_sizes), image_sizes)

    @property
    def head_classes(self) -> int:
        return self.model.head.classification_head.num_classes

    def widen_head(self, classes: int) -> None:
        super().widen_head(classes)
        self.model.head.classification_head.num_classes = classes

    @property
    def strides(self) -> tuple[int, ...]:
        return (8, 16, 32, 64, 128)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return pyramid_channels(self.model.backbone.fpn)


def flatten_predictions(level: Tensor, columns: int) -> Tensor:
    """(B, A*columns, H, W) -> (B, H*W*A, columns)."""
    return level.unflatten(1, (-1, columns)).permute(0, 3, 4, 1, 2).flatten(1, 3)
