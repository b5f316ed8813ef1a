"""A data set as one table: which images, which boxes; the same whatever format it was written in."""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from distill.data import coco, voc, yolo
from distill.data.annotations import IMAGE_SUFFIXES, Annotations, collect_annotations
from distill.data.images import UnreadableImageError, read_size
from distill.errors import UserError

FORMATS = (coco, voc, yolo)

_OVERHANG = 1.0  # pixels; tools round, and a box that reaches less far beyond the image's edge is not worth a note
_DROPPED, _UNKNOWN = -1, -2


@dataclass(frozen=True)
class IndexNotes:
    """Blemishes that were mended while a data set was opened.

    Attributes:
        zero_area: boxes without area that were dropped, counted by image file.
        clipped: boxes that reached more than a pixel beyond the image and were clipped, counted by image file.
        skipped: images that were left out, with the reason, by image file.
    """

    zero_area: dict[str, int] = field(default_factory=dict)
    clipped: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """One line for each kind of blemish that was found."""
        lines = []
        for noun, found in (("boxes without area dropped", self.zero_area), ("boxes clipped", self.clipped)):
            if found:
                counts = [f"{file}: {count}" for file, count in found.items()]
                lines.append(f"{sum(found.values())} {noun} ({_shorten(counts, limit=10)})")
        if self.skipped:
            lines.append(f"{len(self.skipped)} images skipped ({_shorten(self.skipped)})")
        return lines


@dataclass(frozen=True, eq=False)
class DetectionIndex:
    """Images and boxes of one split, in a handful of arrays that forked workers share.

    Attributes:
        class_names: what the labels stand for.
        image_root: folder that `files` are relative to.
        files: (N,) paths in the file system's encoding, fixed width.
        image_ids: (N,) int64.
        sizes: (N, 2) int32, (height, width) of the upright image in pixels.
        boxes: (M, 4) float32 xyxy in pixels of the upright image, inside it and with area.
        labels: (M,) int64 into `class_names`.
        ignored: (M,) bool; left out of training targets, neither hit nor miss in evaluation (crowd, difficult).
        offsets: (N + 1,) int64; boxes of image i are `offsets[i]:offsets[i + 1]`.
        notes: what was mended.
        format: COCO, VOC or YOLO; or 'folder'.
        split: name of the split; of a folder, its own.
        labelled: False where nobody has looked for objects; then there are no boxes, and that means nothing.
    """

    class_names: tuple[str, ...]
    image_root: Path
    files: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    offsets: np.ndarray
    notes: IndexNotes
    format: str
    split: str
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.files)

    def file(self, position: int) -> str:
        """An image's file, relative to `image_root`."""
        return os.fsdecode(self.files[position])

    def path(self, position: int) -> Path:
        """An image's file."""
        return self.image_root / self.file(position)

    def boxes_of(self, position: int) -> np.ndarray:
        """An image's boxes, (n, 4) float32 xyxy pixels, with the ignored ones."""
        return self.boxes[self.offsets[position] : self.offsets[position + 1]]

    def labels_of(self, position: int) -> np.ndarray:
        """The labels of an image's boxes, (n,) int64, with the ignored ones."""
        return self.labels[self.offsets[position] : self.offsets[position + 1]]

    def ignored_of(self, position: int) -> np.ndarray:
        """Which of an image's boxes are ignored, (n,) bool."""
        return self.ignored[self.offsets[position] : self.offsets[position + 1]]

    def to_coco(self) -> dict:
        """The index in COCO's json form, for pycocotools.

        Category ids are the labels, from 0; annotation ids count from 1, as pycocotools takes 0 for 'no match'.
        """
        image_ids = np.repeat(self.image_ids, np.diff(self.offsets)).tolist()
        corners = self.boxes.astype(np.float64)
        extents = corners[:, 2:] - corners[:, :2]
        boxes = np.concatenate([corners[:, :2], extents], axis=1).tolist()
        columns = zip(image_ids, self.labels.tolist(), boxes, extents.prod(axis=1).tolist(), self.ignored.tolist())
        return {
            "info": {"description": f"{self.image_root} ({self.format}, {self.split})"},
            "images": [
                {"id": image_id, "file_name": self.file(position), "height": height, "width": width}
                for position, (image_id, (height, width)) in enumerate(
                    zip(self.image_ids.tolist(), self.sizes.tolist())
                )
            ],
            "categories": [{"id": label, "name": name} for label, name in enumerate(self.class_names)],
            "annotations": [
                {
                    "id": number,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(ig),
                }
                for number, (image_id, label, box, area, ig) in enumerate(columns, 1)
            ],
        }


def open_index(
    root: str | os.PathLike,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    class_map: Mapping[str, str | None] | None = None,
    unreadable: str = "error",
) -> DetectionIndex:
    """Opens one split of a data set, whose format (COCO json, Pascal VOC xml, YOLO txt) it tells by the files.

    Every image's header and last bytes are looked at, so that a missing file or one cut short is found now. Boxes are
    clipped to the image; those without area are dropped; both are counted in `notes`.

    Args:
        root: folder of the data set.
        split: name of the split, such as `train`.
        classes: the detector's class names, in the order of its labels; None takes the data set's own (COCO: by
            category id; YOLO: as listed; VOC: sorted), renamed by `class_map`.
        class_map: the detector's name for a name of the data set, or None to drop such boxes; others keep their name.
        unreadable: 'error', or 'skip' to leave out images that are missing or cannot be read.

    Raises:
        UserError: anything in the files or arguments that a user can mend.
    """
    root = Path(root)
    if unreadable not in ("error", "skip"):
        raise UserError(f"data.unreadable: found {unreadable!r}; allowed are 'error' and 'skip'")
    reader, source = _find_split(root, split)
    annotations = reader.read_split(root, split, source)
    class_names, label_of = _match_classes(annotations.class_names, classes, class_map or {}, root)
    labels = _translate_labels(annotations, label_of, class_names, class_map or {})
    sizes, skipped = _read_sizes(annotations, unreadable)
    if not sizes:
        reason = f"all {len(skipped)} images were skipped" if skipped else "the split has no images"
        raise UserError(f"{source}: {split}: {reason}; at least one image is needed")
    return _assemble(annotations, labels, sizes, skipped, class_names, reader.NAME, split)


def open_unlabelled(
    root: str | os.PathLike, split: str | None, class_names: Sequence[str], unreadable: str = "error"
) -> DetectionIndex:
    """The images of a folder and those below it, or of one split of a data set, whose annotations are not looked at.

    Args:
        root: a folder of images; with `split`, of a data set.
        split: name of the split, which need not have annotations; None takes every image there is.
        class_names: those of the labelled images that it goes with.
        unreadable: as in `open_index`.

    Raises:
        UserError: no folder, no image, or one that cannot be read.
    """
    root = Path(root)
    if split is not None:
        reader, source = _find_split(root, split, "data.unlabelled")
        image_root, files = reader.list_images(root, split, source)
        format = reader.NAME
    else:
        _check_folder(root, "data.unlabelled", "a folder of images")
        found = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files = sorted(str(path.relative_to(root)) for path in found if not path.name.startswith("."))
        image_root, source, format, split = root, root, "folder", root.name
    if not files:
        raise UserError(
            f"data.unlabelled.root: {source} has no images; looked for {', '.join(IMAGE_SUFFIXES)}, also further down"
        )
    annotations = collect_annotations(
        (), class_names=[], image_root=image_root, files=files, sources=[source] * len(files)
    )
    sizes, skipped = _read_sizes(annotations, unreadable)
    if not sizes:
        raise UserError(f"data.unlabelled.root: {source}: all {len(skipped)} images were skipped; mend them")
    index = _assemble(annotations, annotations.labels, sizes, skipped, tuple(class_names), format, split)
    return replace(index, labelled=False)


def _check_folder(root: Path, key: str, needed: str) -> None:
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{key}.root: {root} {found}; give {needed}")


def _find_split(root: Path, split: str, key: str = "data") -> tuple[ModuleType, Path]:
    _check_folder(root, key, "the folder of a data set")
    available = {}
    for reader in FORMATS:
        splits = reader.find_splits(root)
        if split in splits:
            return reader, splits[split]
        available |= splits
    if available:
        raise UserError(
            f"{key}: {root} has no split {split!r}{_nearest(split, available)}; it has {', '.join(available)}"
        )
    layouts = "; ".join(f"{reader.NAME}: {reader.LAYOUT}" for reader in FORMATS)
    raise UserError(f"{key}.root: no annotations found in {root}; looked for {layouts}")


def _match_classes(
    found: list[str], classes: Sequence[str] | None, class_map: Mapping[str, str | None], root: Path
) -> tuple[tuple[str, ...], np.ndarray]:
    """The detector's class names, and its label for each class of the data set."""
    for name in class_map:
        if name not in found:
            raise UserError(
                f"data.class_map: {root} has no class {name!r}{_nearest(name, found)}; it has {', '.join(found)}"
            )
    mapped = [class_map.get(name, name) for name in found]
    names = tuple(dict.fromkeys(name for name in mapped if name is not None)) if classes is None else tuple(classes)
    if not names:
        raise UserError(f"data.classes: the list of classes for {root} is empty; at least one class is needed")
    twice = next((name for position, name in enumerate(names) if name in names[:position]), None)
    if twice is not None:
        raise UserError(f"data.classes: {twice!r} is listed twice; every class is listed once")
    for name, target in class_map.items():
        if target is not None and target not in names:
            raise UserError(
                f"data.class_map.{name}: {target!r} is not a class of the detector{_nearest(target, names)}; "
                f"allowed are {', '.join(names)}, or null to drop such boxes"
            )
    label_of = {None: _DROPPED} | {name: label for label, name in enumerate(names)}
    return names, np.array([label_of.get(name, _UNKNOWN) for name in mapped], dtype=np.int64)


def _translate_labels(
    annotations: Annotations, label_of: np.ndarray, class_names: tuple[str, ...], class_map: Mapping[str, str | None]
) -> np.ndarray:
    labels = label_of[annotations.labels] if len(annotations.labels) else annotations.labels
    unknown = np.flatnonzero(labels == _UNKNOWN)
    if len(unknown):
        first = unknown[0]
        name = annotations.class_names[annotations.labels[first]]
        image = annotations.box_images[first]
        raise UserError(
            f"{annotations.sources[image]}: image {annotations.files[image]}: class {name!r} is not a class of the "
            f"detector{_nearest(name, class_names)}; allowed are {', '.join(class_names)}; name it in data.classes, or "
            "give data.class_map its name in the detector, or null to drop such boxes"
        )
    return labels


def _read_sizes(annotations: Annotations, unreadable: str) -> tuple[dict[int, tuple[int, int]], dict[str, str]]:
    """(height, width) by position of the images that can be read, and the reason by file of those that cannot."""
    sizes, skipped = {}, {}
    for position, file in enumerate(annotations.files):
        try:
            sizes[position] = read_size(annotations.image_root / file)
        except UnreadableImageError as error:  # noqa: PERF203, each image may fail by itself
            if unreadable == "error":
                raise UnreadableImageError(
                    f"{error}; {annotations.sources[position]} names it; mend the file, or set data.unreadable=skip to "
                    "leave such images out"
                ) from error
            skipped[file] = str(error)
    return sizes, skipped


def _assemble(
    annotations: Annotations,
    labels: np.ndarray,
    sizes: dict[int, tuple[int, int]],
    skipped: dict[str, str],
    class_names: tuple[str, ...],
    format: str,
    split: str,
) -> DetectionIndex:
    images = np.fromiter(sizes, dtype=np.int64, count=len(sizes))
    extents = np.array([sizes[image] for image in images.tolist()], dtype=np.int32).reshape(-1, 2)
    position_of = np.full(len(annotations.files), _DROPPED)
    position_of[images] = np.arange(len(images))
    files = [annotations.files[image] for image in images.tolist()]

    keep = (labels >= 0) & (position_of[annotations.box_images] >= 0)
    positions, labels, ignored = position_of[annotations.box_images[keep]], labels[keep], annotations.ignored[keep]
    limits = extents[positions][:, [1, 0, 1, 0]].astype(np.float64)
    raw = annotations.boxes[keep] * (limits if annotations.fractional else 1)
    boxes = np.clip(raw, 0, limits).astype(np.float32)
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1) | (raw[:, 2:] <= raw[:, :2]).any(axis=1)
    clipped = (np.abs(boxes - raw) > _OVERHANG).any(axis=1) & ~empty
    notes = IndexNotes(_count_by_file(positions[empty], files), _count_by_file(positions[clipped], files), skipped)
    counts = np.bincount(positions[~empty], minlength=len(images))
    return DetectionIndex(
        class_names=class_names,
        image_root=annotations.image_root,
        files=np.array([os.fsencode(file) for file in files], dtype=np.bytes_),
        image_ids=annotations.image_ids[images],
        sizes=extents,
        boxes=boxes[~empty],
        labels=labels[~empty],
        ignored=ignored[~empty],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        notes=notes,
        format=format,
        split=split,
    )


def _count_by_file(positions: np.ndarray, files: list[str]) -> dict[str, int]:
    found, counts = np.unique(positions, return_counts=True)
    return {files[position]: count for position, count in zip(found.tolist(), counts.tolist())}


def _nearest(name: str, allowed: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name.lower(), [candidate.lower() for candidate in allowed], n=1)
    if not matches:
        return ""
    return f" (did you mean {next(candidate for candidate in allowed if candidate.lower() == matches[0])!r}?)"


def _shorten(names: Sequence[str] | Mapping[str, object], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
