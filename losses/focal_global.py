"""FGD: what the teacher finds important on objects and around them, and how locations relate."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses.fpn_attention import channel_attention, fgd_attention, spatial_attention
from losses.precision import at_least_float32
from losses.region import fgd_masks
from losses.shape_check import (
    require_channels,
    require_feature_map,
    require_location_weights,
    require_same_shape,
)


def fgd_focal(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 0.5) -> Tensor:
    """FGD's feature loss in one region (Yang 2022, arXiv 2111.11837).

    sum M A^s A^c (T - S)^2 / B with the teacher's spatial and channel attention A. It is linear in the mask: the
    foreground and background terms are one call with alpha * foreground + beta * background of `fgd_masks`.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W). Detached.
        mask: (B, H, W) how much each location counts. Detached.
        temperature: of the attention; higher is more even.

    Returns:
        The sum over channels and locations, averaged over images.

    Raises:
        ValueError: the shapes differ, the maps are empty, `mask` is not one number a location, or the temperature is
            not above 0.
    """
    require_feature_map("fgd_focal", student)
    require_same_shape("fgd_focal(student, teacher)", student, teacher)
    require_location_weights("fgd_focal: mask", mask, student)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    spatial = at_least_float32(mask.detach()) * spatial_attention(teacher, temperature)
    squares = ((teacher - student).square() * spatial[:, None]).sum(dim=(2, 3))
    return (squares * channel_attention(teacher, temperature)).sum() / len(student)


class GlobalContext(nn.Module):
    """Adds to every location what the whole map says, GCNet's block (Cao 2019, arXiv 1904.11492).

    R(F) = F + W2 ReLU(LN(W1 sum_j softmax(W_k F)_j F_j)). Initialised as in FGD's code: W_k Kaiming normal, W2 zero,
    so that R starts as the identity.

    Args:
        channels: of the map; the context passes through half as many.

    Raises:
        ValueError: fewer than 2 channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels < 2:
            raise ValueError(f"GlobalContext: channels is {channels}; it must be at least 2, as half of it is used")
        self.attention = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in", nonlinearity="relu")
        for parameter in (self.attention.bias, self.transform[-1].weight, self.transform[-1].bias):
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        attention = self.attention(features).flatten(2).softmax(dim=2)  # (B, 1, H*W)
        context = features.flatten(2) @ attention.transpose(1, 2)  # (B, C, 1)
        return features + self.transform(context[..., None])


class FGDGlobal(nn.Module):
    """FGD's relation loss, ||R(T) - R(S)||^2 / B (Yang 2022, arXiv 2111.11837).

    Student and teacher each have a block R of their own, and both learn. They start as the identity: until the first
    step, the loss is the plain squared distance.

    Args:
        channels: of the teacher's map, and of the student's behind its adapter.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.student_context = GlobalContext(channels)
        self.teacher_context = GlobalContext(channels)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one level.

        Args:
            student: (B, C, H, W).
            teacher: (B, C, H, W). Detached; the teacher's block learns all the same.

        Returns:
            The sum over channels and locations, averaged over images.

        Raises:
            ValueError: the shapes differ, the maps are empty, or have other channels than this was built for.
        """
        require_feature_map("FGDGlobal", student)
        require_same_shape("FGDGlobal(student, teacher)", student, teacher)
        require_channels("FGDGlobal", student, self.student_context.attention)
        with torch.autocast(student.device.type, enabled=False):
            student_relation = self.student_context(at_least_float32(student))
            teacher_relation = self.teacher_context(at_least_float32(teacher.detach()))
        return (teacher_relation - student_relation).square().sum() / len(student)


class FGD(nn.Module):
    """Focal and global distillation at one level (Yang 2022, arXiv 2111.11837).

    fgd_focal under alpha * foreground + beta * background, + gamma * fgd_attention + lambda * FGDGlobal. As published,
    in the order alpha, beta, gamma, lambda, temperature:

    - anchor-free one-stage, the defaults: 1.6e-3, 8e-4, 8e-4, 8e-6, 0.8
    - anchor-based one-stage: 1e-3, 5e-4, 5e-4, 5e-6, 0.5
    - two-stage: 5e-5, 2.5e-5, 5e-5, 5e-7, 0.5

    Args:
        channels: of the teacher's map, and of the student's behind its adapter.
        alpha: what differences on objects count.
        beta: what differences off objects count.
        gamma: what differences in attention count.
        lambda_: what differences in relation count.
        temperature: of the attention; higher is more even.
    """

    def __init__(
        self,
        channels: int,
        alpha: float = 1.6e-3,
        beta: float = 8e-4,
        gamma: float = 8e-4,
        lambda_: float = 8e-6,
        temperature: float = 0.8,
    ):
        super().__init__()
        self.alpha, self.beta, self.gamma, self.lambda_ = alpha, beta, gamma, lambda_
        self.temperature = temperature
        self.relation = FGDGlobal(channels)

    def forward(self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], image_size: tuple[int, int]) -> Tensor:
        """The loss of one level.

        Args:
            student: (B, C, H, W).
            teacher: (B, C, H, W). Detached.
            boxes: (N_i, 4) xyxy in pixels for each image, the ground truth; N_i may be 0.
            image_size: height and width in pixels of what the maps show, padding included.

        Returns:
            The four terms, weighted and summed.

        Raises:
            ValueError: the shapes differ, the maps are empty or have other channels than this was built for, there is
                not one tensor (N, 4) of boxes an image, or the temperature is not above 0.
        """
        require_feature_map("FGD", student)
        require_channels("FGD", student, self.relation.student_context.attention)
        foreground, background = fgd_masks(boxes, image_size, tuple(student.shape[2:]))
        focal = fgd_focal(student, teacher, self.alpha * foreground + self.beta * background, self.temperature)
        attention = fgd_attention(student, teacher, self.temperature)
        return focal + self.gamma * attention + self.lambda_ * self.relation(student, teacher)
