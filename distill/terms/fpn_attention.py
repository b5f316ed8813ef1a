"""Knowledge in the pyramid's attention: where, and in which channels, the teacher's features are strong."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distill.terms.base import FeatureTerm, KnowledgeTerm, Level, Targets, resize_like
from losses import AttentionGuided, attention_transfer, fgd_attention, fuse_levels
from students import DenseOutput, Detector


class AttentionTransferTerm(KnowledgeTerm):
    """See `losses.attention_transfer`. Widths may differ, so there is nothing to adapt.

    Args:
        student: see `KnowledgeTerm`.
        teacher: likewise.
        levels: likewise.
        match: `levels` pairs level with level, `fused` the mean of all of them with that of the teacher's.
    """

    interpolates = True
    fields = ("features",)
    uses_head = False

    def __init__(
        self,
        student: Detector,
        teacher: Detector,
        levels: Sequence[str] | None = None,
        match: Literal["levels", "fused"] = "levels",
    ):
        super().__init__(student, teacher, levels)
        self.match = match

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        ours = [student.features[i] for i, _ in self.pairs]
        theirs = [teacher.features[j] for _, j in self.pairs]
        if self.match == "fused":
            once = dict.fromkeys(j for _, j in self.pairs)  # a level may be the nearest of two
            ours, theirs = [fuse_levels(ours)], [fuse_levels([teacher.features[j] for j in once])]
        return sum(attention_transfer(x, resize_like(y, x)) for x, y in zip(ours, theirs))


class FGDAttentionTerm(FeatureTerm):
    """See `losses.fgd_attention`: the attention part of FGD by itself."""

    def level_loss(self, level: Level) -> Tensor:
        return fgd_attention(level.student, level.teacher, **self.settings)


class AttentionGuidedTerm(KnowledgeTerm):
    """See `losses.AttentionGuided`, which brings adapters of its own, one module a level."""

    interpolates = True
    fields = ("features",)
    uses_head = False

    def __init__(
        self, student: Detector, teacher: Detector, levels: Sequence[str] | None = None, **settings: float | bool
    ):
        super().__init__(student, teacher, levels)
        self.levels = nn.ModuleDict(
            {
                name: AttentionGuided(student.feature_channels[i], teacher.feature_channels[j], **settings)
                for name, (i, j) in zip(self.level_names, self.pairs)
            }
        )

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, image_size: tuple[int, int]
    ) -> Tensor:
        return sum(
            level(student.features[i], resize_like(teacher.features[j], student.features[i]))
            for level, (i, j) in zip(self.levels.values(), self.pairs)
        )

    def traced(self, features: tuple[Tensor, ...]) -> list[Tensor]:
        return [x for level, (i, _) in zip(self.levels.values(), self.pairs) for x in _outputs(level, features[i])]

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
