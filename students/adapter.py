"""Any other network as a detector: a small class says what is its own, the rest follows; see docs/adapters.md."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from students.checkpoint import OtherClassesError, read_tensors, require_tensors
from students.detector import DenseOutput, Detections, Detector
from students.locations import flatten_levels, grid_locations, map_shapes, to_boxes
from students.nms import select


class DetectedOutput(NamedTuple):
    """What a network returns that teaches by its pyramid and its detections, without scores at every location.

    Attributes:
        features: pyramid maps, (B, C, H, W) each, fine to coarse.
        boxes: (B, N, 4) xyxy in pixels, of each set of predictions; most networks make one.
        scores: (B, N, K) in [0, 1], of each.
    """

    features: tuple[Tensor, ...]
    boxes: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


class Adapter(Detector):
    """A network that was written elsewhere, as a detector.

    To teach, a subclass has `forward`, `strides` and `feature_channels`. Its forward pass hands `prepare(images)` to
    the network, and returns a `DetectedOutput` or, of a dense head, a `DenseOutput`; then it says how many `anchors`
    there are, and `scores_locations = True`. To learn, it also says `learns = True`, and has `loss` and
    `output_layers`.

    Args:
        class_names: the classes, in label order.
        network: the network, with that many classes.
        weights: `none`, or the path of a .pt, .pth or .safetensors file with the network's own names.
        new_head: leave the class layers as they are, whatever the weights know.
        mean: what images in [0, 1] are normalised by, by RGB channel.
        std: likewise; 1/255 for a network that takes 0 to 255.
        bgr: whether the network takes blue first.
        unread: beginnings of the names of tensors that may be missing and are not read.

    Raises:
        ValueError: there are no classes, or the weights are of another network or other classes.
    """

    learns = False
    scores_locations = False

    def __init__(
        self,
        class_names: Sequence[str],
        network: nn.Module,
        weights: str = "none",
        new_head: bool = False,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        bgr: bool = False,
        unread: Sequence[str] = (),
    ):
        super().__init__()
        if not class_names:
            raise ValueError("class_names: the list of classes is empty; a detector needs at least one")
        self.class_names, self.network, self.bgr = list(class_names), network, bgr
        # buffers, not constants: a saved detector brings along what its weights were trained with
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        if weights != "none":
            self.notes = self._load(weights, new_head, tuple(unread))

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) RGB in [0, 1] as the network takes them."""
        normalised = (images - self.mean) / self.std
        return normalised.flip(1) if self.bgr else normalised

    def loss(self, output: NamedTuple, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        raise ValueError(f"{type(self).__name__}: has no loss, so it can only teach")

    def candidates(self, output: NamedTuple) -> tuple[Tensor, Tensor]:
        """See `Detector.candidates`."""
        if not self.anchors:
            return torch.cat(output.boxes, dim=1), torch.cat(output.scores, dim=1)
        return self.dense_boxes(output), flatten_levels(output.class_logits, self.anchors).float().sigmoid()

    def dense_boxes(self, output: DenseOutput) -> Tensor:
        """The boxes (B, N, 4) of a dense output, xyxy in pixels, float32; N as in `flatten_levels`."""
        shapes = map_shapes(output.class_logits)
        locations, strides = grid_locations(shapes, self.strides, output.class_logits[0].device)
        locations, strides = (x.repeat_interleave(self.anchors, dim=0) for x in (locations, strides))
        return to_boxes(flatten_levels(output.box_distances, self.anchors).float(), locations, strides)

    @property
    def decoded_fields(self) -> tuple[str, ...]:
        return ("class_logits", "box_distances") if self.anchors else ("boxes", "scores")

    @torch.no_grad()
    def decode(self, output: NamedTuple, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        """Class-wise NMS over the best candidates, by `limits`; see `Detector.decode`."""
        return select(*self.candidates(output), image_sizes, *self.limits)

    @property
    def title(self) -> str:
        return self.recipe["code"].rpartition(":")[2] if "code" in self.recipe else super().title

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """Nothing is compiled, unless a subclass says what can be."""
        return ()

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return self.class_layers

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())

    @torch.no_grad()
    def _load(self, source: str, new_head: bool, unread: tuple[str, ...]) -> list[str]:
        """Fills the network from a file, in both directions complete; what a user should be told."""
        tensors, names = read_tensors(Path(source))
        found = {name: tensor for name, tensor in tensors.items() if not name.startswith(unread)}
        wanted = {name: tensor for name, tensor in self.network.state_dict().items() if not name.startswith(unread)}
        of_classes = [name.removeprefix("network.") for name in self.class_tensors]
        arranged, notes = arrange_rows(self.class_names, wanted, found, of_classes, names, source, new_head)
        require_tensors(wanted, arranged, source)
        for name, tensor in wanted.items():
            if name in arranged:
                tensor.copy_(arranged[name])
        return notes


def arrange_rows(
    class_names: Sequence[str],
    wanted: dict[str, Tensor],
    found: dict[str, Tensor],
    of_classes: Sequence[str],
    names: Sequence[str],
    source: str,
    new_head: bool,
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors with the rows of its class layers for other classes, and what a user should be told.

    Args:
        class_names: the classes that are wanted.
        wanted: the network's tensors by name.
        found: the file's.
        of_classes: names of those that go by classes: (A*K, ...), anchor by anchor.
        names: the file's classes; empty where it does not tell.
        source: its path.
        new_head: take the network's own.

    Raises:
        OtherClassesError: just that, and `new_head` is not asked for.
    """
    both = [name for name in of_classes if name in found and found[name].shape[1:] == wanted[name].shape[1:]]
    if new_head:
        return found | {name: wanted[name] for name in both}, [f"its class layers start anew, all else is of {source}"]
    if not both:
        return found, []
    anchors = len(wanted[both[0]]) // len(class_names)
    number = len(found[both[0]]) // anchors
    if len(names) == number and set(class_names) <= set(names):
        labels = [names.index(name) for name in class_names]
        rows = {name: found[name].unflatten(0, (-1, number))[:, labels].flatten(0, 1) for name in both}
        return found | rows, []
    if number != len(class_names):
        raise OtherClassesError(source, number, names, class_names)
    return found, [f"its {number} classes are taken for those of {source} in their order"]


def build_adapted(
    class_names: Sequence[str],
    code: str,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    weights: str = "none",
    new_head: bool = False,
) -> Detector:
    """A detector of a class that is no part of this project.

    Args:
        class_names: the classes, in label order.
        code: where its class is, as `package.module:Class`; it is imported.
        arguments: of its own, beside the other three.
        weights: see `Adapter`.
        new_head: likewise.

    Raises:
        ValueError: it cannot be imported, is no detector, or refuses its arguments.
    """
    module, _, name = code.partition(":")
    if not (module and name):
        raise ValueError(f"code: found {code!r}; give package.module:Class, such as my_detectors:MyDetector")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"code: {code} cannot be imported ({error}); is its folder on PYTHONPATH?") from None
    if not (isinstance(kind, type) and issubclass(kind, Detector)):
        raise ValueError(f"code: {code} is no detector; it has to be a class below students.Adapter")
    try:
        return kind(class_names, **arguments, weights=weights, new_head=new_head)
    except TypeError as error:
        raise ValueError(f"arguments: {code} cannot be made with {dict(arguments)} ({error})") from None
