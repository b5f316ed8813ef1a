"""Knowledge terms: what a run's `losses` section is made of, one class a loss."""

from distill.terms.base import (
    FeatureTerm,
    KnowledgeTerm,
    Level,
    decoded,
    describe_pairs,
    level_name,
    match_levels,
)
from distill.terms.cross_head import CrossKDTerm
from distill.terms.feature_mimic import (
    CWDTerm,
    FGDTerm,
    MaskedMimicTerm,
    MGDTerm,
    PKDTerm,
    PlainMimicTerm,
    ScoreWeightedMimicTerm,
)
from distill.terms.fpn_attention import AttentionGuidedTerm, AttentionTransferTerm, FGDAttentionTerm
from distill.terms.localization import LDTerm
from distill.terms.pseudo_label import PseudoLabelTerm
from distill.terms.roi_head import RoiKDTerm
from distill.terms.soft_label import BoxMimicTerm, DenseSigmoidTerm

__all__ = [
    "TERMS",
    "AttentionGuidedTerm",
    "AttentionTransferTerm",
    "BoxMimicTerm",
    "CWDTerm",
    "CrossKDTerm",
    "DenseSigmoidTerm",
    "FGDAttentionTerm",
    "FGDTerm",
    "FeatureTerm",
    "KnowledgeTerm",
    "LDTerm",
    "Level",
    "MGDTerm",
    "MaskedMimicTerm",
    "PKDTerm",
    "PlainMimicTerm",
    "PseudoLabelTerm",
    "RoiKDTerm",
    "ScoreWeightedMimicTerm",
    "decoded",
    "describe_pairs",
    "level_name",
    "match_levels",
]

# by the name that a config gives them
TERMS: dict[str, type[KnowledgeTerm]] = {
    "dense_sigmoid": DenseSigmoidTerm,
    "box_mimic": BoxMimicTerm,
    "ld": LDTerm,
    "cross_kd": CrossKDTerm,
    "pseudo_label": PseudoLabelTerm,
    "roi_kd": RoiKDTerm,
    "plain_mimic": PlainMimicTerm,
    "pkd": PKDTerm,
    "score_weighted_mimic": ScoreWeightedMimicTerm,
    "masked_mimic": MaskedMimicTerm,
    "cwd": CWDTerm,
    "mgd": MGDTerm,
    "fgd": FGDTerm,
    "attention_transfer": AttentionTransferTerm,
    "fgd_attention": FGDAttentionTerm,
    "attention_guided": AttentionGuidedTerm,
}
