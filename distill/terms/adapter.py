"""Adapters: what brings a student's features and its teacher's to the same channels."""

import torch
from torch import Tensor, nn


def build_adapter(kind: str, student_channels: int, teacher_channels: int, level: str) -> nn.Module:
    """An adapter of one pyramid level; called with the student's map, it gives one of the teacher's width.

    Args:
        kind: `conv1` and `conv3` are convolutions of that kernel size; `linear` is one layer for each token;
            `identity` holds the student at its width; `select` lets the teacher follow the student's cuts instead.
        student_channels: of the student's map.
        teacher_channels: of the teacher's.
        level: its name, for messages.

    Raises:
        ValueError: `identity` or `select` between unlike widths, or another kind.
    """
    if kind in ("conv1", "conv3"):
        kernel = int(kind[-1])
        return nn.Conv2d(student_channels, teacher_channels, kernel, padding=kernel // 2)
    if kind == "linear":
        return TokenLinear(student_channels, teacher_channels)
    if kind not in ("identity", "select"):
        raise ValueError(f"adapter: {kind!r} is not known; choose conv1, conv3, linear, identity or select")
    if student_channels != teacher_channels:
        when = "to start with equal widths" if kind == "select" else "equal widths"
        raise ValueError(
            f"adapter: {kind} needs {when}, but at {level} the student has {student_channels} channels and the teacher "
            f"{teacher_channels}; give student.channels the teacher's value, or choose conv1"
        )
    return ChannelSelection(student_channels)


class TokenLinear(nn.Linear):
    """A linear layer over the channels of tokens (B, N, C), or of a map (B, C, H, W) whose locations are the tokens.

    On a map it is what a 1x1 convolution is, to rounding; it is there for features that are no maps.
    """

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() == 3:
            return super().forward(features)
        return super().forward(features.movedim(1, -1)).movedim(-1, 1)


class ChannelSelection(nn.Module):
    """Leaves the student's map as it is and takes those of the teacher's channels that the student still has.

    Channel n of the one is compared with channel n of the other, as they were before any cut. Plans cut `kept` along
    with the student, as a tensor like any other; so the selection follows every cut, and comes back where they are
    replayed. With `output_layers` around it nothing is ever cut: then it is the identity.

    Attributes:
        kept: (C,) int64, the teacher's channel for each of the student's, ascending.
    """

    kept: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("kept", torch.arange(channels))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W), unchanged; but where nothing is computed, a tracer sees that `kept` has the same channels."""
        return features * self.kept[:, None, None] if features.is_meta else features

    def select(self, teacher: Tensor) -> Tensor:
        """(B, C_T, H, W) -> (B, C, H, W)."""
        return teacher if len(self.kept) == teacher.shape[1] else teacher.index_select(1, self.kept)
