"""Reads Pascal VOC xml.

Pixels count from 1 and both corners belong to the box, as in the VOC development kit: (1, 1, 640, 480) is the whole of
a 640x480 image and becomes (0, 0, 640, 480). Corners that coincide are a slip of the annotator's hand: no area.
"""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

from distill.data.annotations import IMAGE_SUFFIXES, Annotations, collect_annotations, read_text
from distill.errors import UserError

NAME = "VOC"
LAYOUT = "JPEGImages/, Annotations/ and ImageSets/Main/<split>.txt"


def find_splits(root: Path) -> dict[str, Path]:
    """The list of image names of each split under the root."""
    lists = {path.stem: path for path in sorted(root.glob("ImageSets/Main/*.txt"))}
    # VOC keeps one more list for each class and split, such as cat_train.txt.
    return {split: path for split, path in lists.items() if split.rpartition("_")[2] not in lists or "_" not in split}


def read_split(root: Path, split: str, source: Path) -> Annotations:
    """Reads the xml files that the split's list names; `difficult` boxes are ignored.

    VOC lists its classes nowhere, so they are gathered from all xml files, whatever their split, and sorted.

    Raises:
        UserError: an xml file is missing, malformed or lacks a field.
    """
    names = _read_names(source)
    folder = root / "Annotations"
    missing = next((name for name in names if not (folder / f"{name}.xml").is_file()), None)
    if missing is not None:
        raise UserError(
            f"{source}: names {missing!r}, but {folder / missing}.xml does not exist; "
            "an image without objects needs an xml file without <object>"
        )
    objects = {path.stem: _read_objects(path) for path in sorted(folder.glob("*.xml"))}
    class_names = sorted({name for found in objects.values() for name, _, _ in found})
    label_of = {name: label for label, name in enumerate(class_names)}

    images, files = list_images(root, split, source)
    return collect_annotations(
        (
            (image, label_of[label], box, difficult)
            for image, name in enumerate(names)
            for label, box, difficult in objects[name]
        ),
        class_names=class_names,
        image_root=images,
        files=files,
        sources=[folder / f"{name}.xml" for name in names],
    )


def list_images(root: Path, split: str, source: Path) -> tuple[Path, list[str]]:
    """The image root and the files of a split, whether or not it has annotations."""
    images = root / "JPEGImages"
    found = sorted(images.iterdir()) if images.is_dir() else []
    file_of = {path.stem: path.name for path in found if path.suffix.lower() in IMAGE_SUFFIXES}
    return images, [file_of.get(name, f"{name}.jpg") for name in _read_names(source)]


def _read_names(source: Path) -> list[str]:
    """The names that a split's list has, one a line."""
    return [line.strip() for line in read_text(source).splitlines() if line.strip()]


def _read_objects(path: Path) -> list[tuple[str, tuple[float, float, float, float], bool]]:
    """(class name, xyxy box, difficult) of every object in a file."""
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise UserError(f"{path}: line {error.position[0]}: not valid XML: {error}") from error
    objects = []
    for number, element in enumerate(root.iter("object"), 1):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{path}: object {number} has no <name>")
        texts = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = (float(text) for text in texts)
            if not math.isfinite(left + top + right + bottom):
                raise ValueError
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: object {number} ({name}): bndbox is {texts}; the numbers xmin, ymin, xmax, ymax are needed"
            ) from error
        if right > left and bottom > top:
            left, top = left - 1, top - 1
        difficult = (element.findtext("difficult") or "0").strip() == "1"
        objects.append((name, (left, top, right, bottom), difficult))
    return objects
