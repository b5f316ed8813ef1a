"""Reads COCO json: boxes are (x, y, width, height) in pixels, top left corner at 0."""

import json
import math
from pathlib import Path

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


def read_split(root: Path, split: str, source: Path) -> Annotations:
    """Reads one json file; classes are in the order of their category ids, `iscrowd` boxes are ignored.

    Raises:
        UserError: the file is not valid json, or an entry lacks a key or points to an entry that does not exist.
    """
    content = _load(source)
    if not content["categories"] and content["annotations"]:
        raise UserError(f"{source}: 'categories' is empty; list the classes there, each with 'id' and 'name'")
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        class_names = list(dict.fromkeys(str(category["name"]) for category in categories))
        label_of_id = {category["id"]: class_names.index(str(category["name"])) for category in categories}
    except (KeyError, TypeError) as error:
        raise UserError(f"{source}: an entry of 'categories' needs 'id' and 'name' ({error})") from error

    files, image_of_id = _read_files(content, source), {}
    for position, image in enumerate(content["images"]):
        if type(image.get("id")) is not int:
            raise UserError(f"{source}: images[{position}].id is {image.get('id')!r}; a whole number is needed")
        if image["id"] in image_of_id:
            raise UserError(f"{source}: images[{position}].id {image['id']} occurs twice; ids must be unique")
        image_of_id[image["id"]] = position

    rows = [
        _read_box(annotation, image_of_id, label_of_id, f"{source}: annotations[{position}]")
        for position, annotation in enumerate(content["annotations"])
    ]
    return collect_annotations(
        rows,
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
    files = _read_files(_load(source, needed=("images",)), source)
    return _find_images(root, split, source, files), files


def _read_files(content: dict, source: Path) -> list[str]:
    for position, image in enumerate(content["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            raise UserError(f"{source}: images[{position}] has no 'file_name'")
    return [image["file_name"] for image in content["images"]]


def _load(source: Path, needed: tuple[str, ...] = ("images", "annotations", "categories")) -> dict:
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: line {error.lineno}: not valid JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as JSON ({error})") from error
    for key in needed:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{source}: no list '{key}'; a COCO file has images, annotations and categories")
    return content


def _read_box(
    annotation: object, image_of_id: dict[int, int], label_of_id: dict[int, int], place: str
) -> tuple[int, int, tuple[float, float, float, float], bool]:
    """(image, label, xyxy box, crowd) of one entry of 'annotations'."""
    try:
        image, label = image_of_id[annotation["image_id"]], label_of_id[annotation["category_id"]]
        x, y, width, height = (float(value) for value in annotation["bbox"])
        if not math.isfinite(x + y + width + height):
            raise ValueError
        return image, label, (x, y, x + width, y + height), bool(annotation.get("iscrowd", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: {_explain(annotation, image_of_id, label_of_id)}") from error


def _explain(annotation: object, image_of_id: dict, label_of_id: dict) -> str:
    if not isinstance(annotation, dict):
        return f"is {annotation!r}; an object is needed"
    for key, known, kind in (("image_id", image_of_id, "images"), ("category_id", label_of_id, "categories")):
        if key not in annotation:
            return f"has no '{key}'"
        if type(annotation[key]) is not int or annotation[key] not in known:
            return f"{key} {annotation[key]!r} is not among the ids of '{kind}'"
    return f"bbox is {annotation.get('bbox')!r}; four finite numbers (x, y, width, height) are needed"


def _find_images(root: Path, split: str, source: Path, files: list[str]) -> Path:
    """The folder that holds most of the first few images; the likeliest where none holds any."""
    folders = [root / "images" / split, root / split / "images", root / split, root / "images", root, source.parent]
    probe = files[:_PROBED_IMAGES]
    return max(folders, key=lambda folder: sum((folder / file).is_file() for file in probe))
