"""A few images of the validation split, and what detectors see on them: kept in one file, drawn at any time."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from distill.data import DetectionDataset, Sample, collate_samples
from distill.measure import eval_mode
from students import Detector

NUMBER = 6  # images
SCORE = 0.3  # of a detection that is drawn
STUDENT, AT_FIRST = "student", "student at first"  # what it is shown as, now and as it was before it was trained


@dataclass(frozen=True)
class Look:
    """What one detector sees on one image.

    Attributes:
        boxes: (N, 4) xyxy, input pixels.
        scores: (N,), at least `SCORE`.
        labels: (N,).
        attention: by stride, (h, w): the mean of |feature| over the channels of a pyramid level.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    attention: dict[float, np.ndarray]


@dataclass(frozen=True)
class Scene:
    """One image as the network gets it, without its padding: (h, w, 3) uint8; its true boxes; looks by detector."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    looks: dict[str, Look] = field(default_factory=dict)


def choose_samples(dataset: DetectionDataset, number: int = NUMBER) -> list[Sample]:
    """Images with objects, spread evenly over the data set; the same ones at every call."""
    index = dataset.index
    positions = [i for i in range(len(index)) if len(index.boxes_of(i))] or list(range(len(index)))
    number = min(number, len(positions))
    chosen = [dataset[positions[i * len(positions) // number]] for i in range(number)]
    return [sample for sample in chosen if isinstance(sample, Sample)]


def make_scenes(samples: Iterable[Sample]) -> list[Scene]:
    """Scenes that nobody has looked at yet."""
    return [Scene(_visible(sample), sample.boxes, sample.labels) for sample in samples]


@torch.inference_mode()
def look(detector: Detector, samples: list[Sample]) -> list[Look]:
    """What a detector sees on each image; its modes and statistics are left as they were."""
    device = next(detector.parameters()).device
    looks = []
    with eval_mode(detector):
        for sample in samples:  # one at a time: beside a training there may be little memory left
            batch = collate_samples([sample], sample.image.shape[:2])
            output = detector(batch.images.to(device))
            (found,) = detector.decode(output, [sample.meta.valid_size])
            sure = found.scores >= SCORE
            height, width = sample.meta.valid_size
            attention = {}
            for stride, level in zip(detector.strides, output.features):
                cells = level[0, :, : math.ceil(height / stride), : math.ceil(width / stride)]
                attention[stride] = cells.float().abs().mean(0).cpu().numpy().astype(np.float32)
            boxes, scores, labels = (x[sure].cpu().float().numpy() for x in (found.boxes, found.scores, found.labels))
            looks.append(Look(boxes, scores, labels.astype(np.int64), attention))
    return looks


def with_looks(scenes: list[Scene], name: str, looks: list[Look]) -> list[Scene]:
    """The scenes with one more detector's looks, or with newer ones."""
    return [replace(scene, looks=scene.looks | {name: seen}) for scene, seen in zip(scenes, looks)]


def pack(scenes: list[Scene], class_names: list[str]) -> dict[str, np.ndarray]:
    """Flat arrays by name, as a .npz file holds them."""
    arrays = {"class_names": np.array(class_names)}
    for number, scene in enumerate(scenes):
        arrays |= {f"{number}|{part}": getattr(scene, part) for part in ("image", "boxes", "labels")}
        for name, seen in scene.looks.items():
            arrays |= {f"{number}|{name}|{part}": getattr(seen, part) for part in ("boxes", "scores", "labels")}
            arrays |= {f"{number}|{name}|attention|{stride}": level for stride, level in seen.attention.items()}
    return arrays


def read_scenes(file: Path) -> tuple[list[Scene], list[str]]:
    """The scenes of a file that holds what `pack` returned, and the names of the classes."""
    with np.load(file, allow_pickle=False) as arrays:
        names = {key: key.split("|") for key in arrays.files if key != "class_names"}
        scenes = []
        for number in sorted({int(parts[0]) for parts in names.values()}):
            mine = {tuple(parts[1:]): arrays[key] for key, parts in names.items() if parts[0] == str(number)}
            detectors = dict.fromkeys(parts[0] for parts in mine if len(parts) > 1)
            looks = {
                name: Look(
                    *(mine[name, part] for part in ("boxes", "scores", "labels")),
                    {float(parts[2]): level for parts, level in mine.items() if parts[:2] == (name, "attention")},
                )
                for name in detectors
            }
            scenes.append(Scene(mine[("image",)], mine[("boxes",)], mine[("labels",)], looks))
        return scenes, arrays["class_names"].tolist()


def _visible(sample: Sample) -> np.ndarray:
    height, width = sample.meta.valid_size
    return sample.image[:height, :width]
