"""The contract's second half, for two-stage detectors: proposals, and a head that classifies and boxes each of them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from students.detector import Detector


class TwoStageOutput(NamedTuple):
    """What a two-stage detector's forward pass returns: all but its ROI head, which is run where boxes are known.

    Tuples have one entry a level, fine to coarse; channels go anchor by anchor, A anchors a location.

    Attributes:
        features: pyramid maps, (B, C, H, W) each.
        objectness: (B, A, H, W) each, before the sigmoid.
        box_deltas: (B, A*4, H, W) each, against the anchors.
        anchor_boxes: (H*W*A, 4) each, xyxy in pixels, float32.
    """

    features: tuple[Tensor, ...]
    objectness: tuple[Tensor, ...]
    box_deltas: tuple[Tensor, ...]
    anchor_boxes: tuple[Tensor, ...]

    @property
    def class_logits(self) -> tuple[Tensor, ...]:
        """The objectness, where a loss asks for class scores to weigh locations by: one class, object."""
        return self.objectness


class RoiOutput(NamedTuple):
    """What an ROI head says of P boxes, image by image.

    Attributes:
        class_logits: (P, K + 1) before the softmax: our classes in label order, then the background.
        box_deltas: (P, K*4), class by class: how far centre (x, y) and log-size (w, h) must move, in the box's own
            width and height and times (10, 10, 5, 5) (R-CNN, arXiv 1311.2524).
    """

    class_logits: Tensor
    box_deltas: Tensor


class RoiSamples(NamedTuple):
    """Proposals that an ROI head is trained on.

    Attributes:
        boxes: (P_i, 4) xyxy in pixels for each image.
        labels: (P,) int64, all images in order; K is the background.
        box_deltas: (P, 4) the true deltas, as in `RoiOutput`; 0 for the background.
    """

    boxes: list[Tensor]
    labels: Tensor
    box_deltas: Tensor


class TwoStageDetector(Detector):
    """A detector that proposes boxes and looks at each again."""

    decoded_fields = ("features", "objectness", "box_deltas")

    @abstractmethod
    def propose(self, output: TwoStageOutput, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        """The boxes that go into the ROI head, (P_i, 4) xyxy in pixels for each image, outside the graph.

        Args:
            output: what `forward` returned for the batch.
            image_sizes: (height, width) of the valid part of each image, in pixels; boxes are clipped to it.
        """

    @abstractmethod
    def candidates(self, output: TwoStageOutput, image_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """See `Detector.candidates`: of as many proposals of every image, which are padded with boxes of score 0.

        Args:
            output: what `forward` returned for the batch.
            image_size: (height, width) of all images in pixels, to which proposals are clipped; the pyramid's extent
                if None, which goes beyond images whose sides the stride of its finest level does not divide.
        """

    @abstractmethod
    def sample(self, proposals: Sequence[Tensor], targets: list[dict[str, Tensor]]) -> RoiSamples:
        """A random training sample of proposals and true boxes, the same part of both kinds as in the own loss."""

    @abstractmethod
    def roi(self, features: tuple[Tensor, ...], boxes: Sequence[Tensor]) -> RoiOutput:
        """What the ROI head says of any boxes.

        Args:
            features: of `TwoStageOutput`, this detector's own.
            boxes: (P_i, 4) xyxy in pixels for each image, not empty.
        """
