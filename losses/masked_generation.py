"""Masked generation: the student's map, with most of it hidden, must suffice to make the teacher's."""

import torch
from torch import Tensor, nn

from losses.precision import at_least_float32
from losses.shape_check import require_channels, require_feature_map, require_same_shape


class MGD(nn.Module):
    """Masked generative distillation at one level (Yang 2022, arXiv 2205.01529).

    ||G(S * M) - T||^2 / B: M hides random locations in all channels at once, G is a 3x3 convolution, ReLU and another
    one. A fresh M is drawn every call, from PyTorch's generator of the student's device; so on a CPU a seeded run
    draws the authors' masks. G only serves training and learns with the student, so equal maps alone are not 0.

    A sum over channels and locations: the authors weight it by 2e-5 with `mask_ratio` 0.65 (one-stage detectors),
    5e-7 with 0.45 (two-stage).

    Args:
        channels: of the teacher's map, and of the student's behind its adapter.
        mask_ratio: the paper's lambda, the share of locations hidden.

    Raises:
        ValueError: `mask_ratio` is outside [0, 1).
    """

    def __init__(self, channels: int, mask_ratio: float = 0.65):
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"MGD: mask_ratio is {mask_ratio}; it must be at least 0 and below 1")
        self.mask_ratio = mask_ratio
        self.generation = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one level.

        Args:
            student: (B, C, H, W).
            teacher: (B, C, H, W). Detached.

        Returns:
            The sum over channels and locations, averaged over images.

        Raises:
            ValueError: the shapes differ, the maps are empty, or have other channels than this was built for.
        """
        require_feature_map("MGD", student)
        require_same_shape("MGD(student, teacher)", student, teacher)
        require_channels("MGD", student, self.generation[0])
        batch, _, height, width = student.shape
        draw = torch.rand(batch, 1, height, width, device=student.device, dtype=torch.float32)
        visible = draw <= 1 - self.mask_ratio
        with torch.autocast(student.device.type, enabled=False):
            generated = self.generation(at_least_float32(student) * visible)
        return (generated - at_least_float32(teacher.detach())).square().sum() / batch
