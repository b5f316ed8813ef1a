"""Reads COCO json: boxes are (x, y, width, height) in pixels, top left corner at 0."""

import json
import math
from pathlib import Path
from typing import TypeVar

import msgspec

from distill.data.annotations import Annotations, collect_annotations
from distill.errors import UserError

NAME = "COCO"
LAYOUT = "annotations/<split>.json, annotations/instances_<split>.json or <split>/_annotations.coco.json"

_OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")
_PROBED_IMAGES = 20


def find_splits(root: Path) -> dict[str, Path]:
    """The json file of each split under the root."""
    splits = {}
    for path in sorted(root.glob("annotations/*.json")):
        if not path.name.startswith(_OTHER_TASKS):
            splits[path.stem.removeprefix("instances_")] = path
    for path in sorted(root.glob("*/_annotations.coco.json")):
        splits.setdefault(path.parent.name, path)
    return splits


class _Image(msgspec.Struct):
    id: int
    file_name: str


class _Category(msgspec.Struct):
    id: int | str
    name: str | int | float


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int | str
    bbox: tuple[float, float, float, float]
    iscrowd: int | bool = 0


class _Content(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


class _Listed(msgspec.Struct):
    file_name: str


class _Unlabelled(msgspec.Struct):
    images: list[_Listed]


def read_split(root: Path, split: str, source: Path) -> Annotations:
    """Reads one json file; classes are in the order of their category ids, `iscrowd` boxes are ignored.

    Raises:
        UserError: the file is not valid json, or an entry lacks a key or points to an entry that does not exist.
    """
    content = _load(source, _Content)
    if not content.categories and content.annotations:
        raise UserError(f"{source}: 'categories' is empty; list the classes there, each with 'id' and 'name'")
    categories = sorted(content.categories, key=lambda category: (isinstance(category.id, str), category.id))
    class_names = list(dict.fromkeys(str(category.name) for category in categories))
    label_of_id = {category.id: class_names.index(str(category.name)) for category in categories}

    image_of_id: dict[int, int] = {}
    for position, image in enumerate(content.images):
        if image_of_id.setdefault(image.id, position) != position:
            raise UserError(f"{source}: images[{position}].id {image.id} occurs twice; ids must be unique")

    files = [image.file_name for image in content.images]
    return collect_annotations(
        (
            _read_box(annotation, image_of_id, label_of_id, source, position)
            for position, annotation in enumerate(content.annotations)
        ),
        class_names=class_names,
        image_root=_find_images(root, split, source, files),
        files=files,
        sources=[source] * len(files),
        image_ids=image_of_id,
    )


def list_images(root: Path, split: str, source: Path) -> tuple[Path, list[str]]:
    """The image root and the files of a split, whether or not it has annotations.

    Raises:
        UserError: the file is not valid json, or an entry of 'images' lacks its file.
    """
    files = [image.file_name for image in _load(source, _Unlabelled).images]
    return _find_images(root, split, source, files), files


T = TypeVar("T", _Content, _Unlabelled)


def _load(source: Path, kind: type[T]) -> T:
    """What is needed of a file; the rest, such as outlines, which would fill gigabytes, never becomes an object."""
    try:
        text = source.read_bytes()
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # Python's own reader names the line, and takes the NaN that some tools write
            return msgspec.convert(json.loads(text), type=kind)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: line {error.lineno}: not valid JSON: {error.msg}") from error
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).replace("`", "'").replace("Object missing", "lacks the").partition(" - at '$")
        place = place.strip(".'") + ": " if place else ""
        needed = "a COCO file has the lists images, annotations and categories"
        raise UserError(
            f"{source}: {place}{wrong[0].lower()}{wrong[1:]}{'' if '[' in place else f'; {needed}'}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as JSON ({error})") from error


def _read_box(
    annotation: _Annotation, image_of_id: dict[int, int], label_of_id: dict[int | str, int], source: Path, position: int
) -> tuple[int, int, tuple[float, float, float, float], bool]:
    """(image, label, xyxy box, crowd) of one entry of 'annotations'."""
    image, label = image_of_id.get(annotation.image_id), label_of_id.get(annotation.category_id)
    x, y, width, height = annotation.bbox
    if image is None:
        wrong = f"image_id {annotation.image_id!r} is not among the ids of 'images'"
    elif label is None:
        wrong = f"category_id {annotation.category_id!r} is not among the ids of 'categories'"
    elif not math.isfinite(x + y + width + height):
        wrong = f"bbox is {list(annotation.bbox)}; four finite numbers (x, y, width, height) are needed"
    else:
        return image, label, (x, y, x + width, y + height), bool(annotation.iscrowd)
    raise UserError(f"{source}: annotations[{position}]: {wrong}")


def _find_images(root: Path, split: str, source: Path, files: list[str]) -> Path:
    """The folder that holds most of the first few images; the likeliest where none holds any."""
    folders = [root / "images" / split, root / split / "images", root / split, root / "images", root, source.parent]
    probe = files[:_PROBED_IMAGES]
    return max(folders, key=lambda folder: sum((folder / file).is_file() for file in probe))
