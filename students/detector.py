"""The contract that every detector keeps, whether it teaches or learns.

A detector is an `nn.Module` whose forward pass returns tensors only, the same in train and eval mode. That is what lets
any detector teach any other, and what lets one pruner trace, cut and rebuild all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from students.checkpoint import read_tensors
from students.plan import Plan

IMPOSSIBLE = -1e4  # a logit whose probability is 0 in every precision, also behind a temperature


class DenseOutput(NamedTuple):
    """What a dense one-stage detector's forward pass returns; tuples have one entry a pyramid level, fine to coarse.

    A head makes A predictions at every location, one without anchors, else one an anchor; channels go prediction by
    prediction, so that `unflatten(1, (A, -1))` takes them apart.

    Attributes:
        features: pyramid maps, (B, C, H, W) each.
        class_logits: (B, A*K, H, W) each, before the sigmoid; no background class.
        box_distances: (B, A*4, H, W) each: left, top, right and bottom distance from the centre of the cell to the
            box's edges, in units of the level's stride; negative where an anchored box does not hold the centre.
        box_logits: (B, A*4*bins, H, W) each, edge by edge: the distribution over distances of 0 to bins - 1 strides
            whose mean the distance is, before the softmax (Generalized Focal Loss, arXiv 2006.04388); empty for heads
            that tell one distance only.
    """

    features: tuple[Tensor, ...]
    class_logits: tuple[Tensor, ...]
    box_distances: tuple[Tensor, ...]
    box_logits: tuple[Tensor, ...] = ()


def of_images(output: NamedTuple, part: slice) -> NamedTuple:
    """What a detector's forward pass returned, of some of the batch's images; anchors are the same for all of them."""
    fields = zip(output._fields, output)
    return type(output)(
        *(levels if name == "anchor_boxes" else tuple(level[part] for level in levels) for name, levels in fields)
    )


@dataclass
class Detections:
    """The decoded detections of one image, best first.

    Attributes:
        boxes: (N, 4) xyxy, pixels of the image that the network saw.
        scores: (N,) in [0, 1].
        labels: (N,) int64 class indices.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Limits(NamedTuple):
    """Which of all predictions are told; the defaults are those of `students.nms`.

    Attributes:
        score_threshold: lower scores are dropped.
        iou_threshold: of two boxes of one class that overlap more, the lower-scored goes.
        max_candidates: (prediction, class) pairs that enter the NMS, per image.
        max_detections: per image.
    """

    score_threshold: float = 0.01
    iou_threshold: float = 0.6
    max_candidates: int = 1000
    max_detections: int = 100


class Detector(nn.Module, ABC):
    """A detector of any family. Subclasses take plain keyword arguments, so that a recipe can be written down.

    Attributes:
        detects: whether it tells boxes and classes; some networks only teach, by their features.
        learns: whether it has a loss; some detectors only teach.
        scores_locations: whether its head says something of every location of its levels, `class_logits`.
        class_names: the names that labels stand for, in label order.
        recipe: family name and arguments, set by `students.build`; enough to build the uncut detector again.
        plans: the cuts made so far, in order; recipe, plans and tensors are the whole detector.
        info: facts kept beside it on disk, such as the `image_size` it was trained for; empty for a new one.
        decoded_fields: of its output, what `decode` goes by.
        anchors: predictions that a dense head makes at each location; 0 for a detector without one.
        box_bins: length of the distributions in `DenseOutput.box_logits`; 0 where there are none.
        only_backbone: whether its first weights are those of its backbone alone, so that it detects nothing yet.
        unknown: labels that it never gives, as it has learnt other classes; see `teachers.speak`.
        separate_classes: whether its loss says of each class by itself where it is and is not, so that some can be left
            out of it, see `hide_classes`; not so where it tells objects from background first, or in one softmax.
        settled: arguments that were left to the family, such as what follows from the first weights; they go into the
            recipe, since a saved detector is rebuilt without those.
        notes: what a user should be told about how it was built.
    """

    detects: bool = True
    decoded_fields: tuple[str, ...] = ("class_logits", "box_distances")
    learns: bool = True
    scores_locations: bool = True
    class_names: list[str]
    recipe: dict[str, Any]
    plans: list[Plan]
    info: dict[str, Any]
    anchors: int = 0
    box_bins: int = 0
    only_backbone: bool = False
    unknown: tuple[int, ...] = ()
    separate_classes: bool = False
    settled: Mapping[str, Any] = MappingProxyType({})
    notes: Sequence[str] = ()

    @classmethod
    def told_classes(cls, weights: str) -> list[str]:
        """The classes that first weights are known to be of, in label order; empty where they do not tell.

        Args:
            weights: as for the detector, and of all of it.

        Raises:
            ValueError: a file that cannot be read.
        """
        return read_tensors(Path(weights))[1]

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """What the forward pass calls as a whole and can be compiled; the pyramid lies between them, as losses are
        measured at it."""
        return tuple(self.children())

    @property
    def title(self) -> str:
        """What to call it in a line: the family, but for the first one, and the backbone or size where there is a
        choice."""
        names = [self.recipe["name"], self.recipe.get("backbone", self.recipe.get("size", ""))]
        return " ".join(name for name in names if name not in ("dense", ""))

    def arrange_classes(self, class_names: Sequence[str], rows: Sequence[int | None]) -> None:
        """Gives the detector other classes in place of its own. The known ones keep their scores; the others, which
        then stand in `unknown`, never have any.

        Args:
            class_names: the new classes, in label order.
            rows: for each of them its own label so far, or None where it has learnt no such class.

        Raises:
            ValueError: a family whose class layers are not known.
        """
        if not self.class_layers:
            raise ValueError(
                f"the class layers of a {type(self).__name__} are not known, so it cannot be given other classes"
            )
        known = [label for label, row in enumerate(rows) if row is not None]
        for layer in self.class_layers:
            replace_rows(layer, len(self.class_names), len(rows), known, [rows[label] for label in known])
        self._enter_classes(class_names, rows)

    def hide_classes(self, output: DenseOutput, labels: tuple[int, ...]) -> DenseOutput:
        """An output whose scores of some classes are fixed at 0, so that a teacher who does not know them neither
        teaches them nor is missed there. A detector that says nothing of classes at locations gives it back as it is.

        Args:
            output: of this detector.
            labels: the classes to hide.
        """
        if not labels or "class_logits" not in output._fields:
            return output
        hidden = channels_of(labels, self.anchors, output.class_logits[0].shape[1], output.class_logits[0].device)
        return output._replace(class_logits=tuple(x.masked_fill(hidden, IMPOSSIBLE) for x in output.class_logits))

    def _enter_classes(self, class_names: Sequence[str], rows: Sequence[int | None], **others: Any) -> None:
        self.unknown = tuple(label for label, row in enumerate(rows) if row is None)
        self.class_names = list(class_names)
        self.recipe = {**self.recipe, "class_names": self.class_names, **others}

    @abstractmethod
    def forward(self, images: Tensor) -> DenseOutput:
        """Raw outputs, tensors only, the same in train and eval mode.

        Args:
            images: (B, 3, H, W) RGB in [0, 1]; the detector normalises them for itself.
        """

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """The `features` of what `forward` gives, without the head where a family can do without."""
        return self(images).features

    @abstractmethod
    def loss(self, output: DenseOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The detector's own training losses, one float32 scalar each.

        Args:
            output: what `forward` returned for the batch.
            targets: one dict an image: `boxes` (N, 4) xyxy in input pixels and `labels` (N,) int64; N may be 0.
                Where they are another detector's, also `scores` (N,) in [0, 1]: how sure of each it is, and how
                probable the student should hold it where its assigner puts it; a loss that does not read them counts
                each in full.
        """

    @abstractmethod
    def decode(self, output: DenseOutput, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        """Final detections.

        Args:
            output: what `forward` returned for the batch.
            image_sizes: (height, width) of the valid part of each input image, in pixels; boxes are clipped to it.
        """

    def candidates(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        """All predictions, before any is left out: boxes (B, N, 4) xyxy in pixels and scores (B, N, K) in [0, 1]. Boxes
        are (B, N, K, 4) where each class has its own.

        Tensors only and no shape that depends on values, so that it can be part of an exported graph.

        Raises:
            ValueError: this family has no such step.
        """
        raise ValueError(f"{type(self).__name__}: has no step between its outputs and its detections")

    @property
    def limits(self) -> Limits:
        """Which of its candidates are detections."""
        return Limits()

    def traced(self, output: DenseOutput, num_boxes: int | None = None) -> list[Tensor]:
        """All tensors that leave the network: what a dependency graph has to see, and what its cost is counted by.

        Args:
            output: what `forward` returned.
            num_boxes: of an image, for heads that run on boxes; as many as they usually get where None. The boxes are
                the same for all images.
        """
        return [level for levels in output for level in levels]

    def deployed(self) -> "Detector":
        """The detector as it is put to use: itself, or a copy in eval mode whose layers that only help training are
        merged into others. It predicts the same, and is neither trained, cut nor saved."""
        return self

    @property
    @abstractmethod
    def strides(self) -> tuple[float, ...]:
        """Input pixels per cell of each pyramid level, fine to coarse."""

    @property
    @abstractmethod
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of each pyramid level, read from the live weights, so that it is right after a cut."""

    @property
    @abstractmethod
    def output_layers(self) -> tuple[nn.Module, ...]:
        """The layers whose outputs mean something by position (class scores, box edges); no pruner may narrow them."""

    @property
    def class_layers(self) -> tuple[nn.Module, ...]:
        """Those of them whose outputs are something of each class; none where a family cannot be given others."""
        return ()

    @property
    def class_tensors(self) -> tuple[str, ...]:
        """Names of all tensors that go by classes."""
        layers = set(self.class_layers)
        names = [name for name, module in self.named_modules() if module in layers]
        return tuple(name for name in self.state_dict() if name.rpartition(".")[0] in names)

    @property
    @abstractmethod
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per RGB channel, for images in [0, 1], that this network expects."""


@torch.no_grad()
def replace_rows(
    layer: nn.Module,
    old: int,
    new: int,
    to: Sequence[int],
    of: Sequence[int],
    columns: int = 1,
    empty: float = IMPOSSIBLE,
) -> None:
    """Gives a layer whose outputs go prediction by prediction, in each class by class, other classes.

    Args:
        layer: a convolution or linear layer with a bias, of A*old*columns outputs; changed in place.
        old: classes that it has.
        new: classes that it gets.
        to: those of the new classes that are taken from the old ones; what the layer says of the others is `empty`.
        of: the old class of each of these.
        columns: outputs for each class.
        empty: what it says of a class that it does not know.
    """
    weight, bias = (x.unflatten(0, (-1, old, columns)) for x in (layer.weight, layer.bias))
    new_weight = weight.new_zeros(len(weight), new, *weight.shape[2:])
    new_bias = bias.new_full((len(bias), new, columns), empty)
    new_weight[:, to], new_bias[:, to] = weight[:, of], bias[:, of]
    layer.weight, layer.bias = nn.Parameter(new_weight.flatten(0, 2)), nn.Parameter(new_bias.flatten())
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(layer.bias))


@lru_cache(maxsize=16)
def channels_of(labels: tuple[int, ...], anchors: int, channels: int, device: torch.device) -> Tensor:
    """(1, A*K, 1, 1) bool, True at every channel of one of the labels."""
    with torch.inference_mode(False):  # a cached tensor made in inference mode could not be used in training
        mask = torch.zeros(anchors, channels // anchors, dtype=torch.bool)
        mask[:, list(labels)] = True
        return mask.view(1, -1, 1, 1).to(device)
