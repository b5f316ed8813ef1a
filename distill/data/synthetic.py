"""Draws a data set of scenes in COCO's layout, so that everything can be tried without a download.

    python -m distill.data.synthetic FOLDER --train 400 --val 100 --image-size 160 --seed 0

The shapes in `distill.data.shapes` overlap, come in all sizes, and lie on busy ground under uneven light, blur and
noise.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from distill.data.shapes import CLASSES, DISTRACTORS, draw_ground, draw_shape, scribble
from distill.errors import UserError

DRAWER = "distill.data.synthetic 3"  # count up with every change of what is drawn: scenes on disk are then redrawn

SMALLEST = 14  # pixels across; squeezed and partly hidden, it comes down to some 9

_LEAST_VISIBLE = 0.3  # of an object's area, for it to be annotated
_LEAST_LEFT = 0.4  # of an object's area, that a later one may leave; above _LEAST_VISIBLE so that few go unannotated
_JPEG_QUALITY = 95


def draw_scenes(
    root: str | os.PathLike,
    *,
    train: int = 400,
    val: int = 100,
    image_size: int = 160,
    seed: int = 0,
    max_objects: int = 6,
    max_distractors: int = 3,
) -> Path:
    """Draws a train and a val split, unless the same ones are there already.

    Scene i of a split depends on the seed, the split, i and the sizes alone. Boxes hold what can be seen of an object.

    Args:
        root: folder to make; replaced if it holds scenes that are incomplete or of an older drawer.
        train: number of scenes.
        val: number of scenes.
        image_size: height and width in pixels.
        seed: of everything random.
        max_objects: most objects that are placed in a scene; the least is 2.
        max_distractors: most shapes of no class in a scene.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else or scenes of other settings, or a number is too small.
    """
    root = Path(root)
    for name, value, least in (
        ("train", train, 1),
        ("val", val, 1),
        ("image_size", image_size, 3 * SMALLEST),
        ("seed", seed, 0),
        ("max_objects", max_objects, 2),
        ("max_distractors", max_distractors, 0),
    ):
        if value < least:
            raise UserError(f"{name}: found {value}; at least {least} is needed")
    counts = {"train": train, "val": val}
    settings = {
        "image_size": image_size,
        "seed": seed,
        "max_objects": max_objects,
        "max_distractors": max_distractors,
    }
    wanted = {"drawer": DRAWER, **counts, **settings}
    if _is_complete(root, wanted):
        return root
    _check_replaceable(root, wanted)

    root.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        drawn = aside / "scenes"
        (drawn / "annotations").mkdir(parents=True)
        for split, count in counts.items():
            _write_split(drawn, split, count, wanted, settings)
        _swap(drawn, root, aside / "old", wanted)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return root


def draw_scene(
    rng: np.random.Generator, image_size: int, max_objects: int, max_distractors: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one scene.

    Args:
        rng: source of all that is random.
        image_size: height and width in pixels.
        max_objects: most objects.
        max_distractors: most shapes of no class.

    Returns:
        The image (S, S, 3) uint8 RGB, boxes (N, 4) int64 xyxy pixels of what can be seen, and labels (N,) int64 into
        the order of `CLASSES`.
    """
    canvas = draw_ground(image_size, rng)
    scribble(canvas, int(rng.integers(0, 4)), rng)
    owner = np.full((image_size, image_size), -1)  # which shape each pixel shows
    shapes = [*CLASSES.values(), *DISTRACTORS.values()]
    kinds = np.concatenate(
        [
            rng.integers(len(CLASSES), size=rng.integers(2, max_objects + 1)),
            len(CLASSES) + rng.integers(len(DISTRACTORS), size=rng.integers(max_distractors + 1)),
        ]
    )
    rng.shuffle(kinds)
    areas = np.zeros(len(kinds))  # of the whole shape, also outside the image
    left = np.zeros(len(kinds))  # of that, what can be seen
    for number, kind in enumerate(kinds):
        diameter = np.exp(rng.uniform(np.log(SMALLEST), np.log(image_size / 2)))
        for _ in range(8):
            placed = _place(canvas, owner, areas, left, number, shapes[kind], diameter, rng)
            if placed:
                break

    boxes, labels = [], []
    for number, kind in enumerate(kinds):
        if kind >= len(CLASSES) or not areas[number] or left[number] < _LEAST_VISIBLE * areas[number]:
            continue
        rows, columns = np.nonzero(owner == number)
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        labels.append(kind)
    image = _photograph(canvas, rng)
    return image, np.array(boxes, dtype=np.int64).reshape(-1, 4), np.array(labels, dtype=np.int64)


def _place(
    canvas: np.ndarray,
    owner: np.ndarray,
    areas: np.ndarray,
    left: np.ndarray,
    number: int,
    shape: tuple,
    diameter: float,
    rng: np.random.Generator,
) -> bool:
    """Draws a shape at a random place, unless too little of it or of an earlier shape would be seen."""
    size = len(canvas)
    x, y = rng.uniform(0, size, 2)
    ground = canvas[int(y), int(x)]
    paint, cover = draw_shape(*shape, diameter, ground, rng)
    side = len(cover)
    corner_x, corner_y = int(x - side / 2), int(y - side / 2)
    inside = (
        slice(max(0, -corner_y), min(side, size - corner_y)),
        slice(max(0, -corner_x), min(side, size - corner_x)),
    )
    target = (
        slice(max(0, corner_y), min(size, corner_y + side)),
        slice(max(0, corner_x), min(size, corner_x + side)),
    )
    solid = cover[..., 0] > 0.5
    area, seen = solid.sum(), solid[inside].sum()
    hidden = owner[target][solid[inside]]
    remaining = left - np.bincount(hidden[hidden >= 0], minlength=len(left))
    if seen < 2 * _LEAST_LEFT * area or (remaining < _LEAST_LEFT * areas).any():
        return False
    left[:] = remaining
    areas[number], left[number] = area, seen
    owner[target][solid[inside]] = number
    canvas[target] += cover[inside] * (paint[inside] - canvas[target])
    return True


def _photograph(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, lens and sensor: what stands between a scene and its picture."""
    size = len(canvas)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    tilt = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    light = 1 + tilt[0] * ramp[None, :] + tilt[1] * ramp[:, None]
    tint = rng.uniform(0.85, 1.15) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    canvas = canvas * light[..., None] * tint.astype(np.float32)
    sigma = rng.uniform(0, 0.7)
    if sigma > 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), sigma)
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(canvas + noise * np.float32(rng.uniform(1, 5)), 0, 255).astype(np.uint8)


def _write_split(root: Path, split: str, count: int, wanted: dict, settings: dict) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    size = settings["image_size"]
    images, annotations = [], []
    for number in range(1, count + 1):
        rng = np.random.default_rng((settings["seed"], ("train", "val").index(split), number))
        image, boxes, labels = draw_scene(rng, size, settings["max_objects"], settings["max_distractors"])
        name = f"{number:06d}.jpg"
        _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        (folder / name).write_bytes(encoded.tobytes())
        images.append({"id": number, "file_name": name, "height": size, "width": size})
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    content = {
        "info": wanted,
        "images": images,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)],
        "annotations": annotations,
    }
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _read_content(root: Path, split: str) -> dict:
    """A split's json, or an empty dict where there is none that can be read."""
    try:
        content = json.loads((root / "annotations" / f"{split}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("info"), dict) else {}


def _is_complete(root: Path, wanted: dict) -> bool:
    for split in ("train", "val"):
        content = _read_content(root, split)
        folder = root / "images" / split
        if content.get("info") != wanted or not folder.is_dir():
            return False
        if not {image["file_name"] for image in content["images"]} <= set(os.listdir(folder)):
            return False
    return True


def _check_replaceable(root: Path, wanted: dict) -> None:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    infos = [_read_content(root, split).get("info", {}) for split in ("train", "val")]
    if not any(str(info.get("drawer", "")).startswith("distill.data.synthetic ") for info in infos):
        raise UserError(f"{root}: holds something other than drawn scenes; give an empty or a new folder")
    # scenes of an older drawer are replaced, and so is what is incomplete; what other runs may stand on is not
    other = next((info for info in infos if info.get("drawer") == DRAWER and info != wanted), None)
    if other:
        key = next(key for key in wanted if other.get(key) != wanted[key])
        raise UserError(
            f"{root}: holds scenes drawn with {key} {other.get(key)}, not {wanted[key]}; "
            "give another folder (data.root), or delete this one"
        )


def _swap(drawn: Path, root: Path, old: Path, wanted: dict) -> None:
    """Puts the drawn folder in place; another process may have done so meanwhile."""
    try:
        if root.exists():
            root.rename(old)
        drawn.rename(root)
    except OSError:
        if not _is_complete(root, wanted):
            raise


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m distill.data.synthetic", description="Draws a data set of scenes.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=400, help="number of training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=100, help="number of validation scenes (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=160, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        root = draw_scenes(
            options.folder, train=options.train, val=options.val, image_size=options.image_size, seed=options.seed
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{root}: {options.train} training and {options.val} validation scenes of {', '.join(CLASSES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
