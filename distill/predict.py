"""Finds objects on images of one's own: draws their boxes, and writes them to a JSON in pixels of the original.

python -m distill.predict runs/x/student photo.jpg
python -m distill.predict runs/x/student.onnx folder --output found --threshold 0.5
"""

import argparse
import colorsys
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from distill.artifact import input_size, open_detector
from distill.data import ImageMeta, UnreadableImageError, build_resize, collate_samples, read_image
from distill.data.annotations import IMAGE_SUFFIXES
from distill.data.dataset import Sample
from distill.errors import UserError, exit_status
from distill.evaluation import detect
from distill.exported import ExportedDetector
from distill.report import Report, counted
from students import Detections, Detector

FOUND = "detections.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", metavar="DETECTOR", type=Path, help="an artifact folder, or a .onnx or .pt2 file")
    parser.add_argument("images", metavar="IMAGES", type=Path, help="an image, or a folder with images at any depth")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="predictions otherwise")
    parser.add_argument("--threshold", type=float, default=0.3, help="lower scores are left out; 0.3 otherwise")
    args = parser.parse_args()
    return exit_status(lambda: predict_all(args.detector, args.images, args.output, args.threshold))


def predict(
    detector: Detector | ExportedDetector, image: str | Path | np.ndarray, threshold: float = 0.3
) -> Detections:
    """What a detector finds on one image, fitted into its input as in its training.

    Args:
        detector: from `students.load`, or an `ExportedDetector`; on any device. Left in the mode it was in.
        image: a file, turned upright as its EXIF orientation says, or (H, W, 3) uint8 RGB pixels.
        threshold: lower scores are left out.

    Returns:
        Detections, best first; their boxes are in pixels of the image as it was given, not of the detector's input.

    Raises:
        UserError: the file is no image, or the detector's `info` does not tell its `image_size`.
        ValueError: the pixels have another shape or type.
    """
    pixels = read_image(Path(image)) if isinstance(image, str | Path) else np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image: found {pixels.dtype} of shape {pixels.shape}; (H, W, 3) uint8 RGB is needed")
    image_size = input_size(detector)
    fit = build_resize(image_size, detector.info.get("resize", "letterbox"))
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    view = fit(pixels, *nothing, np.random.default_rng(0))
    meta = ImageMeta(0, str(image), pixels.shape[:2], view.scale, view.offset, view.valid_size)
    batch = collate_samples([Sample(view.image, view.boxes, view.labels, meta)], image_size)
    found = detect(detector, batch)[0]
    keep = found.scores >= threshold
    return Detections(found.boxes[keep], found.scores[keep], found.labels[keep])


def predict_all(path: Path, images: Path, output: Path, threshold: float) -> None:
    """Predicts an image or a folder; draws each image, with its boxes, and writes what was found to one JSON."""
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold: found {threshold:g}; a score from 0 to 1 is needed")
    check_free(output)
    files, num_others = find_images(images, output)
    detector = open_detector(path).to("cuda" if torch.cuda.is_available() else "cpu")
    root = images if images.is_dir() else images.parent
    entries: list[dict[str, Any]] = []
    unreadable: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for file in files:
        name = file.relative_to(root)
        try:
            pixels = read_image(file)
        except UnreadableImageError as error:
            unreadable[str(name)] = str(error)
            continue
        found = predict(detector, pixels, threshold)
        drawn = output / (name if name.suffix.lower() in (".jpg", ".jpeg", ".png") else f"{name}.jpg")
        drawn.parent.mkdir(parents=True, exist_ok=True)
        draw(pixels, found, detector.class_names).save(drawn)
        entries.append({"file": str(name), "width": pixels.shape[1], "height": pixels.shape[0]})
        entries[-1]["detections"] = as_json(found, detector.class_names)
        counts.update(detector.class_names[label] for label in found.labels.tolist())
    if not entries:
        raise UserError("; ".join(unreadable.values()))
    results = {"detector": str(path), "threshold": threshold, "images": entries, "unreadable": sorted(unreadable)}
    (output / FOUND).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    report = Report()
    classes = ", ".join(f"{name}: {count}" for name, count in counts.most_common())
    total = counted(counts.total(), "detection") + (f" ({classes})" if classes else "")
    report.say(f"{counted(len(entries), 'image')}, {total}, in {output}; boxes in {output / FOUND}")
    if num_others:
        report.say(f"skipped {counted(num_others, 'file')} of other kinds than {', '.join(IMAGE_SUFFIXES)}")
    if unreadable:
        report.warn(f"{counted(len(unreadable), 'image')} cannot be read: {', '.join(sorted(unreadable))}")


def check_free(output: Path) -> None:
    """Raises a UserError where drawings would be mixed with, or written over, what is not an earlier run's."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; a folder is needed")
    if output.is_dir() and any(output.iterdir()) and not (output / FOUND).is_file():
        raise UserError(f"--output: {output} holds other files; give a new folder, or one of an earlier prediction")


def find_images(path: Path, output: Path) -> tuple[list[Path], int]:
    """The images at a path and below it, in order of their names, without those in `output`; how many files are none.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path], 0
    if not path.exists():
        raise UserError(f"{path}: no such image or folder")
    output = output.resolve()
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and output not in file.resolve().parents]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        others = f", but {counted(len(files), 'other file')}" if files else ""
        raise UserError(f"{path}: holds no images ({', '.join(IMAGE_SUFFIXES)}){others}")
    return images, len(files) - len(images)


def as_json(found: Detections, class_names: list[str]) -> list[dict[str, Any]]:
    """One entry a detection, best first: its class, its score, its box as [left, top, right, bottom] in pixels."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist())
    return [
        {"class": class_names[label], "score": round(score, 4), "box": [round(edge, 2) for edge in box]}
        for label, score, box in rows
    ]


def draw(pixels: np.ndarray, found: Detections, class_names: list[str]) -> Image.Image:
    """A copy of an image with a box and a label on each detection, the best on top, in a colour a class.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        found: boxes in pixels of the image.
        class_names: what the labels stand for.
    """
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(12, round(max(image.size) / 50)))
    rows = list(zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist()))
    for label, score, (left, top, right, bottom) in reversed(rows):
        color = class_color(label)
        canvas.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=line)
        text = f"{class_names[label]} {score:.2f}"
        _, _, width, height = canvas.textbbox((0, 0), text, font=font)
        # above the box, or inside it at the image's upper edge; never beyond the right one
        x = max(0, min(left, image.width - width - 2 * line))
        y = top - height - line if top >= height + line else top
        canvas.rectangle((x, y, x + width + 2 * line, y + height + line), fill=color)
        red, green, blue = color
        dark = 0.299 * red + 0.587 * green + 0.114 * blue > 140  # how bright the ground looks
        canvas.text((x + line, y), text, font=font, fill=(0, 0, 0) if dark else (255, 255, 255))
    return image


def class_color(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class; neighbours in number are far apart in hue."""
    hue = label * 0.618034 % 1  # steps of the golden section never come back to where they were
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95 if label % 2 else 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


if __name__ == "__main__":
    sys.exit(main())
