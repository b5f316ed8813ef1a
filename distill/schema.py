"""Every setting of a run, checked by pydantic."""

from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"found {value}; a number is needed")
    return value


# words such as 1e-3, which YAML does not take for a number, pass; bools and infinity, which are never meant, do not
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1, strict=True)]
Pixels = Annotated[int, Field(ge=32, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenseConfig(Section):
    """Settings of `students.dense.DenseDetector`."""

    name: Literal["dense"]
    backbone: str
    weights: str = "none"
    neck: Literal["fpn", "pan"] = "fpn"
    channels: Count = 96
    levels: list[int] = [3, 4, 5]
    head_depth: Count = 2


class TorchvisionConfig(Section):
    """What all of torchvision's detectors have; null leaves a choice to torchvision."""

    weights: str = "none"
    trainable_layers: Annotated[int, Field(ge=0, strict=True)] | None = (
        None  # stages of the backbone, from the coarsest
    )
    new_head: bool = False  # start the class layers anew, whatever the weights know


class FCOSConfig(TorchvisionConfig):
    name: Literal["fcos"]
    backbone: str = "resnet50"
    channels: Count = 256
    head_depth: Count = 4
    norm: Literal["batch", "frozen"] | None = None  # of the backbone


class RetinaNetConfig(TorchvisionConfig):
    name: Literal["retinanet"]
    backbone: str = "resnet50"
    version: Literal[1, 2] = 1
    channels: Count = 256
    norm: Literal["batch", "frozen"] | None = None  # of the backbone


class FasterRCNNConfig(TorchvisionConfig):
    """mask_rcnn is the same, from Mask R-CNN's checkpoints and without the masks."""

    name: Literal["faster_rcnn", "mask_rcnn"]
    backbone: str = "resnet50"
    version: Literal[1, 2] = 1
    channels: Count = 256
    norm: Literal["batch", "frozen"] | None = None  # of the backbone


class SSDConfig(TorchvisionConfig):
    name: Literal["ssd300", "ssdlite320"]


def _dense_by_default(value: Any) -> Any:
    return {"name": "dense", **value} if isinstance(value, dict) else value


DETECTORS: tuple[type[Section], ...] = (DenseConfig, FCOSConfig, RetinaNetConfig, FasterRCNNConfig, SSDConfig)
DetectorConfig = Annotated[
    Union[DETECTORS],  # noqa: UP007
    Field(discriminator="name"),
    BeforeValidator(_dense_by_default),
]


class AugmentConfig(Section):
    """Training-time augmentation; probabilities are per image, strengths are those of albumentations' ColorJitter."""

    horizontal_flip: Share = 0.5
    vertical_flip: Share = 0.0
    crop: Share = 0.0
    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    zoom_out: Share = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Share = 0.0


class SyntheticConfig(Section):
    """Drawn scenes, written to `data.root` on first use."""

    train: Count = 400
    val: Count = 100
    size: Annotated[int, Field(ge=42)] = 160
    seed: Seed = 0


class DataConfig(Section):
    root: str
    train: str = "train"
    val: str = "val"
    test: str | None = None
    image_size: tuple[Pixels, Pixels]
    resize: Literal["letterbox", "stretch"] = "letterbox"
    classes: list[str] | None = None
    class_map: dict[str, str | None] = {}
    unreadable: Literal["error", "skip"] = "error"
    batch_size: Count = 8
    workers: Annotated[int, Field(ge=0, strict=True)] = 2
    augment: AugmentConfig = AugmentConfig()
    synthetic: SyntheticConfig | None = None

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) != 2:
            raise ValueError(f"found {value}; give [height, width] in pixels, or one number for a square")
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


class OptimizerConfig(Section):
    """AdamW, with a linear warm-up and a cosine down to `final` of the rate; a short warm-up again after each cut."""

    lr: Positive = 1e-3
    backbone_lr: Positive = 1.0  # as a share of lr
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 1.0
    final: Share = 0.02
    clip_norm: Positive | None = 10.0
    ema: Share = 0.998  # decay of the averaged copy that is evaluated and kept; 0 keeps the last weights


class ScheduleConfig(Section):
    """Settings of `distill.combiner.WeightSchedule`."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    final: Share = 0.0
    warmup_epochs: NotNegative = 0.0
    stop_epoch: Annotated[int, Field(ge=0, strict=True)] | None = None


class TermConfig(Section):
    """What every knowledge term has; the other settings of each are those of its class in `distill.terms`.

    A weight that is left out is 1, or where the loss is a sum over locations what its authors give it. With balance:
    gradient, a weight is the share of the task's gradient, and 1 if left out.
    """

    published_weight: ClassVar[float] = 1.0

    weight: NotNegative | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    levels: list[str] | None = None  # such as [P3, P4]; all that student and teacher share if null


class DenseSigmoidConfig(TermConfig):
    name: Literal["dense_sigmoid"]
    beta: NotNegative = 1.0
    temperature: Positive = 1.0


class BoxMimicConfig(TermConfig):
    name: Literal["box_mimic"]
    kind: Literal["giou", "smooth_l1"] = "giou"


class CrossKDConfig(TermConfig):
    name: Literal["cross_kd"]
    depth: Count | None = None
    class_weight: NotNegative = 1.0
    box_weight: NotNegative = 1.0


class PseudoLabelConfig(TermConfig):
    name: Literal["pseudo_label"]
    score_threshold: Share = 0.3


class RoiKDConfig(TermConfig):
    name: Literal["roi_kd"]
    classes: Literal["kl", "dkd"] = "kl"
    boxes: Literal["bounded", "smooth_l1", "none"] = "bounded"
    temperature: Positive = 1.0
    alpha: NotNegative = 1.0
    beta: NotNegative = 0.25
    margin: Number = 0.0
    class_weight: NotNegative = 1.0
    box_weight: NotNegative = 0.5


class FeatureTermConfig(TermConfig):
    """A term over maps behind an adapter each."""

    kernel: Literal[1, 3] = 1  # of the adapter


class MimicConfig(FeatureTermConfig):
    name: Literal["plain_mimic", "pkd", "score_weighted_mimic"]


class MaskedMimicConfig(FeatureTermConfig):
    published_weight = 0.01

    name: Literal["masked_mimic"]


class CWDConfig(FeatureTermConfig):
    name: Literal["cwd"]
    temperature: Positive = 1.0


class MGDConfig(FeatureTermConfig):
    published_weight = 2e-5

    name: Literal["mgd"]
    mask_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.65


class FGDConfig(FeatureTermConfig):
    """The defaults are the authors' for anchor-free one-stage detectors."""

    name: Literal["fgd"]
    alpha: NotNegative = 1.6e-3
    beta: NotNegative = 8e-4
    gamma: NotNegative = 8e-4
    lambda_: NotNegative = 8e-6
    temperature: Positive = 0.8


class AttentionTransferConfig(TermConfig):
    name: Literal["attention_transfer"]
    match: Literal["levels", "fused"] = "levels"


class FGDAttentionConfig(FeatureTermConfig):
    published_weight = 8e-4

    name: Literal["fgd_attention"]
    temperature: Positive = 0.5


class AttentionGuidedConfig(TermConfig):
    """The defaults are the authors' for two-stage detectors."""

    name: Literal["attention_guided"]
    mask_weight: NotNegative = 7e-5
    pooled_weight: NotNegative = 4e-3
    relation_weight: NotNegative = 7e-5
    temperature: Positive = 0.5


# by the family that they belong to
LOSSES: dict[str, tuple[type[TermConfig], ...]] = {
    "soft labels": (DenseSigmoidConfig, BoxMimicConfig, CrossKDConfig, PseudoLabelConfig, RoiKDConfig),
    "feature mimic": (MimicConfig, MaskedMimicConfig, CWDConfig, MGDConfig, FGDConfig),
    "FPN attention": (AttentionTransferConfig, FGDAttentionConfig, AttentionGuidedConfig),
}
LossConfig = Annotated[
    Union[tuple(model for models in LOSSES.values() for model in models)],  # noqa: UP007
    Field(discriminator="name"),
]


class PruningConfig(Section):
    """Channels are cut at the start of the epochs `start` to `end`, `every` so many."""

    target: Annotated[Number, Field(gt=0, lt=1)]  # MACs left at the end, as a share of the uncut student's
    start: Annotated[int, Field(ge=0, strict=True)]
    end: Annotated[int, Field(ge=0, strict=True)]
    every: Count = 1
    schedule: Literal["cubic", "linear", "exponential"] = "cubic"  # how much each of the cuts takes
    importance: Literal["group_l1", "group_l2", "fpgm", "bn_scale", "lamp", "taylor", "random"] = "group_l1"
    ranking: Literal["uniform", "global"] = "uniform"  # the same share of every group, or the weakest channels anywhere
    per_macs: bool = False  # with global ranking: the weakest for what they cost
    floor: Share = 0.0  # what every group keeps of its width
    round_to: Count = 8
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 20
    evaluate: bool = False  # AP right after each cut, before any training

    @model_validator(mode="after")
    def _ordered(self) -> "PruningConfig":
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) lies before start ({self.start}); cuts go from start to end")
        if self.per_macs and self.ranking == "uniform":
            raise ValueError("per_macs changes nothing where every group loses the same share; say ranking: global")
        return self


class GuardConfig(Section):
    """What is watched while a teacher teaches; see `distill.guards`."""

    every: Count = 5  # epochs between looks at the terms' gradients and at the teacher, the first one at the start
    dominates: Positive = 100.0  # how many times the task's gradient a term's may be
    dominating_term: Literal["warn", "stop"] = (
        "warn"  # where it is more; at first it may be, as the task's is still flat
    )
    bad_term: Literal["stop", "skip"] = "stop"  # where a term is no number


class TrainConfig(Section):
    """How long, and with which optimizer."""

    epochs: Count = 12
    optimizer: OptimizerConfig = OptimizerConfig()


class TeacherConfig(Section):
    """A detector folder (`path`), or a detector to train first (`detector` and `train`); a given path wins."""

    path: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    detector: DetectorConfig | None = None
    train: TrainConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherConfig":
        if self.path is None and (self.detector is None or self.train is None):
            raise ValueError(
                "give path, the folder of a trained detector, or both detector and train to train it first"
            )
        return self


RESERVED = ("epoch", "task", "macs", "lr", "seconds", "macs_left", "teacher_share", "epoch_time", "time_left")


class Config(Section):
    output_dir: str
    overwrite: bool = False
    seed: Seed = 0
    data: DataConfig
    student: DetectorConfig
    teacher: TeacherConfig | None = None
    inherit: list[str] = []  # parts that the student starts with from the teacher, such as [neck, head]
    losses: dict[str, LossConfig] = {}
    balance: Literal["none", "gradient"] = "none"  # how the losses' weights are meant, see distill.combiner
    guards: GuardConfig = GuardConfig()
    pruning: PruningConfig | None = None
    train: TrainConfig = TrainConfig()

    def weight_of(self, name: str) -> float:
        """The weight of a knowledge term, given or not."""
        loss = self.losses[name]
        if loss.weight is not None:
            return loss.weight
        return 1.0 if self.balance == "gradient" else loss.published_weight

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        taken = [name for name in self.losses if name in RESERVED or name.startswith("ap")]
        if taken:
            raise ValueError(f"losses.{taken[0]}: a column of results.csv has this name already; give it another")
        if self.losses and self.teacher is None:
            raise ValueError("losses are given but no teacher; add a teacher section, or remove losses")
        if self.inherit and self.teacher is None:
            raise ValueError("inherit is given but no teacher; add a teacher section, or remove inherit")
        if self.pruning and self.pruning.end >= self.train.epochs:
            raise ValueError(
                f"pruning.end is {self.pruning.end}, but train.epochs is {self.train.epochs}, counted from 0, "
                f"so nothing would be left to recover in; lower pruning.end or raise train.epochs"
            )
        return self
