"""The cells of a pyramid as one list: level after level, row after row, the anchors of a cell together."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def grid_locations(
    shapes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Centres (N, 2) of all cells, x and y in pixels, and their strides (N,), level after level, row after row."""
    # what is made while a graph is traced belongs to the trace; kept, it would spoil later calls
    locate = _grid_locations.__wrapped__ if torch.compiler.is_compiling() else _grid_locations
    return locate(shapes, strides, device, torch.get_default_dtype())


@lru_cache(maxsize=16)
def _grid_locations(
    shapes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    points, steps = [], []
    with torch.inference_mode(False):  # a cached tensor made in inference mode could not be used in training
        for (height, width), stride in zip(shapes, strides):
            y, x = torch.meshgrid(
                torch.arange(height, device=device, dtype=dtype),
                torch.arange(width, device=device, dtype=dtype),
                indexing="ij",
            )
            points.append((torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5) * stride)
            steps.append(torch.full((height * width,), stride, device=device, dtype=dtype))
        return torch.cat(points), torch.cat(steps)


def map_shapes(levels: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """Height and width of each level's map (B, C, H, W)."""
    return tuple((level.shape[-2], level.shape[-1]) for level in levels)


def flatten_levels(levels: Sequence[Tensor], anchors: int = 1) -> Tensor:
    """(B, A*C, H, W) of each level to one (B, N, C), in the order of `grid_locations`, the anchors of one together."""
    return torch.cat([x.unflatten(1, (anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels], dim=1)


def to_boxes(distances: Tensor, locations: Tensor, strides: Tensor) -> Tensor:
    """Boxes (B, N, 4) xyxy in pixels, from edge distances (B, N, 4) in strides."""
    pixels = distances * strides[:, None]
    return torch.cat((locations - pixels[..., :2], locations + pixels[..., 2:]), dim=-1)


def to_distances(boxes: Tensor, locations: Tensor, strides: Tensor) -> Tensor:
    """Edge distances (B, N, 4) in strides, from boxes (B, N, 4) xyxy in pixels."""
    return torch.cat((locations - boxes[..., :2], boxes[..., 2:] - locations), dim=-1) / strides[:, None]


def square_anchors(locations: Tensor, strides: Tensor, size: float = 8.0) -> Tensor:
    """(N, 4) xyxy squares, `size` strides across, around the locations (N, 2); at 8, those of ATSS."""
    half = strides[:, None] * size / 2
    return torch.cat((locations - half, locations + half), dim=-1)
