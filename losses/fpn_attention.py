"""Attention over the pyramid: where the teacher's features are strong, whatever they say there.

One level a call; a loss over the pyramid is the sum over its levels, or one call on what `fuse_levels` makes of them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.precision import at_least_float32
from losses.shape_check import require_feature_map, require_same_locations, require_same_shape
from losses.temperature import soften


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
    require_same_locations("attention_transfer", student, teacher)
    return F.mse_loss(_attention(at_least_float32(student)), _attention(at_least_float32(teacher.detach())))


def fgd_attention(student: Tensor, teacher: Tensor, temperature: float = 0.5) -> Tensor:
    """FGD's attention loss: look at the same locations and channels (Yang 2022, arXiv 2111.11837).

    (|A^s_T - A^s_S|_1 + |A^c_T - A^c_S|_1) / B with `spatial_attention` A^s and `channel_attention` A^c.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W). Detached.
        temperature: of the attention; higher is more even.

    Returns:
        The sum over locations and channels, averaged over images; below 2 (H*W + C).

    Raises:
        ValueError: the shapes differ, the maps are empty, or the temperature is not above 0.
    """
    require_feature_map("fgd_attention", student)
    require_same_shape("fgd_attention(student, teacher)", student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    spatial = spatial_attention(teacher, temperature) - spatial_attention(student, temperature)
    channel = channel_attention(teacher, temperature) - channel_attention(student, temperature)
    return (spatial.abs().sum() + channel.abs().sum()) / len(student)


def spatial_attention(features: Tensor, temperature: float) -> Tensor:
    """H W softmax(mean_c |F| / temperature) over an image's locations: (B, C, H, W) -> (B, H, W), mean 1 an image."""
    strength = features.abs().mean(dim=1)
    return strength[0].numel() * soften(strength.flatten(1), temperature).softmax(dim=1).view_as(strength)


def channel_attention(features: Tensor, temperature: float) -> Tensor:
    """C softmax(mean_hw |F| / temperature) over an image's channels: (B, C, H, W) -> (B, C), mean 1 an image."""
    strength = features.abs().mean(dim=(2, 3))
    return strength.shape[1] * soften(strength, temperature).softmax(dim=1)


def fuse_levels(features: Sequence[Tensor]) -> Tensor:
    """The mean of all levels at the size of the middle one (balanced features, Pang 2019, arXiv 1904.02701).

    Finer levels are max-pooled and coarser ones repeated (nearest), as in the authors' code, which also gathers at the
    third of five levels. An attention loss of two fused pyramids leaves open which level says what.

    Args:
        features: (B, C, H_i, W_i) a level, fine to coarse. Not detached.

    Returns:
        (B, C, H, W) of level `len(features) // 2`, in float32.

    Raises:
        ValueError: no levels, an empty one, or levels that differ in batch or channels.
    """
    if not features:
        raise ValueError("fuse_levels: there are no levels; there must be at least one")
    middle = len(features) // 2
    for level in features:
        require_feature_map("fuse_levels", level)
        if level.shape[:2] != features[middle].shape[:2]:
            raise ValueError(
                f"fuse_levels: levels {tuple(level.shape)} and {tuple(features[middle].shape)} must agree in batch and "
                "channels"
            )
    levels, size = [at_least_float32(level) for level in features], features[middle].shape[2:]
    finer = [F.adaptive_max_pool2d(level, size) for level in levels[:middle]]
    coarser = [F.interpolate(level, size, mode="nearest") for level in levels[middle + 1 :]]
    return torch.stack([*finer, levels[middle], *coarser]).mean(dim=0)


def _attention(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W), unit L2 norm an image."""
    return F.normalize(features.square().mean(dim=1).flatten(1), dim=1)
