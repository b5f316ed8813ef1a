"""Where a torchvision detector's first tensors come from, and which classes of its head are ours."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from students.backbone import read_weights

# how load_state_dict words it; the shapes in brackets
SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\) from .*?torch\.Size\(\[(.*?)\]\)")
# torchvision's first checkpoints with frozen norms were trained without an epsilon, see its `overwrite_eps`
WITHOUT_EPSILON = ("fasterrcnn_resnet50_fpn_coco", "maskrcnn_resnet50_fpn_coco", "retinanet_resnet50_fpn_coco")


class FirstWeights:
    """First tensors for a detector that is yet to be built, and the head that they ask for.

    Label 0 of a head is the background, also where no logit is ever trained for it, so that torchvision's weights load.
    A head trained on COCO stays as wide as it is where `class_names` are among its classes.

    Args:
        weights: `none`; `imagenet`, the backbone's, or `coco`, the whole detector's, both from torchvision's hub; or
            the path of a .pth or .safetensors file with torchvision's names, of the detector or of the classifier that
            its backbone is taken from.
        coco: the detector's own weights; None where torchvision has none for these settings.
        imagenet: its backbone's.
        class_names: our classes, in label order.
        new_head: start the class layers anew, whatever the weights know.
        head_classes: the head's width, as settled when the detector was first built; None then.

    Attributes:
        head_classes: classes of the head, the background included.
        class_channels: the head's label of each of our classes.
        trained: whether there are any first tensors.
        notes: what a user should be told.

    Raises:
        ValueError: weights that cannot be had, or that know other classes.
    """

    def __init__(
        self,
        weights: str,
        coco: WeightsEnum | None,
        imagenet: WeightsEnum,
        class_names: Sequence[str],
        new_head: bool = False,
        head_classes: int | None = None,
    ):
        if not class_names:
            raise ValueError("class_names: the list of classes is empty; a detector needs at least one")
        self.source, self.new_head = weights, new_head
        self.detector: dict[str, Tensor] = {}
        self.classifier: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self.head_classes = head_classes or len(class_names) + 1
        self.class_channels = list(range(1, len(class_names) + 1))
        self.trained = weights != "none"
        if weights == "coco" and coco is None:
            raise ValueError(
                "weights: torchvision has coco weights for its own backbones and widths only; leave those settings out"
            )
        # files keep the name they have in the hub
        from_coco = weights == "coco" or (coco is not None and Path(weights).name == PurePosixPath(coco.url).name)
        if weights == "coco":
            self.detector = fetch(coco)
        elif weights == "imagenet":
            self.classifier = fetch(imagenet)
        elif self.trained:
            state = read_weights(Path(weights))
            if any(name.startswith("backbone.") for name in state):
                self.detector = state
            else:
                self.classifier = state
        self.lacks_epsilon = from_coco and any(name in coco.url for name in WITHOUT_EPSILON)
        if from_coco and not new_head:
            categories = coco.meta["categories"]
            unknown = [name for name in class_names if name not in categories[1:]]
            if unknown:
                raise ValueError(
                    f"weights: {weights} knows no class {unknown[0]!r}, its own are {', '.join(categories[1:4])}, ...; "
                    "say new_head: true to start the class layers anew"
                )
            self.head_classes = len(categories)
            self.class_channels = [categories.index(name) for name in class_names]
        if self.detector and new_head:
            self.notes.append(f"its class layers start anew, all else comes from {weights}")

    def load_backbone(self, body: nn.Module, prefix: str = "") -> None:
        """Fills a backbone from the classifier it was taken from; no-op where there is none.

        Args:
            body: named like the classifier, but for its last layers.
            prefix: of its part in the classifier, such as `features.`.

        Raises:
            ValueError: tensors of the backbone are missing, or have other shapes.
        """
        if self.classifier:
            below = {name.removeprefix(prefix): x for name, x in self.classifier.items() if name.startswith(prefix)}
            own = body.state_dict()
            fill(body, {name: x for name, x in below.items() if name in own}, self.source)

    def load_detector(self, model: nn.Module, class_layers: Sequence[str], unused: Sequence[str] = ()) -> None:
        """Fills a whole detector; no-op where there are no such tensors.

        Args:
            model: torchvision's own.
            class_layers: beginnings of the names of the layers that know classes.
            unused: beginnings of the names of parts that the model has not.

        Raises:
            ValueError: names or shapes that do not fit; the first of them are shown.
        """
        if not self.detector:
            return
        left_out = (*unused, *(class_layers if self.new_head else ()))
        state = {name: x for name, x in self.detector.items() if not name.startswith(tuple(left_out))}
        kept = {
            name: x for name, x in model.state_dict().items() if self.new_head and name.startswith(tuple(class_layers))
        }
        fill(model, state | kept, self.source, class_layers)
        if self.lacks_epsilon:
            for norm in model.backbone.modules():
                if hasattr(norm, "running_var"):
                    norm.running_var -= norm.eps  # so that the variance that is divided by is the checkpoint's own


def fetch(weights: WeightsEnum) -> dict[str, Tensor]:
    """A checkpoint from torchvision's hub, or from where it was kept the last time."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no such file, or another hash
        raise ValueError(
            f"weights: {weights} cannot be fetched ({type(error).__name__}); download {weights.url} elsewhere and give "
            "the path of the file, or say weights: none"
        ) from None


def fill(module: nn.Module, state: dict[str, Tensor], source: str, class_layers: Sequence[str] = ()) -> None:
    """`load_state_dict`, with a one-line reason where it fails. Counters of batch norms may be missing.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    with torch.no_grad():
        try:
            missing, unexpected = module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            found = SIZE_MISMATCH.findall(str(error))
            shown = "; ".join(f"{name} is ({theirs}), here ({ours})" for name, theirs, ours in found[:2])
            only_classes = class_layers and all(name.startswith(tuple(class_layers)) for name, *_ in found)
            way_out = (
                "new_head: true, to start the class layers anew" if only_classes else "the settings it was made with"
            )
            raise ValueError(
                f"weights: {source} has {len(found)} tensors of other shapes: {shown}; give {way_out}"
            ) from None
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(
            f"weights: {source} does not fit: it lacks {len(missing)} tensors{_first(missing)} and has "
            f"{len(unexpected)} unknown ones{_first(unexpected)}; it needs torchvision's names for this detector"
        )


def _first(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else ""
