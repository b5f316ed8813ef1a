"""Reads YOLO txt: one `class x_center y_center width height` a line, as fractions of the image's width and height."""

import math
import os
from pathlib import Path

import yaml

from distill.data.annotations import IMAGE_SUFFIXES, Annotations, collect_annotations, read_text
from distill.errors import UserError

NAME = "YOLO"
LAYOUT = "a .yaml with names and splits, images/ and labels/"

_NO_SPLITS = ("path", "names", "download")


def find_splits(root: Path) -> dict[str, Path]:
    """The yaml file that names each split under the root."""
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        content = _load(path)
        splits = [key for key, value in content.items() if key not in _NO_SPLITS and _as_paths(value)]
        if "names" in content and splits:
            return dict.fromkeys(splits, path)
    return {}


def read_split(root: Path, split: str, source: Path) -> Annotations:
    """Reads the label files that belong to the split's images; an image without one has no boxes.

    A split's value is a folder of images, a text file that lists images, or a list of these. The label file of an image
    has its name and lies in the folder `labels` where the image lies in `images`.

    Raises:
        UserError: a folder is missing, a line is malformed, or a class index has no name.
    """
    content = _load(source)
    class_names = _read_names(source, content["names"])
    images = _images_of(source, content, split)
    sources = [_label_file(image) for image in images]
    rows = [
        (position, label, box, False)
        for position, path in enumerate(sources)
        for label, box in _read_labels(path, class_names, source)
    ]
    return collect_annotations(
        rows,
        class_names=class_names,
        image_root=root,
        files=[os.path.relpath(image, root) for image in images],
        sources=sources,
        fractional=True,
    )


def list_images(root: Path, split: str, source: Path) -> tuple[Path, list[str]]:
    """The image root and the files of a split, whether or not it has annotations.

    Raises:
        UserError: a folder is missing.
    """
    return root, [os.path.relpath(image, root) for image in _images_of(source, _load(source), split)]


def _load(path: Path) -> dict:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise UserError(f"{path}: line {line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    return content if isinstance(content, dict) else {}


def _as_paths(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(item, str) and item for item in values) else []


def _read_names(source: Path, names: object) -> list[str]:
    if not names and isinstance(names, list | dict):
        raise UserError(f"{source}: names is empty; list the classes there")
    if isinstance(names, list):
        return [str(name) for name in names]
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        return [str(names[index]) for index in range(len(names))]
    raise UserError(f"{source}: names is {names!r}; a list, or a mapping from 0, 1, 2, ... to names, is needed")


def _images_of(source: Path, content: dict, split: str) -> list[Path]:
    return [image for entry in _as_paths(content[split]) for image in _list_images(source, content, split, entry)]


def _list_images(source: Path, content: dict, split: str, entry: str) -> list[Path]:
    """The images that one entry of a split stands for, and a stand-in for each label file that has lost its image."""
    base = source.parent / str(content.get("path") or ".")
    if not base.is_dir():
        base = source.parent  # written for another machine
    path = base / entry
    if not path.exists():
        path = base / entry.removeprefix("../")  # some exporters count from a folder below the yaml file
    if path.is_dir():
        images = sorted(image for image in path.rglob("*") if image.suffix.lower() in IMAGE_SUFFIXES)
        stems = {image.with_suffix("") for image in images}
        labels = _label_file(path / "x").parent
        lost = {path / label.relative_to(labels).with_suffix("") for label in labels.rglob("*.txt")} - stems
        return images + sorted(
            image for image in lost if image.name != "classes"
        )  # labelling tools leave a classes.txt
    if path.is_file():
        lines = [Path(line.strip()) for line in read_text(path).splitlines() if line.strip()]
        return [path.parent / line if (path.parent / line).exists() else base / line for line in lines]
    raise UserError(f"{source}: {split}: {base / entry} does not exist; a folder or a text file of images is needed")


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for position in reversed(range(len(parts) - 1)):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_labels(
    path: Path, class_names: list[str], source: Path
) -> list[tuple[int, tuple[float, float, float, float]]]:
    """(label, xyxy box in fractions) of every line of a label file; none where the file does not exist."""
    if not path.is_file():
        return []
    boxes = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, x, y, width, height = line.split()
            label, x, y, width, height = int(label), float(x), float(y), float(width), float(height)
            if not math.isfinite(x + y + width + height) or max(abs(x), abs(y), width, height) > 2:
                raise ValueError
        except ValueError as error:
            raise UserError(
                f"{path}: line {number}: found {line.strip()!r}; a class index and four fractions of the image's size "
                "(x center, y center, width, height) are needed"
            ) from error
        if not 0 <= label < len(class_names):
            raise UserError(
                f"{path}: line {number}: class index {label}, but {source} names {len(class_names)} classes "
                f"(0 to {len(class_names) - 1})"
            )
        boxes.append((label, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)))
    return boxes
