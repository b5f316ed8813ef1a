"""Knowledge in the pyramid's attention: where, and in which channels, the teacher's features are strong."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distill.terms.base import FeatureTerm, Level, PyramidTerm, Targets, resize_like
from losses import AttentionGuided, attention_transfer, fgd_attention
from students import DenseOutput, Detector


class AttentionTransferTerm(PyramidTerm):
    """See `losses.attention_transfer`. Widths may differ, so there is nothing to adapt."""

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        pairs = zip(self.student_maps(student.features), self.teacher_maps(teacher.features))
        return sum(attention_transfer(x, resize_like(y, x)) for x, y in pairs)


class FGDAttentionTerm(FeatureTerm):
    """See `losses.fgd_attention`: the attention part of FGD by itself."""

    def level_loss(self, level: Level) -> Tensor:
        return fgd_attention(level.student, level.teacher, **self.settings)


class AttentionGuidedTerm(PyramidTerm):
    """See `losses.AttentionGuided`, which brings adapters of its own, one module for each two maps."""

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        match: Literal["levels", "fused"] = "levels",
        **settings: float | bool,
    ):
        super().__init__(student, teacher, levels, match)
        self.levels = nn.ModuleDict(
            {
                name: AttentionGuided(student.feature_channels[i], teacher.feature_channels[j], **settings)
                for name, (i, j) in zip(self.map_names, self.pairs)
            }
        )

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        pairs = zip(self.student_maps(student.features), self.teacher_maps(teacher.features))
        return sum(level(x, resize_like(y, x)) for level, (x, y) in zip(self.levels.values(), pairs))

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        maps = self.student_maps(features)
        return [y for level, x in zip(self.levels.values(), maps) for y in _outputs(level, x)]

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(layer for level in self.levels.values() for layer in _output_layers(level))


def _outputs(level: AttentionGuided, features: Tensor) -> list[Tensor]:
    """All that the student's channels run through. The matrix products of the non-local block mix locations, not
    channels; a tracer cannot know, so the block is shown without them."""
    block = level.relation.student_block
    hidden = [layer(features) for layer in (block.theta, block.phi, block.g)]
    attended = features + block.norm(block.output(torch.zeros_like(hidden[0])))
    pooled = level.channel_adapter(features.mean(dim=(2, 3)))
    return [level.feature_adapter(features), pooled, *hidden, level.relation.adapter(attended)]


def _output_layers(level: AttentionGuided) -> list[nn.Module]:
    block = level.relation.student_block
    hidden = [block.theta, block.phi, block.g]
    return [level.feature_adapter, level.channel_adapter, *hidden, level.relation.adapter]
