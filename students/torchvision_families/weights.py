"""Where a torchvision detector's first tensors come from, and which classes of its head are ours."""

from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from students.checkpoint import OtherClassesError, read_tensors, require_tensors

# torchvision's first checkpoints with frozen norms were trained without an epsilon, see its `overwrite_eps`
WITHOUT_EPSILON = ("fasterrcnn_resnet50_fpn_coco", "maskrcnn_resnet50_fpn_coco", "retinanet_resnet50_fpn_coco")


class FirstWeights:
    """First tensors for a detector that is yet to be built, and the head that they ask for.

    Label 0 of a head is the background, also where no logit is ever trained for it, so that torchvision's weights load.
    A head trained on COCO stays as wide as it is where `class_names` are among its classes.

    Args:
        weights: `none`; `imagenet`, the backbone's, or `coco`, the whole detector's, both from torchvision's hub; or
            the path of a .pth or .safetensors file with torchvision's names, of the detector or of the classifier that
            its backbone is taken from. Classes go by name where the weights tell theirs, else in their order.
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
        self.source, self.new_head, self.class_names = weights, new_head, class_names
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
        names: list[str] = []  # of the classes that it knows
        # files keep the name they have in the hub
        from_coco = weights == "coco" or (coco is not None and Path(weights).name == PurePosixPath(coco.url).name)
        if weights == "coco":
            self.detector = fetch(coco)
        elif weights == "imagenet":
            self.classifier = fetch(imagenet)
        elif self.trained:
            state, names = read_tensors(Path(weights))
            if any(name.startswith("backbone.") for name in state):
                self.detector = state
            else:
                self.classifier = state
        self.lacks_epsilon = from_coco and any(name in coco.url for name in WITHOUT_EPSILON)
        if from_coco:
            names = coco.meta["categories"][1:]
        self.names = names if self.detector else []
        if self.names and not new_head:
            unknown = [name for name in class_names if name not in names]
            if unknown:
                raise ValueError(
                    f"weights: {weights} knows no class {unknown[0]!r}, its own are {', '.join(names[:3])}, ...; "
                    "say new_head: true to start the class layers anew"
                )
            self.head_classes = len(names) + 1
            self.class_channels = [names.index(name) + 1 for name in class_names]
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
            fill(body, below, self.source, beyond=True)

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
        own = model.state_dict()
        of_classes = {name: x for name, x in own.items() if name.startswith(tuple(class_layers))}
        if self.new_head:
            state |= of_classes
        else:
            self._require_classes(state, own, of_classes)
        fill(model, state, self.source)
        if self.lacks_epsilon:
            for norm in model.backbone.modules():
                if hasattr(norm, "running_var"):
                    norm.running_var -= norm.eps  # so that the variance that is divided by is the checkpoint's own

    def _require_classes(self, state: dict[str, Tensor], own: dict[str, Tensor], of_classes: Collection[str]) -> None:
        """Raises an `OtherClassesError` where a file is of this detector, but for the number of classes."""
        unlike = [name for name, x in own.items() if name in state and state[name].shape != x.shape]
        if unlike and set(unlike) <= set(of_classes):
            found, wanted = state[unlike[0]], own[unlike[0]]
            number, rest = divmod(len(found) * self.head_classes, len(wanted))
            if found.shape[1:] == wanted.shape[1:] and not rest:
                raise OtherClassesError(self.source, number - 1, self.names, self.class_names)


def fetch(weights: WeightsEnum) -> dict[str, Tensor]:
    """A checkpoint from torchvision's hub, or from where it was kept the last time."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no such file, or another hash
        raise ValueError(
            f"weights: {weights} cannot be fetched ({type(error).__name__}); download {weights.url} elsewhere and give "
            "the path of the file, or say weights: none"
        ) from None


def told_classes(weights: str) -> list[str]:
    """The classes that a whole detector's weights are known to be of, in label order; empty where nothing tells.

    Args:
        weights: see `FirstWeights`.

    Raises:
        ValueError: a file that cannot be read.
    """
    if weights in ("none", "imagenet"):
        return []
    if weights == "coco" or Path(weights).name in _hub_names():
        categories = models.detection.FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
        return [name for name in categories[1:] if name != "N/A"]
    return read_tensors(Path(weights))[1]


def _hub_names() -> set[str]:
    """Of the files of torchvision's detectors."""
    weights = (models.get_model_weights(name)["COCO_V1"] for name in models.list_models(module=models.detection))
    return {PurePosixPath(each.url).name for each in weights if len(each.meta["categories"]) > 2}


def fill(module: nn.Module, state: dict[str, Tensor], source: str, beyond: bool = False) -> None:
    """`load_state_dict`, with a one-line reason where it fails; see `require_tensors`.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    way_out = "give the settings it was made with, and a file with torchvision's names"
    own = module.state_dict()
    require_tensors(own, state, source, beyond=beyond, way_out=way_out)
    module.load_state_dict({name: x for name, x in state.items() if name in own}, strict=False)
