"""Settings of the knowledge losses, a section a loss."""

from typing import Annotated, Literal, Union

from pydantic import AfterValidator, Field

from distill.schema.base import Count, NotNegative, Number, Positive, Section, Share


def _each_once(levels: list[str]) -> list[str]:
    if not levels:
        raise ValueError("found []; name some, such as [P3, P4], or leave it out for all that find a partner")
    if len({*levels}) < len(levels):
        raise ValueError(f"found [{', '.join(levels)}]; name each once")
    return levels


def _zero_or_smooth(beta: float) -> float:
    if 0 < beta < 1:
        raise ValueError(
            f"found {beta:g}; between 0 and 1 the gradient is infinite where student and teacher agree, so give 0, or "
            "1 or more"
        )
    return beta


Levels = Annotated[list[str], AfterValidator(_each_once)]


class ScheduleConfig(Section):
    """Settings of `distill.combiner.WeightSchedule`."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    final: Share = 0.0
    warmup_epochs: NotNegative = 0.0
    stop_epoch: Annotated[int, Field(ge=0, strict=True)] | None = None


class TermConfig(Section):
    """What every knowledge term has; the other settings of each are those of its class in `distill.terms`.

    What is null is as the loss's authors set it for the kind of detector that the student is, the weight too; see
    `distill.terms.published`. With balance: gradient, a weight is the share of the task's gradient, and 1 if left out.
    """

    teacher: str | None = None  # by name, where there are several
    weight: Annotated[NotNegative, Field(le=1e9)] | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    levels: Levels | None = None  # such as [P3, P4]; all that find a partner if null


class DenseSigmoidConfig(TermConfig):
    name: Literal["dense_sigmoid"]
    beta: Annotated[NotNegative, AfterValidator(_zero_or_smooth)] = 1.0
    temperature: Positive = 1.0


class BoxMimicConfig(TermConfig):
    name: Literal["box_mimic"]
    kind: Literal["giou", "smooth_l1"] = "giou"


class CrossKDConfig(TermConfig):
    name: Literal["cross_kd"]
    depth: Count | None = None
    class_weight: NotNegative = 1.0
    box_weight: NotNegative | None = None  # 1, or 4 where edges are distributions, if null


class LDConfig(TermConfig):
    name: Literal["ld"]
    temperature: Positive = 10.0
    region_weight: NotNegative = 1.0


class PseudoLabelConfig(TermConfig):
    name: Literal["pseudo_label"]
    score_threshold: Share = 0.3


class RoiKDConfig(TermConfig):
    name: Literal["roi_kd"]
    classes: Literal["kl", "dkd", "dist"] = "kl"
    boxes: Literal["bounded", "smooth_l1", "none"] = "bounded"
    temperature: Positive = 1.0
    alpha: NotNegative = 1.0
    beta: NotNegative = 0.25
    margin: Number = 0.0
    class_weight: NotNegative = 1.0
    box_weight: NotNegative = 0.5


class FeatureTermConfig(TermConfig):
    """A term over maps behind an adapter each."""

    adapter: Literal["conv1", "conv3", "linear", "identity", "select"] = "conv1"  # see distill.terms.adapter


class MimicConfig(FeatureTermConfig):
    name: Literal["plain_mimic", "pkd", "score_weighted_mimic"]


class MaskedMimicConfig(FeatureTermConfig):
    name: Literal["masked_mimic"]


class CWDConfig(FeatureTermConfig):
    name: Literal["cwd"]
    temperature: Positive = 1.0


class MGDConfig(FeatureTermConfig):
    name: Literal["mgd"]
    mask_ratio: Annotated[Number, Field(ge=0, lt=1)] | None = None


class FGDConfig(FeatureTermConfig):
    name: Literal["fgd"]
    alpha: NotNegative | None = None
    beta: NotNegative | None = None
    gamma: NotNegative | None = None
    lambda_: NotNegative | None = None
    temperature: Positive | None = None


class AttentionTransferConfig(TermConfig):
    name: Literal["attention_transfer"]
    match: Literal["levels", "fused"] = "levels"


class FGDAttentionConfig(FeatureTermConfig):
    name: Literal["fgd_attention"]
    match: Literal["levels", "fused"] = "levels"
    temperature: Positive = 0.5


class AttentionGuidedConfig(TermConfig):
    """Without the channel mask that goes with a temperature of 0.1 in the authors' one-stage detectors: it compares
    channels one by one, which unlike widths and cuts do not allow."""

    name: Literal["attention_guided"]
    match: Literal["levels", "fused"] = "levels"
    mask_weight: NotNegative | None = None
    pooled_weight: NotNegative | None = None
    relation_weight: NotNegative | None = None
    temperature: Positive = 0.5


# by the family that they belong to
LOSSES: dict[str, tuple[type[TermConfig], ...]] = {
    "soft labels": (DenseSigmoidConfig, BoxMimicConfig, LDConfig, CrossKDConfig, PseudoLabelConfig, RoiKDConfig),
    "feature mimic": (MimicConfig, MaskedMimicConfig, CWDConfig, MGDConfig, FGDConfig),
    "FPN attention": (AttentionTransferConfig, FGDAttentionConfig, AttentionGuidedConfig),
}
LossConfig = Annotated[
    Union[tuple(model for models in LOSSES.values() for model in models)],  # noqa: UP007
    Field(discriminator="name"),
]
