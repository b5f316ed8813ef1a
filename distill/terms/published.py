"""What each loss's authors set, for the kind of detector that learns; it counts where a config leaves it out.

A loss that is not listed weighs 1. So does `ld`: its authors' 0.25 (arXiv 2102.12252) is for a sum over locations, and
ours is a mean; and `attention_transfer`, whose 1000 (1612.03928) is for classifiers.
"""

from students import Detector, TwoStageDetector

ANY, ANCHOR_BASED, TWO_STAGE = "any", "anchor-based", "two-stage"

# by loss and kind of detector: `weight`, and settings of the term by their names
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "pkd": {ANY: {"weight": 6.0}, ANCHOR_BASED: {"weight": 10.0}},  # Cao 2022, arXiv 2207.02039
    "masked_mimic": {ANY: {"weight": 0.01}},  # Wang 2019, 1906.03609
    "cwd": {ANY: {"weight": 10.0}},  # Shu 2021, 2011.13256
    "mgd": {  # Yang 2022, 2205.01529
        ANY: {"weight": 2e-5, "mask_ratio": 0.65},
        TWO_STAGE: {"weight": 5e-7, "mask_ratio": 0.45},
    },
    "fgd": {  # Yang 2022, 2111.11837
        ANY: {"alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_": 8e-6, "temperature": 0.8},
        ANCHOR_BASED: {"alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4, "lambda_": 5e-6, "temperature": 0.5},
        TWO_STAGE: {"alpha": 5e-5, "beta": 2.5e-5, "gamma": 5e-5, "lambda_": 5e-7, "temperature": 0.5},
    },
    "fgd_attention": {ANY: {"weight": 8e-4}, ANCHOR_BASED: {"weight": 5e-4}, TWO_STAGE: {"weight": 5e-5}},  # its gamma
    "attention_guided": {  # Zhang & Ma, ICLR 2021
        ANY: {"mask_weight": 4.2e-4, "pooled_weight": 2.4e-2, "relation_weight": 4.2e-4},
        TWO_STAGE: {"mask_weight": 7e-5, "pooled_weight": 4e-3, "relation_weight": 7e-5},
    },
}


def published(loss: str, student: Detector) -> dict[str, float]:
    """The `weight` of a loss, by the name that a config gives it, and those of its settings that go by the student.

    A detector is two-stage, else anchor-free where it makes one prediction at each location, else anchor-based.
    """
    one_stage = ANY if student.anchors == 1 else ANCHOR_BASED
    kind = TWO_STAGE if isinstance(student, TwoStageDetector) else one_stage
    settings = PUBLISHED.get(loss, {})
    return {"weight": 1.0} | settings.get(ANY, {}) | settings.get(kind, {})
