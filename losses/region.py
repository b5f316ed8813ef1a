"""Boxes on the grid of a pyramid level: which locations hold objects, and how much each of them counts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losses.precision import at_least_float32


def foreground_mask(boxes: Sequence[Tensor], image_size: tuple[int, int], feature_size: tuple[int, int]) -> Tensor:
    """Marks the locations that some box covers, by the rule of `fgd_masks`.

    Args:
        boxes: (N_i, 4) xyxy in pixels for each image, N_i may be 0.
        image_size: height and width in pixels of what the feature map shows, padding included.
        feature_size: H and W of the level.

    Returns:
        (B, H, W) float32, 1 inside boxes and 0 elsewhere.

    Raises:
        ValueError: no images, or boxes that are not (N, 4).
    """
    covered, _ = _cover(boxes, image_size, feature_size)
    return covered.any(dim=1).float()


def fgd_masks(
    boxes: Sequence[Tensor], image_size: tuple[int, int], feature_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Foreground and background weights of FGD (Yang 2022, arXiv 2111.11837): every object counts the same.

    A box covers columns floor(x1) to ceil(x2) and rows floor(y1) to ceil(y2) of the level, both ends included, as in
    the authors' code. A location weighs 1 / (h w) of the smallest box that covers it, where h and w count these rows
    and columns, also any beyond the map; the background of an image weighs 1 in all. A box that starts left of the
    image or above it is cut at the border; in the authors' code its negative index wraps around.

    Args:
        boxes: (N_i, 4) xyxy in pixels for each image, N_i may be 0.
        image_size: height and width in pixels of what the feature map shows, padding included. The authors pass
            each image's size before padding, which shifts the boxes of padded images.
        feature_size: H and W of the level.

    Returns:
        The foreground weights and the background weights, each (B, H, W) float32; where one is positive the other
        is 0.

    Raises:
        ValueError: no images, or boxes that are not (N, 4).
    """
    covered, weight = _cover(boxes, image_size, feature_size)
    foreground = torch.where(covered, weight[..., None, None], 0).amax(dim=1)
    background = (foreground == 0).to(foreground.dtype)
    return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _cover(
    boxes: Sequence[Tensor], image_size: tuple[int, int], feature_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Whether each box covers each location, (B, N, H, W), and 1 / (h w) of each box, (B, N).

    N is the most boxes of an image, plus one. Boxes that only fill up are NaN: they cover nothing, and there is always
    one, so that even images without boxes have something to reduce over.
    """
    if not len(boxes):
        raise ValueError("boxes: no images; there must be one tensor (N, 4) an image, empty for one without objects")
    for image, its_boxes in enumerate(boxes):
        if its_boxes.dim() != 2 or its_boxes.shape[1] != 4:
            raise ValueError(f"boxes: image {image}'s have shape {tuple(its_boxes.shape)}; they must be (N, 4), xyxy")
    padded = pad_sequence([at_least_float32(x) for x in boxes], batch_first=True, padding_value=torch.nan)
    padded = F.pad(padded, (0, 0, 0, 1), value=torch.nan)
    (image_height, image_width), (height, width) = image_size, feature_size
    x1, y1, x2, y2 = padded.unbind(dim=-1)
    left, right = (x1 / image_width * width).floor(), (x2 / image_width * width).ceil()
    top, bottom = (y1 / image_height * height).floor(), (y2 / image_height * height).ceil()
    columns = torch.arange(width, device=padded.device)
    rows = torch.arange(height, device=padded.device)
    in_columns = (columns >= left[..., None]) & (columns <= right[..., None])
    in_rows = (rows >= top[..., None]) & (rows <= bottom[..., None])
    weight = 1 / (bottom + 1 - top) / (right + 1 - left)
    return in_rows[..., :, None] & in_columns[..., None, :], weight
