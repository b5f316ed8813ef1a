"""Published tensors in our networks: which goes where, complete in both directions or not at all."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from students.checkpoint import OtherClassesError, describe_shape, read_tensors, require_tensors
from students.yolo.blocks import C3, SPPCSPC, SPPF, Conv, RepConv
from students.yolo.head import STRIDES, AnchorHead

if TYPE_CHECKING:
    from students.yolo.detector import YOLODetector

_BLOCKS = (Conv, C3, SPPF, SPPCSPC, RepConv)
_NUMBERED = re.compile(r"(?:model\.)+(\d+)\.(.+)")  # a network's layers are numbered; some files nest it once more


def require_multiples(class_names: Sequence[str], width: float, depth: float) -> None:
    """Refuses what no YOLO network can be built with.

    Raises:
        ValueError: no classes, or a multiple that is not above 0.
    """
    if not class_names:
        raise ValueError("class_names: the list of classes is empty; a detector needs at least one")
    for name, value in (("width", width), ("depth", depth)):
        if value <= 0:
            raise ValueError(f"{name}: {value:g} is no multiple of a network's {name}; give a number above 0")


def load_weights(detector: "YOLODetector", source: str, new_head: bool) -> list[str]:
    """Fills a new detector from a file with the layers of a published network, numbered and named as there.

    The classes may be others if the file tells its own and all of the detector's are among them.

    Args:
        detector: changed in place.
        source: `none`, or the path of a .pt, .pth or .safetensors file.
        new_head: leave the class layers as they are.

    Returns:
        What a user should be told.

    Raises:
        ValueError: the file cannot be read, or a tensor of it or of the detector has no counterpart; the first of them
            are shown.
    """
    if source == "none":
        return []
    tensors, names = read_tensors(Path(source))
    layers: dict[int, dict[str, Tensor]] = {}
    strays = {}
    for key, tensor in tensors.items():
        if found := _NUMBERED.fullmatch(key):
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            strays[key] = tensor
    if not layers:
        raise ValueError(
            f"weights: {source} has no numbered layers, such as model.0.conv.weight, but {_some(list(tensors))}; "
            "give a published file of this network"
        )
    numbers, blocks = sorted(layers), list(published_blocks(detector))
    wanted, found = {}, {}
    for number, block in zip(numbers, blocks):
        wanted |= {f"model.{number}.{key}": tensor for key, tensor in block.state_dict().items()}
    for number in numbers[: len(numbers) - 1]:
        found |= {f"model.{number}.{key}": tensor for key, tensor in layers[number].items()}
    last = numbers[-1]
    rows, problems = read_head_layers(layers[last], f"model.{last}.", detector.head)
    require_tensors(wanted, found | strays, source, problems, (len(blocks) + 1, len(numbers)))
    for name, tensor in wanted.items():
        if name in found:
            tensor.copy_(found[name])
    return fill_head(detector, rows, names, source, new_head)


def published_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks that are numbered in published files, in their order, which is that of their definition here."""
    for child in module.children():
        if isinstance(child, _BLOCKS):
            yield child
        else:
            yield from published_blocks(child)


def read_head_layers(layer: dict[str, Tensor], prefix: str, head: AnchorHead) -> tuple[dict[str, Tensor], list[str]]:
    """A published detection layer in the order of `AnchorHead`, and what does not fit.

    What YOLOv7 learns beside it, to be added to what comes in (`ia`) and to be multiplied with what goes out (`im`), is
    folded into the layers, as it is for deployment (implicit knowledge, YOLOR, arXiv 2105.04206).

    Returns:
        `anchor_sizes` (levels, A, 2) in pixels; `weight.LEVEL` (A, 5 + K, C, 1, 1) and `bias.LEVEL` (A, 5 + K), rows
        of a box, its objectness and the classes.
    """
    rows, problems, used = {}, [], set()
    anchors = head.anchor_sizes.shape[1]
    known = {"anchors", "anchor_grid"}  # the second are the same in pixels
    sizes = layer.get("anchors")
    if sizes is None:
        problems.append(f"it lacks {prefix}anchors {describe_shape(head.anchor_sizes)}")
    elif sizes.shape != head.anchor_sizes.shape:
        problems.append(f"{prefix}anchors is {describe_shape(sizes)}, here {describe_shape(head.anchor_sizes)}")
    else:
        rows["anchor_sizes"] = sizes * sizes.new_tensor(STRIDES)[:, None, None]
    for level, boxes in enumerate(head.boxes):
        names = {name: f"{name}.{level}" for name in ("ia", "im")}
        used |= {f"m.{level}.weight", f"m.{level}.bias", *(f"{name}.implicit" for name in names.values())}
        weight, bias, columns = layer.get(f"m.{level}.weight"), layer.get(f"m.{level}.bias"), boxes.in_channels
        wanted = f"({anchors} * (5 + classes), {columns}, 1, 1)"
        if weight is None or bias is None:
            problems.append(f"it lacks {prefix}m.{level}.weight {wanted} or its bias")
            continue
        if weight.shape[1:] != (columns, 1, 1) or len(weight) % anchors or len(weight) <= 5 * anchors:
            problems.append(f"{prefix}m.{level}.weight is {describe_shape(weight)}, here {wanted}")
            continue
        added, factor = (layer.get(f"{name}.implicit") for name in names.values())
        if added is not None:
            bias = bias + (weight[..., 0, 0] * added.view(1, -1)).sum(dim=1)
        if factor is not None:
            weight, bias = weight * factor.view(-1, 1, 1, 1), bias * factor.view(-1)
        rows[f"weight.{level}"], rows[f"bias.{level}"] = (x.unflatten(0, (anchors, -1)) for x in (weight, bias))
    unknown = ((key, x) for key, x in layer.items() if key not in known | used)
    problems += [f"it has {prefix}{key} {describe_shape(x)}, which is not here" for key, x in unknown]
    return rows, problems


@torch.no_grad()
def fill_head(
    detector: "YOLODetector", rows: dict[str, Tensor], names: Sequence[str], source: str, new_head: bool
) -> list[str]:
    """Puts a published detection layer in place; the classes by name where the file tells them, else in its order.

    Args:
        detector: changed in place.
        rows: see `read_head_layers`.
        names: the file's classes; empty where it does not tell.
        source: its path.
        new_head: leave the class layers as they are.

    Returns:
        What a user should be told.

    Raises:
        OtherClassesError: just that, and `new_head` is not asked for.
    """
    head, own = detector.head, detector.class_names
    number = rows["weight.0"].shape[1] - 5
    names = names if len(names) == number else ()
    if all(name in names for name in own):
        labels = [names.index(name) for name in own]
    else:
        labels = list(range(number))
        if number != len(own) and not new_head:
            raise OtherClassesError(source, number, names, own)
    if "anchor_sizes" in rows:
        head.anchor_sizes.copy_(rows["anchor_sizes"])
    for level in range(len(head.boxes)):
        for leaf in ("weight", "bias"):
            published = rows[f"{leaf}.{level}"]
            getattr(head.boxes[level], leaf).copy_(published[:, :4].flatten(0, 1))
            getattr(head.objectness[level], leaf).copy_(published[:, 4])
            if not new_head:
                getattr(head.class_logits[level], leaf).copy_(published[:, 5:][:, labels].flatten(0, 1))
    if new_head:
        return [f"its class layers start anew, all else comes from {source}"]
    if names and not all(name in names for name in own):
        return [f"its {number} classes are taken for those of {source} in their order, {_some(names)}"]
    return []


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
