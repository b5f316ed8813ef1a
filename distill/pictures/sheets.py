"""Sheets of images: what is there, what detectors see, and where they look."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from distill.data import Batch
from distill.pictures.scenes import AT_FIRST, STUDENT, Scene
from distill.pictures.style import MIDDLE_GREY, class_color, legend_lines, new_sheet

TITLE = {"fontsize": 13, "color": MIDDLE_GREY, "fontweight": "bold", "loc": "center", "pad": 4}
MOST_ATTENTION = 3  # images
LEGEND = 0.3  # inches


def draw_mosaic(scenes: list[Scene], class_names: list[str]) -> Figure | None:
    """Each image as it is in truth, as each teacher sees it and as the student does."""
    if not scenes:
        return None
    detectors = [name for name in _detectors(scenes) if name != AT_FIRST]
    figure, grid = new_sheet(len(scenes), 1 + len(detectors), _tallest(scenes), head=0.3 + _legend_height(class_names))
    for scene, row in zip(scenes, grid):
        for axes in row:
            axes.imshow(scene.image)
        show_boxes(row[0], scene.boxes, scene.labels, class_names)
        for axes, name in zip(row[1:], detectors):
            seen = scene.looks[name]
            show_boxes(axes, seen.boxes, seen.labels, class_names)
    for axes, title in zip(grid[0], ("truth", *detectors)):
        axes.set_title(title, **TITLE)
    _name_classes(figure, class_names)
    return figure


def draw_attention(scenes: list[Scene]) -> Figure | None:
    """Where each detector's pyramid is active, level by level: mean of |feature| over channels, over the image."""
    scenes = [scene for scene in scenes if scene.looks][:MOST_ATTENTION]
    if not scenes:
        return None
    detectors = _detectors(scenes)
    strides = sorted({stride for scene in scenes for seen in scene.looks.values() for stride in seen.attention})
    figure, grid = new_sheet(len(scenes) * len(detectors), 1 + len(strides), _tallest(scenes))
    for number, axes_row in enumerate(grid):
        scene, name = scenes[number // len(detectors)], detectors[number % len(detectors)]
        for axes in axes_row:
            axes.imshow(scene.image)
        axes_row[0].text(
            0.03, 0.95, name, transform=axes_row[0].transAxes, va="top", fontsize=12, color="white",
            bbox={"boxstyle": "round,pad=0.2", "color": "#000000", "alpha": 0.6},
        )  # fmt: skip
        for axes, stride in zip(axes_row[1:], strides):
            level = scene.looks[name].attention.get(stride)
            if level is not None:
                height, width = scene.image.shape[:2]
                extent = (-0.5, level.shape[1] * stride - 0.5, level.shape[0] * stride - 0.5, -0.5)
                axes.imshow(_spread(level), cmap="inferno", alpha=0.7, extent=extent, interpolation="bilinear")
                axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    for axes, title in zip(grid[0], ("image", *(f"stride {stride:g}" for stride in strides))):
        axes.set_title(title, **TITLE)
    return figure


def draw_batch(batch: Batch, class_names: list[str], most: int = 8) -> Figure | None:
    """A batch as the network sees it, augmented, with the boxes that it is taught."""
    shown = min(len(batch.images), most)
    if not shown:
        return None
    columns = min(4 if shown > 4 else 2, shown)
    height, width = batch.images.shape[-2:]
    figure, grid = new_sheet(-(-shown // columns), columns, height / width, head=_legend_height(class_names))
    for axes, image, target in zip((axes for row in grid for axes in row), batch.images, batch.targets):
        axes.imshow(image.permute(1, 2, 0).numpy())
        if target is not None:  # it is of an image without labels
            show_boxes(axes, target["boxes"].numpy(), target["labels"].numpy(), class_names)
    _name_classes(figure, class_names)
    return figure


def show_boxes(axes: Axes, boxes: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Boxes (N, 4) xyxy in the colours of their classes; by name too where the colours are too few."""
    for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
        color = class_color(label)
        # a dark line below the bright one, so that a box shows on any ground
        for edge, width in (("#00000099", 2.4), (color, 1.3)):
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=width))
        if not legend_lines(class_names):
            inside = y1 < 0.08 * axes.get_ylim()[0]  # above it there is no room
            axes.text(
                x1, y1, class_names[label], fontsize=6, va="top" if inside else "bottom", color="white", clip_on=True,
                bbox={"pad": 0.6, "color": "#000000", "alpha": 0.55, "linewidth": 0},
            )  # fmt: skip


def _legend_height(class_names: list[str]) -> float:
    return LEGEND * legend_lines(class_names)


def _name_classes(figure: Figure, class_names: list[str]) -> None:
    lines = legend_lines(class_names)
    if lines:
        patches = [Patch(facecolor=class_color(i), edgecolor="black", label=n) for i, n in enumerate(class_names)]
        figure.legend(
            handles=patches, loc="upper center", ncols=-(-len(patches) // lines), fontsize=12,
            labelcolor=MIDDLE_GREY, handlelength=0.9, columnspacing=1.2, borderaxespad=0.1,
        )  # fmt: skip


def _detectors(scenes: list[Scene]) -> list[str]:
    """Teachers first, the student last, and before it what it was."""
    return sorted(scenes[0].looks, key=lambda name: (name in (AT_FIRST, STUDENT), name == STUDENT))


def _tallest(scenes: list[Scene]) -> float:
    return max(scene.image.shape[0] / scene.image.shape[1] for scene in scenes)


def _spread(level: np.ndarray) -> np.ndarray:
    """Between 0 and 1, a few extreme cells aside."""
    low, high = np.percentile(level, (2, 99.5))
    return np.clip((level - low) / max(high - low, 1e-12), 0, 1)
