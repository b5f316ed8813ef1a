"""Turns an image of any size, and its boxes, into a network's input of one size."""

import os
import random
from typing import NamedTuple

import cv2
import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

import albumentations as A
from albumentations.augmentations.crops.transforms import BaseCrop

from distill.errors import UserError

PAD_VALUE = 114
MIN_VISIBLE = 0.25  # of a box's area; less of it in a crop is no object to find

_MAX_STRETCH = 4 / 3  # of a crop's aspect ratio against the image's
_SMALLEST_ZOOM = 0.5


class View(NamedTuple):
    """One look at an image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) float32 xyxy, input pixels.
        labels: (N,) int64.
        scale: input pixels per pixel of what was shown, (x, y).
        offset: where in the input the content's top left corner lies, (x, y) pixels.
        valid_size: (height, width) of the input up to the content's bottom right corner; the rest is padding.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scale: tuple[float, float]
    offset: tuple[int, int]
    valid_size: tuple[int, int]


class AreaCrop(BaseCrop):
    """Cuts a window of a random share of the image's area, of about the image's aspect ratio, without resizing it."""

    def __init__(self, scale: tuple[float, float], p: float = 1.0):
        super().__init__(p=p)
        self.scale = scale

    def get_params_dependent_on_data(self, params: dict, data: dict) -> dict[str, tuple[int, int, int, int]]:
        """The window's corners in pixels, (left, top, right, bottom)."""
        image_height, image_width = params["shape"][:2]
        side = self.py_random.uniform(*self.scale) ** 0.5
        stretch = _MAX_STRETCH ** self.py_random.uniform(-0.5, 0.5)
        width = min(image_width, max(1, round(image_width * side * stretch)))
        height = min(image_height, max(1, round(image_height * side / stretch)))
        left = self.py_random.randint(0, image_width - width)
        top = self.py_random.randint(0, image_height - height)
        return {"crop_coords": (left, top, left + width, top + height)}


class Augmentation:
    """Crop and flip, then resize, then colour, then pad: pixels are touched when they are fewest.

    Everything random is drawn from the generator that is passed in, so a view depends on nothing else.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        resize: str,
        geometry: list[A.DualTransform],
        color: list[A.ImageOnlyTransform],
        zoom_out: float,
    ):
        self.image_size = image_size
        self.resize = resize
        self.zoom_out = zoom_out
        boxes = A.BboxParams("pascal_voc", min_visibility=MIN_VISIBLE)
        self.geometry = A.Compose(geometry, bbox_params=boxes) if geometry else None
        self.color = A.Compose(color) if color else None

    def __call__(self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> View:
        """Makes one view.

        Args:
            image: (h, w, 3) uint8 RGB.
            boxes: (N, 4) float32 xyxy pixels, inside the image and with area.
            labels: (N,) int64.
            rng: source of all that is random.
        """
        if self.geometry is not None or self.color is not None:
            py_random = random.Random(int(rng.integers(2**63)))
        if self.geometry is not None:
            # One stream for all: set_random_seed would give every transform the same draws, so that an image is flipped
            # both ways or not at all. A fifth column tells which boxes are left.
            self.geometry.set_random_state(rng, py_random)
            rows = np.concatenate([boxes, np.arange(len(boxes), dtype=np.float32)[:, None]], axis=1)
            out = self.geometry(image=image, bboxes=rows)
            image, rows = out["image"], np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 5)
            boxes, labels = rows[:, :4], labels[rows[:, 4].astype(np.int64)]
        shown_height, shown_width = image.shape[:2]
        image, offset = self._fit(image, rng)
        height, width = image.shape[:2]
        scale = (width / shown_width, height / shown_height)
        if self.color is not None:
            self.color.set_random_state(rng, py_random)
            image = self.color(image=image)["image"]
        boxes = boxes * np.array(scale * 2, dtype=np.float32) + np.array(offset * 2, dtype=np.float32)
        valid_size = (offset[1] + height, offset[0] + width)
        return View(self._pad(image, offset), boxes.astype(np.float32), labels, scale, offset, valid_size)

    def _fit(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int]]:
        """The image, resized to fit the input, and the (x, y) of its corner there."""
        shown_height, shown_width = image.shape[:2]
        height, width = self.image_size
        if self.resize == "letterbox":
            ratio = min(height / shown_height, width / shown_width)
            height, width = max(1, round(shown_height * ratio)), max(1, round(shown_width * ratio))
        zoomed = bool(self.zoom_out) and rng.random() < self.zoom_out
        if zoomed:
            zoom = rng.uniform(_SMALLEST_ZOOM, 1)
            height, width = max(1, round(height * zoom)), max(1, round(width * zoom))
        if (height, width) != (shown_height, shown_width):
            shrinks = height * width < shown_height * shown_width
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        if not zoomed:
            return image, (0, 0)
        free = (self.image_size[1] - width, self.image_size[0] - height)
        return image, (int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1)))

    def _pad(self, image: np.ndarray, offset: tuple[int, int]) -> np.ndarray:
        height, width = image.shape[:2]
        if (height, width) == self.image_size:
            return np.ascontiguousarray(image)
        padded = np.full((*self.image_size, 3), PAD_VALUE, dtype=np.uint8)
        padded[offset[1] : offset[1] + height, offset[0] : offset[0] + width] = image
        return padded


def build_augmentation(
    image_size: tuple[int, int],
    resize: str = "letterbox",
    *,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    crop: float = 0.0,
    crop_scale: tuple[float, float] = (0.5, 1.0),
    zoom_out: float = 0.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> Augmentation:
    """The training transform.

    Args:
        image_size: (height, width) of the network's input in pixels.
        resize: 'letterbox' keeps the aspect ratio and pads grey to the right and below; 'stretch' fills the input.
        horizontal_flip: probability.
        vertical_flip: probability.
        crop: probability; boxes of which less than a quarter is left are dropped.
        crop_scale: smallest and largest share of the image's area that a crop keeps.
        zoom_out: probability of showing the image at 0.5 to 1 times its size, somewhere on a grey ground.
        brightness: the factor is drawn from 1 - x to 1 + x.
        contrast: likewise.
        saturation: likewise.
        hue: the shift is drawn from -x to x turns of the colour wheel, at most 0.5.

    Raises:
        UserError: `resize` is unknown, `crop_scale` is no rising pair in (0, 1], or `hue` is above 0.5.
    """
    if resize not in ("letterbox", "stretch"):
        raise UserError(f"data.resize: found {resize!r}; allowed are 'letterbox' and 'stretch'")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise UserError(
            f"data.augment.crop_scale: found {crop_scale}; two rising shares of the area in (0, 1] are needed"
        )
    if not 0 <= hue <= 0.5:
        raise UserError(f"data.augment.hue: found {hue}; 0 to 0.5 is allowed, half a turn of the colour wheel")
    geometry = []
    if crop:
        geometry.append(AreaCrop(crop_scale, p=crop))
    if horizontal_flip:
        geometry.append(A.HorizontalFlip(p=horizontal_flip))
    if vertical_flip:
        geometry.append(A.VerticalFlip(p=vertical_flip))
    color = []
    if brightness or contrast or saturation or hue:
        ranges = {
            name: (max(0.0, 1 - x), 1 + x)
            for name, x in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation))
        }
        color.append(A.ColorJitter(**ranges, hue=(-hue, hue), p=1.0))
    return Augmentation(tuple(image_size), resize, geometry, color, zoom_out)


def build_resize(image_size: tuple[int, int], resize: str = "letterbox") -> Augmentation:
    """The evaluation transform: nothing random, every box kept.

    Args:
        image_size: (height, width) of the network's input in pixels.
        resize: 'letterbox' or 'stretch', as in training.
    """
    return build_augmentation(image_size, resize, horizontal_flip=0.0)
