"""Feature mimic: one level of the student's pyramid is pulled towards the teacher's.

A loss over the pyramid is the sum over its levels. Where the channels differ, an adapter maps the student's first.
"""

import torch.nn.functional as F
from torch import Tensor

from losses.channel_statistics import standardize
from losses.kl_divergence import softened_kl
from losses.normalizer import weighted_mean
from losses.precision import at_least_float32
from losses.shape_check import require_feature_map, require_location_weights, require_same_shape


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


def score_weighted_mimic(student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
    """Mimic where the teacher is sure of an object, in the spirit of the feature-richness score (Du 2021, 2111.00674).

    sum w (S - T)^2 / (C sum w). Both sums run over the whole batch: a location counts what its score says, whichever
    image it is in, and an image without objects counts little. Between processes sum w is averaged, so that many
    learn what one would. It is at least 1e-6.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W). Detached.
        scores: (B, H, W) the teacher's highest class probability. Detached.

    Returns:
        The weighted mean over all elements; `plain_mimic` where all scores are equal, 0 where all are 0.

    Raises:
        ValueError: the shapes differ, the maps are empty, or `scores` is not one number a location.
    """
    squares = _squared_distances("score_weighted_mimic", student, teacher, scores)
    return weighted_mean(squares / student.shape[1], scores)


def masked_mimic(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mimic of the foreground alone (fine-grained feature imitation, Wang 2019, arXiv 1906.03609).

    sum M (S - T)^2 / (2 sum M), summed over channels and over the whole batch. Between processes sum M is averaged,
    so that many learn what one would. The mask is the caller's: the authors mark locations whose anchors overlap an
    object, `foreground_mask` those inside one. Their weight is 0.01.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W). Detached.
        mask: (B, H, W) 1 or True on objects, 0 elsewhere. Detached.

    Returns:
        Half the squared distance of two feature vectors, averaged over the masked locations; 0 where there are none.

    Raises:
        ValueError: the shapes differ, the maps are empty, or `mask` is not one number a location.
    """
    squares = _squared_distances("masked_mimic", student, teacher, mask)
    return weighted_mean(squares / 2, mask)


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation: where each channel looks, not how strongly (Shu 2021, arXiv 2011.13256).

    With p = softmax over the H*W locations of F / temperature, one distribution an image and channel:
    temperature^2 * KL(p_T || p_S), averaged over images and channels. Detectors weight it by 1 to 10 a level.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W). Detached.
        temperature: above 1 softens the peaks.

    Returns:
        The mean over images and channels; 0 for maps of one location.

    Raises:
        ValueError: the shapes differ, the maps are empty, or the temperature is not above 0.
    """
    require_feature_map("cwd", student)
    require_same_shape("cwd(student, teacher)", student, teacher)
    return softened_kl(student.flatten(2), teacher.flatten(2), temperature).mean()


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


def _squared_distances(name: str, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """(B, H, W) squared distance of the two feature vectors at each location, once the shapes are known to fit."""
    require_feature_map(name, student)
    require_same_shape(f"{name}(student, teacher)", student, teacher)
    require_location_weights(f"{name}: weights", weights, student)
    return (at_least_float32(student) - at_least_float32(teacher.detach())).square().sum(dim=1)
