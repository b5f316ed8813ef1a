"""Four images as one (YOLOv4, arXiv 2004.10934): more objects, in other surroundings, and at their edges cut off."""

from collections.abc import Sequence

import cv2
import numpy as np

from distill.data.augment import MIN_VISIBLE, PAD_VALUE, View

_CENTRE = (0.25, 0.75)  # of the input, where the four meet
_ZOOM = (0.5, 1.0)  # of the size at which an image alone would be shown


def compose_mosaic(views: Sequence[View | None], rng: np.random.Generator) -> View:
    """One view of four, each in a quarter that it is cut to; the corner that it shows lies where the four meet.

    Boxes are cut off with their images; those of which less than a quarter is left are dropped.

    Args:
        views: four, of one input size; first the upper left, then the upper right, lower left and lower right one. None
            leaves a quarter grey.
        rng: source of all that is random.

    Returns:
        A view that fills the input; its scale and offset are those of the first image, as far as that goes.
    """
    height, width = next(view for view in views if view is not None).image.shape[:2]
    middle = round(width * rng.uniform(*_CENTRE)), round(height * rng.uniform(*_CENTRE))
    zooms = rng.uniform(*_ZOOM, size=len(views))
    image = np.full((height, width, 3), PAD_VALUE, dtype=np.uint8)
    boxes, labels = [np.zeros((0, 4), dtype=np.float32)], [np.zeros(0, dtype=np.int64)]
    places = []
    for number, (view, zoom) in enumerate(zip(views, zooms)):
        if view is None:
            continue
        content = view.image[view.offset[1] : view.valid_size[0], view.offset[0] : view.valid_size[1]]
        size = tuple(max(1, round(side * zoom)) for side in (content.shape[1], content.shape[0]))
        scale = np.array(size) / (content.shape[1], content.shape[0])
        content = cv2.resize(content, size, interpolation=cv2.INTER_AREA)
        right, lower = number % 2, number // 2
        corner = np.array((middle[0] if right else middle[0] - size[0], middle[1] if lower else middle[1] - size[1]))
        low = np.array((middle[0] if right else 0, middle[1] if lower else 0))
        high = np.array((width if right else middle[0], height if lower else middle[1]))
        start, end = np.maximum(corner, low), np.minimum(corner + size, high)
        (x1, y1), (x2, y2), (left, top) = start, end, corner
        image[y1:y2, x1:x2] = content[y1 - top : y2 - top, x1 - left : x2 - left]
        moved = (view.boxes.reshape(-1, 2, 2) - view.offset) * scale + corner
        shown = moved.clip(start, end)
        sizes, before = (x[:, 1] - x[:, 0] for x in (shown, moved))
        keep = sizes.prod(axis=1) > before.prod(axis=1) * MIN_VISIBLE
        boxes.append(shown[keep].reshape(-1, 4).astype(np.float32))
        labels.append(view.labels[keep])
        places.append((tuple((scale * view.scale).tolist()), (int(corner[0]), int(corner[1]))))
    return View(image, np.concatenate(boxes), np.concatenate(labels), *places[0], (height, width))
