"""Teachers that have learnt other classes than the student: theirs are brought into the student's order, by name."""

import difflib
from collections.abc import Mapping, Sequence

from students import Detector


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


def _nearest(name: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, allowed, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
