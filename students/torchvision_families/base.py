"""What all of torchvision's detectors share behind our contract."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from students.detector import Detections, Detector, replace_rows
from students.torchvision_families.weights import FirstWeights, told_classes


class TorchvisionDetector(Detector):
    """torchvision's own model, called part by part.

    Images are taken at the size they come in; torchvision would resize them first, and fill them up to multiples of 32.

    Args:
        class_names: the classes, in label order.
        model: one of `torchvision.models.detection`.
        first: the tensors it starts with.
        class_layers: beginnings of the names of its layers that know classes.
        unused: beginnings of the names of parts that checkpoints have and `model` has not.

    Raises:
        ValueError: tensors that do not fit.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        model: nn.Module,
        first: FirstWeights,
        class_layers: Sequence[str],
        unused: Sequence[str] = (),
    ):
        super().__init__()
        self.class_names = list(class_names)
        first.load_detector(model, class_layers, unused)
        self.model = model
        self.notes, self.only_backbone = first.notes, not first.detector
        self._of_classes = tuple(class_layers)
        # buffers, not constants: a saved detector brings along what its weights were trained with
        self.register_buffer("mean", torch.tensor(model.transform.image_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(model.transform.image_std).view(1, 3, 1, 1))
        self.register_buffer("class_channels", torch.tensor(first.class_channels))

    @classmethod
    def told_classes(cls, weights: str) -> list[str]:
        return told_classes(weights)

    @property
    @abstractmethod
    def head_classes(self) -> int:
        """Classes of the head, the background included."""

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.backbone((images - self.mean) / self.std).values())

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return (self.model.backbone,)  # what torchvision's heads do is called piece by piece

    @property
    def class_layers(self) -> tuple[nn.Module, ...]:
        names = {layer: f"{name}." for name, layer in self.model.named_modules()}
        return tuple(layer for layer in self.output_layers if names[layer].startswith(self._of_classes))

    def arrange_classes(self, class_names: Sequence[str], rows: Sequence[int | None]) -> None:
        """See `Detector.arrange_classes`. The head keeps all its classes, since in a softmax what one of them loses
        goes to the others; new ones are appended, and which of them are ours is written down anew."""
        old = self.head_classes
        appended = iter(range(old, old + len(rows)))
        channels = [next(appended) if row is None else int(self.class_channels[row]) for row in rows]
        new = old + rows.count(None)
        if new > old:
            self.widen_head(new)
        self.class_channels = self.class_channels.new_tensor(channels)
        self._enter_classes(class_names, rows, head_classes=new)

    def widen_head(self, classes: int) -> None:
        """Appends classes to the head that it never gives, up to a number of them."""
        old, to = self.head_classes, range(self.head_classes)
        for layer in self.class_layers:
            replace_rows(layer, old, classes, to, to)

    @property
    def class_tensors(self) -> tuple[str, ...]:
        return (*super().class_tensors, "class_channels")

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())

    def to_head_targets(self, targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Targets with the head's labels, on its device. Boxes without width or height, which torchvision refuses, and
        objects of score 0 are left out."""
        device, converted = self.class_channels.device, []
        for target in targets:
            boxes, labels = target["boxes"].to(device).float(), target["labels"].to(device)
            keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            scores = {}
            if "scores" in target:
                known = target["scores"].to(device).float()
                keep = keep & (known > 0)
                scores = {"scores": known[keep]}
            converted.append({"boxes": boxes[keep], "labels": self.class_channels[labels[keep]], **scores})
        return converted

    def to_labels(self, labels: Tensor) -> Tensor:
        """The head's labels as ours; K, one more than the last, stands for the background and what else is not ours."""
        number = len(self.class_channels)
        ours = self.class_channels.new_full((self.head_classes,), number)
        ours[self.class_channels] = torch.arange(number, device=ours.device)
        return ours[labels]

    def to_detections(self, found: list[dict[str, Tensor]]) -> list[Detections]:
        """torchvision's detections with our labels; classes of the head that are not ours are left out."""
        detections = []
        for image in found:
            ours = self.to_labels(image["labels"])
            keep = ours < len(self.class_channels)
            detections.append(Detections(image["boxes"][keep], image["scores"][keep], ours[keep]))
        return detections


def grid_anchors(generator: nn.Module, features: Sequence[Tensor], image_size: Sequence[int]) -> tuple[Tensor, ...]:
    """Anchor boxes of each level, (H*W*A, 4) xyxy in pixels, in float32 whatever the features are.

    Strides are those that torchvision has for the image filled up to multiples of 32.

    Args:
        generator: torchvision's `AnchorGenerator`.
        features: pyramid maps (B, C, H, W).
        image_size: height and width of the images, pixels.
    """
    filled = [-(-side // 32) * 32 for side in image_size]
    shapes = [level.shape[-2:] for level in features]
    # not by its own forward, which would round the anchors to the features' precision, for good
    generator.set_cell_anchors(torch.float32, features[0].device)
    strides = [[filled[0] // height, filled[1] // width] for height, width in shapes]
    return tuple(generator.grid_anchors(shapes, strides))
