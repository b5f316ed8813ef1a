"""Attention over the pyramid: where the teacher's features are strong, whatever they say there.

One level a call; a loss over the pyramid is the sum over its levels.
"""

import torch.nn.functional as F
from torch import Tensor

from losses.precision import at_least_float32
from losses.shape_check import require_feature_map


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Activation-based attention transfer (Zagoruyko & Komodakis 2017, arXiv 1612.03928).

    The attention a of an image is its map of channel-mean squares, flattened and divided by its L2 norm; the loss is
    mean (a_S - a_T)^2, as in the authors' code (the paper writes the norm of the difference). Channels need no adapter.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W). Detached.

    Returns:
        The mean over images and locations.

    Raises:
        ValueError: batch or spatial sizes differ, or the maps are empty.
    """
    for features in (student, teacher):
        require_feature_map("attention_transfer", features)
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"attention_transfer: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in "
            "batch, height and width; only the channels may differ"
        )
    return F.mse_loss(_attention(at_least_float32(student)), _attention(at_least_float32(teacher.detach())))


def _attention(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W), unit L2 norm an image."""
    return F.normalize(features.square().mean(dim=1).flatten(1), dim=1)
