"""Attention-guided and non-local distillation: differences count where either detector looks, and relations count too.

All distances are plain L2 norms over the whole batch, as published: they grow with its square root.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.fpn_attention import channel_attention, spatial_attention
from losses.precision import at_least_float32
from losses.shape_check import require_channels, require_same_locations, require_same_shape


def attention_guided(
    student: Tensor, adapted: Tensor, teacher: Tensor, temperature: float = 0.5, channel_mask: bool = False
) -> Tensor:
    """Feature distance where student or teacher pay attention (Zhang & Ma, ICLR 2021).

    sqrt(sum M (T - phi S)^2), M the mean of the student's and the teacher's `spatial_attention`; with `channel_mask`
    times the mean of their `channel_attention`. The paper has both masks. The published code applies the channel mask
    in one-stage detectors (there with temperature 0.1) and not in two-stage ones, whose settings are the defaults.

    Args:
        student: (B, C_S, H, W) before the adapter; only its attention is used. Detached.
        adapted: (B, C_T, H, W) the student's features behind the adapter.
        teacher: (B, C_T, H, W). Detached.
        temperature: of the attention; higher is more even.
        channel_mask: weight the channels too; C_S must be C_T.

    Returns:
        The norm over the whole batch. Where student and teacher agree it is 0, and so is its gradient.

    Raises:
        ValueError: shapes that must agree differ, the maps are empty, or the temperature is not above 0.
    """
    require_same_locations("attention_guided", student, teacher)
    require_same_shape("attention_guided(adapted, teacher)", adapted, teacher)
    student, teacher = at_least_float32(student.detach()), at_least_float32(teacher.detach())
    mask = (spatial_attention(student, temperature) + spatial_attention(teacher, temperature))[:, None] / 2
    if channel_mask:
        require_same_shape("attention_guided(student, teacher) with a channel mask", student, teacher)
        channels = (channel_attention(student, temperature) + channel_attention(teacher, temperature)) / 2
        mask = mask * channels[..., None, None]
    return torch.linalg.vector_norm(mask.sqrt() * (teacher - at_least_float32(adapted)))


class NonLocal(nn.Module):
    """A non-local block with dot-product affinities (Wang 2018, arXiv 1711.07971).

    F + BN(W (theta(F)^T phi(F) / n) g(F)), where phi and g are max-pooled to n locations. Without a softmax the
    product can be taken from the right: the affinities of all pairs of locations are never stored. The batch
    normalisation starts at zero, so that the block starts as the identity.

    Args:
        channels: of the map.
        hidden_channels: of theta, phi and g; half of `channels` if None.
        stride: what phi and g are pooled by, never beyond the map.
    """

    def __init__(self, channels: int, hidden_channels: int | None = None, stride: int = 2):
        super().__init__()
        hidden_channels = hidden_channels or max(1, channels // 2)
        self.stride = stride
        self.theta = nn.Conv2d(channels, hidden_channels, 1)
        self.phi = nn.Conv2d(channels, hidden_channels, 1)
        self.g = nn.Conv2d(channels, hidden_channels, 1)
        self.output = nn.Conv2d(hidden_channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        window = [min(self.stride, side) for side in features.shape[2:]]
        theta = self.theta(features)
        phi = F.max_pool2d(self.phi(features), window).flatten(2)
        g = F.max_pool2d(self.g(features), window).flatten(2)
        summary = g @ phi.transpose(1, 2) / phi.shape[2]  # (B, hidden, hidden)
        attended = (summary @ theta.flatten(2)).view_as(theta)
        return features + self.norm(self.output(attended))


class NonLocalRelation(nn.Module):
    """Distance of what two non-local blocks make of student and teacher (Zhang & Ma, ICLR 2021).

    ||NL_T(T) - phi NL_S(S)||_2. Both blocks and the 1x1 convolution phi learn.

    Args:
        student_channels: of the student's map.
        teacher_channels: of the teacher's map.
        hidden_channels: of both blocks; half of their map's if None. The authors take 64 on the two finest levels.
        stride: of both blocks. The authors take 8, 4, 2, 2, 2 from the finest level on.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, hidden_channels: int | None = None, stride: int = 2
    ):
        super().__init__()
        self.student_block = NonLocal(student_channels, hidden_channels, stride)
        self.teacher_block = NonLocal(teacher_channels, hidden_channels, stride)
        self.adapter = nn.Conv2d(student_channels, teacher_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one level.

        Args:
            student: (B, C_S, H, W); in training more than one value a channel, as for any batch normalisation.
            teacher: (B, C_T, H, W). Detached; the teacher's block learns all the same.

        Returns:
            The norm over the whole batch.

        Raises:
            ValueError: batch or spatial sizes differ, the maps are empty, or have other channels than this was built
                for.
        """
        require_same_locations("NonLocalRelation", student, teacher)
        require_channels("NonLocalRelation(student)", student, self.student_block.theta)
        require_channels("NonLocalRelation(teacher)", teacher, self.teacher_block.theta)
        with torch.autocast(student.device.type, enabled=False):
            student_relation = self.adapter(self.student_block(at_least_float32(student)))
            teacher_relation = self.teacher_block(at_least_float32(teacher.detach()))
        return torch.linalg.vector_norm(teacher_relation - student_relation)


class AttentionGuided(nn.Module):
    """Attention-guided and non-local distillation at one level (Zhang & Ma, ICLR 2021).

    mask_weight * attention_guided + pooled_weight * (||channel means||_2 + ||location means||_2) + relation_weight *
    NonLocalRelation, where || || is the distance of the teacher's means to an adapter of the student's. The
    adapters are the loss's own: it takes the student's map as it is. As published, in the order mask, pooled and
    relation weight, temperature, channel mask:

    - two-stage, the defaults: 7e-5, 4e-3, 7e-5, 0.5, no
    - one-stage: 4.2e-4, 2.4e-2, 4.2e-4, 0.1, yes

    Args:
        student_channels: of the student's map.
        teacher_channels: of the teacher's map.
        mask_weight: what the masked feature distance counts.
        pooled_weight: what the distance of each kind of means counts.
        relation_weight: what the distance of the relations counts.
        temperature: of the attention; higher is more even.
        channel_mask: weight channels as well as locations; the widths must be equal.
        hidden_channels: of the non-local blocks, see `NonLocalRelation`.
        stride: of the non-local blocks, see `NonLocalRelation`.

    Raises:
        ValueError: a channel mask for unlike widths.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        mask_weight: float = 7e-5,
        pooled_weight: float = 4e-3,
        relation_weight: float = 7e-5,
        temperature: float = 0.5,
        channel_mask: bool = False,
        hidden_channels: int | None = None,
        stride: int = 2,
    ):
        super().__init__()
        if channel_mask and student_channels != teacher_channels:
            raise ValueError(
                f"AttentionGuided: channel_mask compares channels one by one, but the student has {student_channels} "
                f"and the teacher {teacher_channels}; they must be equal, or channel_mask false"
            )
        self.mask_weight, self.pooled_weight, self.relation_weight = mask_weight, pooled_weight, relation_weight
        self.temperature, self.channel_mask = temperature, channel_mask
        self.feature_adapter = nn.Conv2d(student_channels, teacher_channels, 1)
        self.channel_adapter = nn.Linear(student_channels, teacher_channels)
        self.spatial_adapter = nn.Conv2d(1, 1, 3, padding=1)
        self.relation = NonLocalRelation(student_channels, teacher_channels, hidden_channels, stride)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one level.

        Args:
            student: (B, C_S, H, W); in training more than one value a channel, as for any batch normalisation.
            teacher: (B, C_T, H, W). Detached.

        Returns:
            The four terms, weighted and summed.

        Raises:
            ValueError: batch or spatial sizes differ, the maps are empty or have other channels than this was built
                for, or the temperature is not above 0.
        """
        require_same_locations("AttentionGuided", student, teacher)
        require_channels("AttentionGuided(student)", student, self.feature_adapter)
        require_channels("AttentionGuided(teacher)", teacher, self.relation.teacher_block.theta)
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        with torch.autocast(student.device.type, enabled=False):
            adapted = self.feature_adapter(student)
            channels = self.channel_adapter(student.mean(dim=(2, 3)))
            locations = self.spatial_adapter(student.mean(dim=1, keepdim=True))
        masked = attention_guided(student, adapted, teacher, self.temperature, self.channel_mask)
        pooled = torch.linalg.vector_norm(teacher.mean(dim=(2, 3)) - channels)
        pooled = pooled + torch.linalg.vector_norm(teacher.mean(dim=1, keepdim=True) - locations)
        relation = self.relation(student, teacher)
        return self.mask_weight * masked + self.pooled_weight * pooled + self.relation_weight * relation
