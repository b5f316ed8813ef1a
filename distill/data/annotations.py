"""What every annotation format is read into, before classes are matched and images are looked at."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.errors import UserError

_ROW = np.dtype([("image", np.int64), ("label", np.int64), ("box", np.float64, 4), ("ignored", bool)])
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Annotations:
    """One split as its files have it: boxes may still be empty, lie outside the image or be of unwanted classes.

    Attributes:
        class_names: the data set's own names, in its own order.
        image_root: folder that `files` are relative to.
        files: N image files.
        sources: N annotation files, one an image; what an error message points to.
        image_ids: (N,) int64.
        box_images: (M,) int64, the image each box belongs to, ascending.
        boxes: (M, 4) float64 xyxy; pixels, or fractions of the image's width and height.
        labels: (M,) int64 into `class_names`.
        ignored: (M,) bool, boxes that are neither learned nor counted.
        fractional: whether `boxes` are fractions.
    """

    class_names: list[str]
    image_root: Path
    files: list[str]
    sources: list[Path]
    image_ids: np.ndarray
    box_images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    fractional: bool = False


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        UserError: it cannot be read so.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as such, or restore it") from error


def collect_annotations(
    rows: Iterable[tuple[int, int, tuple[float, float, float, float], bool]],
    *,
    class_names: list[str],
    image_root: Path,
    files: list[str],
    sources: list[Path],
    image_ids: Iterable[int] | None = None,
    fractional: bool = False,
) -> Annotations:
    """Packs boxes into arrays, sorted by image and otherwise in the order given.

    Args:
        rows: (image, label, xyxy box, ignored), one a box.
        class_names: the data set's own names.
        image_root: folder that `files` are relative to.
        files: image files.
        sources: the annotation file of each image.
        image_ids: one an image; None numbers them from 1.
        fractional: whether boxes are fractions of the image's width and height.
    """
    table = np.fromiter(rows, dtype=_ROW)
    table = table[np.argsort(table["image"], kind="stable")]
    return Annotations(
        class_names=class_names,
        image_root=image_root,
        files=files,
        sources=sources,
        image_ids=np.array(range(1, len(files) + 1) if image_ids is None else list(image_ids), dtype=np.int64),
        box_images=table["image"].copy(),
        boxes=table["box"].copy(),
        labels=table["label"].copy(),
        ignored=table["ignored"].copy(),
        fractional=fractional,
    )
