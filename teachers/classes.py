"""Teachers that have learnt other classes than the student: theirs are brought into the student's order, by name."""

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from students import IMPOSSIBLE, DenseOutput, Detector


def speak(detector: Detector, class_names: Sequence[str], class_map: Mapping[str, str | None] | None = None) -> None:
    """Gives a detector another list of classes. It keeps what it knows of them; the rest it never detects.

    Its class layers are put into the new order. So everything that it says, from raw scores to detections,
    is in the new labels, and those that it cannot give stand in `Detector.unknown`.

    Args:
        detector: changed in place; left as it is where the classes are its own.
        class_names: the new classes, in label order.
        class_map: the new name of a class of its own, or None to leave that class out; others keep their name.

    Raises:
        ValueError: a name in the map that does not exist, two classes that become one, or a family whose class layers
            are not known.
    """
    own, class_map = detector.class_names, class_map or {}
    for name, target in class_map.items():
        if name not in own:
            raise ValueError(f"class_map: it has no class {name!r}{_nearest(name, own)}; it has {', '.join(own)}")
        if target is not None and target not in class_names:
            raise ValueError(
                f"class_map.{name}: {target!r} is not a class of the student{_nearest(target, class_names)}; "
                f"allowed are {', '.join(class_names)}, or null to leave that class out"
            )
    row_of: dict[str, int] = {}
    for row, name in enumerate(class_map.get(name, name) for name in own):
        if name in class_names and name in row_of:
            raise ValueError(
                f"class_map: both {own[row_of[name]]!r} and {own[row]!r} become {name!r}; scores of two classes cannot "
                "be made one, so map one of them to null"
            )
        row_of[name] = row
    rows = [row_of.get(name) for name in class_names]
    if rows == list(range(len(own))):
        detector.class_names = list(class_names)
        return
    try:
        detector.arrange_classes(class_names, rows)
    except ValueError as error:
        raise ValueError(f"class_map: {error}; its own are {', '.join(own)}") from None


def hide_classes(output: DenseOutput, labels: tuple[int, ...], anchors: int) -> DenseOutput:
    """A student's output whose scores of some classes are fixed at 0, so that a teacher who does not know them neither
    teaches them nor is missed there.

    Args:
        output: of a detector with the teacher's labels.
        labels: the classes to hide.
        anchors: predictions that the detector makes at each location.
    """
    if not labels or "class_logits" not in output._fields:  # a two-stage detector says nothing of classes at locations
        return output
    hidden = _channels(labels, anchors, output.class_logits[0].shape[1], output.class_logits[0].device)
    return output._replace(class_logits=tuple(x.masked_fill(hidden, IMPOSSIBLE) for x in output.class_logits))


@lru_cache(maxsize=16)
def _channels(labels: tuple[int, ...], anchors: int, channels: int, device: torch.device) -> Tensor:
    """(1, A*K, 1, 1) bool, True at every channel of one of the labels."""
    with torch.inference_mode(False):  # a cached tensor made in inference mode could not be used in training
        mask = torch.zeros(anchors, channels // anchors, dtype=torch.bool)
        mask[:, list(labels)] = True
        return mask.view(1, -1, 1, 1).to(device)


def _nearest(name: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, allowed, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
