"""Feature mimic: one level of the student's pyramid is pulled towards the teacher's.

A loss over the pyramid is the sum over its levels. Where the channels differ, an adapter maps the student's first.
"""

import torch.nn.functional as F
from torch import Tensor

from losses.channel_statistics import standardize
from losses.precision import at_least_float32
from losses.shape_check import require_feature_map, require_same_shape


def plain_mimic(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference (FitNets, Romero 2015, arXiv 1412.6550; there a sum, here normalised by the elements).

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W). Detached.

    Returns:
        The mean over all elements.

    Raises:
        ValueError: the shapes differ, or the maps are empty.
    """
    require_feature_map("plain_mimic", student)
    require_same_shape("plain_mimic(student, teacher)", student, teacher)
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher.detach()))


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """PKD: half the mean squared difference of the standardised maps (Cao 2022, arXiv 2207.02039).

    Each channel is standardised over the batch and all locations, z = (F - mean) / (std + 1e-6). With n = B*H*W values
    a channel and the unbiased std of the authors' code this is (n - 1) / n * (1 - Pearson correlation), averaged over
    channels, up to that epsilon; so the student's scale and offset in each channel are free. A channel of one single
    value has no pattern and counts 0, where the authors' code gives NaN.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W). Detached. The authors' code resizes the student where H and W differ; here that is an
            error.

    Returns:
        The mean over all elements, in [0, 2].

    Raises:
        ValueError: the shapes differ, or the maps are empty.
    """
    require_feature_map("pkd", student)
    require_same_shape("pkd(student, teacher)", student, teacher)
    return 0.5 * F.mse_loss(standardize(at_least_float32(student)), standardize(at_least_float32(teacher.detach())))
