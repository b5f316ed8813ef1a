"""The things that drawn scenes are made of.

A shape is a level function over the plane: below 1 inside, 1 on the outline, which reaches no farther than 1 from the
origin. Classes are told apart by outline and surface together: some share the outline and differ in surface, some
differ by one corner, and distractors come near to one class or another without being it.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

Level = Callable[[np.ndarray, np.ndarray], np.ndarray]

_LEAST_CONTRAST = 70  # between two colours, 0 to 441
_HUE_SPREAD = 0.06  # turns of the colour wheel; classes lie 0.125 apart


def _radius(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = _radius(u, v)
    return np.maximum(radius, 2 - radius / 0.55)


def _open_ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_ring(u, v), 2 - np.abs(np.arctan2(v, u)) / 0.8)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_radius(u, v), 2 - np.hypot(u - 0.5, v) / 0.8)


def _half_disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_radius(u, v), 1 + 2 * u)


def _polygon(corners: int) -> Level:
    sector = 2 * math.pi / corners

    def level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = np.arctan2(v, u) % sector - sector / 2
        return _radius(u, v) * np.cos(angle) / math.cos(sector / 2)

    return level


def _star(points: int, inner: float) -> Level:
    half = math.pi / points
    # The edge from the point (1, 0) to the notch next to it, by its normal.
    normal_x, normal_y = inner * math.sin(half), 1 - inner * math.cos(half)

    def level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = half - np.abs(np.arctan2(v, u) % (2 * half) - half)  # 0 towards a point, `half` towards a notch
        return _radius(u, v) * (normal_x * np.cos(angle) + normal_y * np.sin(angle)) / normal_x

    return level


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) / 0.94, np.minimum(u, v) / 0.3)


def _bar(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u) / 0.97, np.abs(v) / 0.22)


_PLAIN, _STRIPED, _TWO_TONE, _ANY = "plain", "striped", "two_tone", "any"

# Outline, surface, and the hue in [0, 1) that most members of the class are near. Neighbours in hue differ in outline
# or surface, and distractors have any hue, so colour helps early on and is never enough.
CLASSES: dict[str, tuple[Level, str, float | None]] = {
    "disc": (_radius, _PLAIN, 0.0),
    "ring": (_ring, _PLAIN, 0.12),
    "striped_disc": (_radius, _STRIPED, 0.25),
    "two_tone_disc": (_radius, _TWO_TONE, 0.37),
    "triangle": (_polygon(3), _ANY, 0.5),
    "square": (_polygon(4), _ANY, 0.62),
    "star": (_star(5, 0.45), _ANY, 0.75),
    "cross": (_cross, _ANY, 0.87),
}
DISTRACTORS: dict[str, tuple[Level, str, float | None]] = {
    "hexagon": (_polygon(6), _ANY, None),
    "open_ring": (_open_ring, _PLAIN, None),
    "crescent": (_crescent, _ANY, None),
    "half_disc": (_half_disc, _ANY, None),
    "bar": (_bar, _ANY, None),
}


def draw_shape(
    level: Level, surface: str, hue: float | None, diameter: float, ground: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one shape, turned, squeezed, coloured and shaded at random.

    Args:
        level: the outline.
        surface: 'plain', 'striped', 'two_tone', or 'any' of them.
        hue: that the first colour is near; None for any.
        diameter: of the circle around it before squeezing, in pixels.
        ground: (3,) mean colour of what it will lie on, from which it must stand out.
        rng: source of all that is random.

    Returns:
        Colour (h, w, 3) float32 in 0 to 255, and cover (h, w, 1) float32 in [0, 1].
    """
    side = int(np.ceil(diameter)) + 2
    supersampling = 4 if diameter < 24 else 2
    samples = ((np.arange(side * supersampling) + 0.5) / supersampling - side / 2) * 2 / diameter
    shift_x, shift_y = rng.uniform(-1, 1, 2) / diameter  # shapes lie between the pixels too
    x, y = samples[None, :] + shift_x, samples[:, None] + shift_y
    (a, b), (c, d) = _rotation(rng) @ np.diag([1, 1 / rng.uniform(0.75, 1)]) @ _rotation(rng)
    u, v = (a * x + b * y).astype(np.float32), (c * x + d * y).astype(np.float32)

    heights = level(u, v)
    first = _pick_color([ground], hue, rng)
    second = _pick_color([ground, first], None, rng)
    if surface == _ANY:
        surface = rng.choice([_PLAIN, _STRIPED, _TWO_TONE], p=[0.8, 0.1, 0.1])
    if surface == _STRIPED:
        width, phase = float(rng.uniform(2.2, 3.6) * np.pi), float(rng.uniform(0, 2 * np.pi))
        painted = _average(np.sin(u * width + phase) > 0, side)
    elif surface == _TWO_TONE:
        painted = _average(u > float(rng.uniform(-0.25, 0.25)), side)
    else:
        painted = np.zeros((side, side, 1), dtype=np.float32)
    paint = first + painted * (second - first)
    if rng.random() < 0.2:
        paint = paint * (1 - 0.55 * _average(heights > 0.86, side))  # a dark rim
    light = 1 + rng.uniform(-0.3, 0.3) * np.linspace(-1, 1, side)
    return paint * light.astype(np.float32)[:, None, None], _average(heights < 1, side)


def draw_ground(size: int, rng: np.random.Generator) -> np.ndarray:
    """A background: a gradient of two colours under coarse and fine texture, (size, size, 3) float32 in 0 to 255."""
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]
    base = rng.uniform(50, 205) + rng.uniform(-28, 28, 3)
    ground = base + along[..., None] * rng.uniform(-32, 32, 3)
    for cells, strength in ((4, 16), (12, 10), (40, 6)):
        texture = rng.normal(0, rng.uniform(0.2, 1) * strength, (cells, cells)).astype(np.float32)
        ground += cv2.resize(texture, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]
    if rng.random() < 0.35:
        across = np.cos(angle) * ramp[:, None] - np.sin(angle) * ramp[None, :]
        ground += rng.uniform(4, 14) * np.sin(across * rng.uniform(10, 45))[..., None]
    return ground.astype(np.float32)


def scribble(image: np.ndarray, strokes: int, rng: np.random.Generator) -> None:
    """Draws thin curved strokes onto an (H, W, 3) float32 image: edges that bound nothing."""
    size = len(image)
    for _ in range(strokes):
        start, middle, end = rng.uniform(-0.1, 1.1, (3, 2)) * size
        t = np.linspace(0, 1, 24)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        points = np.round(curve * 16).astype(np.int32)  # fixed point, four bits
        ink = np.zeros((size, size), dtype=np.uint8)  # cv2 smooths edges on 8 bits only
        cv2.polylines(ink, [points], False, 255, int(rng.integers(1, 3)), cv2.LINE_AA, 4)
        opacity = (ink * np.float32(rng.uniform(0.3, 0.8) / 255))[..., None]
        image += opacity * (rng.uniform(0, 255, 3).astype(np.float32) - image)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    cos, sin = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _pick_color(others: list[np.ndarray], hue: float | None, rng: np.random.Generator) -> np.ndarray:
    """A colour (3,) RGB in 0 to 255, of about this hue, that stands out from all the others."""
    if hue is None:
        candidates = rng.uniform(15, 240, (12, 3)).astype(np.float32)
    else:
        hues = (hue + rng.normal(0, _HUE_SPREAD, 12)) % 1 * 360
        colors = np.stack([hues, rng.uniform(0.35, 1, 12), rng.uniform(0.35, 1, 12)], axis=-1).astype(np.float32)
        candidates = cv2.cvtColor(colors[None], cv2.COLOR_HSV2RGB)[0] * 255
    contrast = np.min([np.linalg.norm(candidates - other, axis=1) for other in others], axis=0)
    enough = np.flatnonzero(contrast > _LEAST_CONTRAST)
    return candidates[enough[0] if len(enough) else contrast.argmax()]


def _average(samples: np.ndarray, side: int) -> np.ndarray:
    """From samples to pixels, (side, side, 1) float32; this smooths the edges."""
    return cv2.resize(samples.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)[..., None]
