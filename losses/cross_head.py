"""CrossKD: the student's head features go on through the teacher's head, and its predictions there are compared.

Here is the step between the two heads. What comes out at the end of the teacher's head meets the teacher's own
predictions in `dense_sigmoid`, `localization_distillation` or `box_mimic`.
"""

from torch import Tensor

from losses.channel_statistics import channel_statistics, standardize
from losses.precision import at_least_float32
from losses.shape_check import require_feature_map, require_same_shape


def align_statistics(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """The student's map in the scale that the teacher's next layers expect (CrossKD, Wang 2024, arXiv 2306.11369).

    (F_S - mean_S) / (std_S + 1e-6) * std_T + mean_T for each channel, with means and unbiased deviations over the batch
    and all locations. Differentiable in the student, its statistics included. In the authors' code both maps are taken
    after a convolution and its normalisation, before the activation, which then follows. A channel of one single value
    becomes the teacher's mean, where that code gives NaN.

    Args:
        student_features: (B, C, H, W).
        teacher_features: the same shape. Detached.

    Returns:
        (B, C, H, W), not a loss.

    Raises:
        ValueError: the shapes differ, or the maps are empty.
    """
    require_feature_map("align_statistics", student_features)
    require_same_shape("align_statistics(student, teacher)", student_features, teacher_features)
    mean, deviation = channel_statistics(at_least_float32(teacher_features.detach()))
    return standardize(at_least_float32(student_features)) * deviation + mean
