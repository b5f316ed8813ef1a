"""Every setting of a run, checked by pydantic."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from distill.pruning.schedule import cuts_at


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"found {value}; a number is needed")
    return value


def _height_and_width(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError(f"found {value}; give [height, width] in pixels, or one number for a square")
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _n_of_m(value: Any) -> Any:
    """2:4 as it was written: YAML takes it for a number with the base 60."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value


# words such as 1e-3, which YAML does not take for a number, pass; bools and infinity, which are never meant, do not
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=1, strict=True)]
Epoch = Annotated[int, Field(ge=0, strict=True)]
Pixels = Annotated[int, Field(ge=32, strict=True)]
ImageSize = Annotated[tuple[Pixels, Pixels], BeforeValidator(_height_and_width)]
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
    head: Literal["task_aligned", "gfl", "retinanet"] = "task_aligned"
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


class YOLOConfig(Section):
    name: Literal["yolov4", "yolov7", "yolov7_tiny"]
    width: Positive = 1.0  # multiple of the original's channels
    depth: Positive = 1.0  # likewise of its blocks
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class YOLOv5Config(Section):
    name: Literal["yolov5"]
    size: Literal["n", "s", "m", "l", "x"] = "s"
    width: Positive | None = None  # multiple of size l's channels, in place of the size's own
    depth: Positive | None = None  # likewise of its blocks
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class ZooConfig(Section):
    """Detectors of libreyolo, of the extra [zoo]."""

    name: Literal["yolox", "yolov9", "dfine"]
    size: str = "s"
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class AdapterConfig(Section):
    """A detector of the user's own, see docs/adapters.md."""

    name: Literal["adapter"]
    code: str  # its class, as package.module:Class
    arguments: dict[str, Any] = {}
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class ArtifactConfig(Section):
    """A detector that is there already, cuts included: the student of a run, or a trained detector that is to be cut.

    A run counts from what it starts with: a pruning target is a share of what this detector costs, not of what it was
    once cut from.
    """

    name: Literal["artifact"]
    path: str
    class_map: dict[str, str | None] = {}  # the data's name for a class of its own, or null to leave that class out
    new_head: bool = False  # start the class layers anew, for whatever classes the data has

    @model_validator(mode="after")
    def _agree(self) -> "ArtifactConfig":
        if self.class_map and self.new_head:
            raise ValueError("new_head starts all class layers anew, so class_map has nothing to map; leave out one")
        return self


def _named(value: Any) -> Any:
    if not isinstance(value, dict) or "name" in value:
        return value
    if value.get("path") is None:
        return {"name": "dense", **value}
    if others := [key for key in value if key not in ArtifactConfig.model_fields]:
        raise ValueError(
            f"path is a detector that is built already, so {', '.join(others)} cannot be chosen; "
            f"leave them out: {{path: {value['path']}}}"
        )
    return {"name": "artifact", **value}


# new ones, by family
DETECTORS: tuple[type[Section], ...] = (
    DenseConfig,
    FCOSConfig,
    RetinaNetConfig,
    FasterRCNNConfig,
    SSDConfig,
    YOLOv5Config,
    YOLOConfig,
    ZooConfig,
    AdapterConfig,
)
DetectorConfig = Annotated[
    Union[(*DETECTORS, ArtifactConfig)],
    Field(discriminator="name"),
    BeforeValidator(_named),
]


class AugmentConfig(Section):
    """Training-time augmentation; probabilities are per image, strengths are those of albumentations' ColorJitter."""

    horizontal_flip: Share = 0.5
    vertical_flip: Share = 0.0
    crop: Share = 0.0
    crop_scale: tuple[Share, Share] = (0.5, 1.0)
    zoom_out: Share = 0.0
    mosaic: Share = 0.0  # four images as one
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Share = 0.0
    views: Count | None = None  # of an image, which epochs show in turns; another one in every epoch if null


class SyntheticConfig(Section):
    """Drawn scenes, written to `data.root` on first use."""

    train: Count = 400
    val: Count = 100
    size: Annotated[int, Field(ge=42)] = 160
    seed: Seed = 0


class UnlabelledConfig(Section):
    """Images that only teachers say something about: all of a folder, or those of a data set's split."""

    root: str
    split: str | None = None  # of the data set in root; its annotations are not looked at
    ratio: Number = 0.5  # share of these in what is trained on; the rest is labelled
    score_threshold: Share = 0.3  # of a teacher's detections that stand in where a loss goes by boxes

    @field_validator("ratio")
    @classmethod
    def _mixed(cls, value: float) -> float:
        if not 0.01 <= value <= 0.99:
            raise ValueError(
                f"found {value:g}; it goes from 0.01 to 0.99 (for no labelled images say data.train=null, for no "
                "unlabelled ones data.unlabelled=null)"
            )
        return value


class DataConfig(Section):
    root: str
    train: str | None = "train"  # null trains on unlabelled images alone
    val: str = "val"
    test: str | None = None
    image_size: ImageSize
    resize: Literal["letterbox", "stretch"] = "letterbox"
    classes: list[str] | None = None
    class_map: dict[str, str | None] = {}
    unreadable: Literal["error", "skip"] = "error"
    batch_size: Count = 8
    workers: Annotated[int, Field(ge=0, strict=True)] = 2
    augment: AugmentConfig = AugmentConfig()
    unlabelled: UnlabelledConfig | None = None
    synthetic: SyntheticConfig | None = None

    @model_validator(mode="after")
    def _something_to_train_on(self) -> "DataConfig":
        if self.train is None and self.unlabelled is None:
            raise ValueError("train is null and there are no unlabelled images; name a split, such as data.train=train")
        return self


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

    teacher: str | None = None  # by name, where there are several
    weight: NotNegative | None = None
    schedule: ScheduleConfig = ScheduleConfig()
    levels: list[str] | None = None  # such as [P3, P4]; all that find a partner if null


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

    adapter: Literal["conv1", "conv3", "linear", "identity", "select"] = "conv1"  # see distill.terms.adapter


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
    "soft labels": (DenseSigmoidConfig, BoxMimicConfig, LDConfig, CrossKDConfig, PseudoLabelConfig, RoiKDConfig),
    "feature mimic": (MimicConfig, MaskedMimicConfig, CWDConfig, MGDConfig, FGDConfig),
    "FPN attention": (AttentionTransferConfig, FGDAttentionConfig, AttentionGuidedConfig),
}
LossConfig = Annotated[
    Union[tuple(model for models in LOSSES.values() for model in models)],  # noqa: UP007
    Field(discriminator="name"),
]


class TimedSection(Section):
    """Something is done at the start of the epochs `start` to `end`, `every` so many, or of given `epochs`."""

    start: Epoch | None = None
    end: Epoch | None = None
    every: Count = 1
    epochs: list[Epoch] | None = None  # in place of the three; one is one shot

    @property
    def cut_epochs(self) -> list[int]:
        """Epochs before which it is done, counted from 0."""
        return sorted(set(self.epochs)) if self.epochs else cuts_at(self.start, self.end, self.every)

    @model_validator(mode="after")
    def _timed(self) -> "TimedSection":
        if self.epochs is not None:
            if not self.epochs:
                raise ValueError("epochs is empty; give the epochs to cut before, such as [2, 5]")
            if (self.start, self.end, self.every) != (None, None, 1):
                raise ValueError("epochs says when to cut already; leave out start, end and every")
        elif self.start is None or self.end is None:
            raise ValueError("give start and end, or epochs such as [2, 5]; they say when to cut")
        elif self.end < self.start:
            raise ValueError(f"end ({self.end}) lies before start ({self.start}); cuts go from start to end")
        return self


class SparsityConfig(Section):
    """Settings of `distill.pruning.sparsity.SparsityPenalty`; rates of what is added to the loss."""

    weights: NotNegative = 0.0  # of absolute weights
    scales: NotNegative = 0.0  # of absolute batch-norm scales: the sr of network slimming
    groups: NotNegative = 0.0  # of what coupled channels own, the less it is the more
    final: Share = 0.1  # what is left of the rates in the end
    end: Count | None = None  # epochs that it lasts; until the last cut, or all of them, if null
    spare_shortcuts: bool = False  # leave alone the scales of channels that are added to others

    @model_validator(mode="after")
    def _something(self) -> "SparsityConfig":
        if not (self.weights or self.scales or self.groups):
            raise ValueError("weights, scales and groups are all 0; give one a rate, such as scales: 0.001")
        if self.spare_shortcuts and not self.scales:
            raise ValueError("spare_shortcuts is about scales, whose rate is 0; leave it out or give scales a rate")
        return self


class BlocksConfig(TimedSection):
    """Settings of `distill.pruning.blocks.BlockPruner`."""

    count: Count  # residual branches that go in all
    importance: Literal["loss", "taylor"] = "loss"  # what the loss is without a block, or its weights' part in it
    keep: list[str] = []  # patterns of blocks that stay, such as backbone.body.layer1.*


class MasksConfig(TimedSection):
    """Settings of `distill.pruning.masks.Masks`."""

    kind: Annotated[str, BeforeValidator(_n_of_m)] = "weights"  # or kernels, or N of M neighbouring inputs, such as 2:4
    sparsity: Annotated[Number, Field(gt=0, lt=1)] | None = None  # share that is 0 in the end; N:M says it itself
    importance: Literal["magnitude", "gradient"] = "magnitude"
    ranking: Literal["uniform", "global"] = "uniform"  # the same share of every layer, or the least anywhere
    schedule: Literal["cubic", "linear", "exponential"] = "cubic"
    keep: list[str] = []  # patterns of layers that stay whole
    indivisible: Literal["error", "skip"] = "error"  # layers whose inputs are no multiple of M

    @property
    def divisor(self) -> int:
        """M of N:M, else 1."""
        return int(self.kind.partition(":")[2] or 1)

    @model_validator(mode="after")
    def _agree(self) -> "MasksConfig":
        pattern = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.kind)
        if self.kind not in ("weights", "kernels") and not (pattern and int(pattern[1]) < int(pattern[2])):
            raise ValueError(f"kind: found {self.kind!r}; it is weights, kernels, or N:M with N below M, such as '2:4'")
        if pattern and (self.sparsity, self.ranking, self.schedule) != (None, "uniform", "cubic"):
            raise ValueError(f"{self.kind} says how much goes of every layer; leave out sparsity, ranking and schedule")
        if not pattern and self.sparsity is None:
            raise ValueError("sparsity is missing; give the share that is 0 in the end, such as 0.5")
        return self


class CutGuardConfig(Section):
    """What a student must be worth after a cut, or it goes back to before it; see `distill.pruning.guard`."""

    ap: Share | None = None  # at least, on the val split
    loss: Positive | None = None  # the task's at most, mean over an epoch's training
    recovery: Count = 2  # epochs after a cut until it is judged; what is planned next or the end may come sooner

    @model_validator(mode="after")
    def _some_floor(self) -> "CutGuardConfig":
        if self.ap is None and self.loss is None:
            raise ValueError("give ap, the least on the val split, or loss, the most of the task's; or leave it out")
        return self


class PruningConfig(TimedSection):
    """Channels are cut at the given times, if there is a `target`; blocks and masks have times of their own."""

    target: Annotated[Number, Field(gt=0, lt=1)] | None = None  # what is left at the end, of what the run starts with
    budget: Literal["macs", "params", "memory", "latency"] = "macs"  # memory: of activations; latency: of one image
    runtime: Literal["eager", "onnx"] = "eager"  # where latency is measured; onnx: ONNX Runtime, of the [export] extra
    method: Literal["cut", "soft"] = "cut"  # soft: at all times but the last, channels are set to 0 and may come back
    schedule: Literal["cubic", "linear", "exponential", "asymptotic", "constant"] = "cubic"  # how much each cut takes
    importance: Literal[
        "group_l1", "group_l2", "fpgm", "bn_scale", "lamp",  # by weights
        "taylor", "taylor_gate", "group_fisher",  # by gradients of the loss that is trained
        "mean_activation", "apoz", "hrank",  # by what the channels give on training images
        "random",
    ] = "group_l1"  # fmt: skip
    knowledge: bool = True  # whether gradients are those of the task and the losses, or of the task alone
    greedy: bool = False  # score anew as channels go, for group_l1, group_l2 and fpgm
    # the same share of every group, or of every set of groups alike, or the weakest channels anywhere, or what does
    # the least harm by the measurements in `sensitivity`
    ranking: Literal["uniform", "isomorphic", "global", "sensitivity"] = "uniform"
    sensitivity: str | None = None  # a file of python -m distill.sensitivity
    per: Literal["none", "macs", "params", "memory"] = "none"  # with global ranking: the weakest for what they cost
    floor: Share = 0.0  # what every group keeps of its width
    keep: list[str] = []  # patterns of layers that stay as wide as they are, such as backbone.body.layer1.*
    limits: dict[str, tuple[Share, Share]] = {}  # least and most that layers keep of their width, by pattern
    round_to: Count = 8
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] = 20
    evaluate: bool = False  # AP right after each cut, before any training
    guard: CutGuardConfig | None = None  # takes cuts back that the student does not get over, keeps the best student

    sparsity: SparsityConfig | None = None  # sparse training before the cuts
    blocks: BlocksConfig | None = None  # whole residual branches, before channels
    masks: MasksConfig | None = None  # single weights or kernels that are held at 0

    @property
    def cut_epochs(self) -> list[int]:
        """Epochs before which channels are cut, or set to 0, counted from 0."""
        return super().cut_epochs if self.target is not None else []

    @property
    def last_cut(self) -> int | None:
        """The epoch before which the last channels or blocks go."""
        return max([*self.cut_epochs, *(self.blocks.cut_epochs if self.blocks else ())], default=None)

    @property
    def planned_epochs(self) -> list[int]:
        """Epochs before which anything is taken or set to 0: channels, blocks, weights."""
        others = [section.cut_epochs for section in (self.blocks, self.masks) if section]
        return sorted({*self.cut_epochs, *(epoch for epochs in others for epoch in epochs)})

    def _timed(self) -> "PruningConfig":
        if self.target is not None:
            return super()._timed()
        if not (self.sparsity or self.blocks or self.masks):
            raise ValueError(
                "target is missing; give the share of the student that is left, or blocks, masks, sparsity"
            )
        if (self.start, self.end, self.every, self.epochs) != (None, None, 1, None):
            raise ValueError("start, end, every and epochs say when channels go; give target too, or leave them out")
        if self.guard:
            raise ValueError("guard keeps the best student within a budget; give target, the budget, or leave it out")
        return self

    @model_validator(mode="after")
    def _agree(self) -> "PruningConfig":
        if self.per != "none" and self.ranking != "global":
            raise ValueError(f"per changes little where ranking is {self.ranking}; say ranking: global")
        if self.runtime != "eager" and self.budget != "latency":
            raise ValueError(f"runtime is where latency is measured, but budget is {self.budget}; say budget: latency")
        if self.greedy and self.importance not in ("group_l1", "group_l2", "fpgm"):
            raise ValueError(f"greedy changes nothing for {self.importance}; leave it out, or take fpgm")
        if (self.sensitivity is not None) != (self.ranking == "sensitivity"):
            raise ValueError("ranking: sensitivity and sensitivity: FILE.csv go together; give both or neither")
        wrong = next((pattern for pattern, (least, most) in self.limits.items() if least > most), None)
        if wrong is not None:
            raise ValueError(f"limits: {wrong!r} keeps at least {self.limits[wrong][0]:g} but at most less; swap them")
        self._check_methods()
        return self

    def _check_methods(self) -> None:
        if self.schedule == "constant" and self.method == "cut":
            raise ValueError("schedule: constant takes all at once; say method: soft, or give one of epochs")
        if self.method == "soft" and len(self.cut_epochs) < 2:
            raise ValueError("method: soft needs times to set channels to 0 before the one at which they are cut")
        if self.blocks and self.ranking == "sensitivity":
            raise ValueError("ranking: sensitivity goes by a scan with all blocks; leave blocks out, or rank otherwise")
        if self.sparsity and self.sparsity.end is None and self.last_cut == 0:
            raise ValueError("sparsity lasts until the last cut, before epoch 0; cut later, or give sparsity.end")
        if self.masks and self.method == "soft" and self.masks.cut_epochs[0] < self.cut_epochs[-1]:
            raise ValueError(
                f"masks begin at {self.masks.cut_epochs[0]}, before soft pruning ends at {self.cut_epochs[-1]}, and "
                "would hold what it lets come back; begin them later"
            )
        if self.masks and self.target is not None and self.round_to % self.masks.divisor:
            raise ValueError(
                f"round_to: {self.round_to} leaves widths that masks.kind, {self.masks.kind}, does not divide; give a "
                f"multiple of {self.masks.divisor}"
            )


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
    precision: Literal["auto"] | None = None  # auto: see distill.precision; null: as Accelerate's own settings say
    optimizer: OptimizerConfig = OptimizerConfig()
    save_minutes: Positive | None = 15.0  # between two checkpoints within an epoch; null: only whole epochs are kept


class FeaturesConfig(Section):
    """A timm network that teaches by its feature maps; see `teachers.FeatureTeacher`."""

    backbone: str
    weights: str = "imagenet"  # what timm's hub has for that name, trained on whatever; or the path of a file


def _is_trained(detector: DetectorConfig) -> bool:
    """Whether its weights are those of a whole detector, as far as its settings tell."""
    known = detector.weights not in ("none", "imagenet") and detector.name != "dense"
    return known and not detector.new_head


class TeacherConfig(Section):
    """A detector folder (`path`), a network that gives features only, the student itself, or a `detector`: to `train`
    first, or as its weights are. The others win over it; `teacher: original` is short for `{itself: original}`.
    """

    path: str | None = None
    features: FeaturesConfig | None = None
    # the student as it was before the first cut of this run, or its own average as it stands (Mean Teacher, 1703.01780)
    itself: Literal["original", "ema"] | None = None
    class_map: dict[str, str | None] = {}  # the student's name for a class of its own, or null to leave that class out
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"  # auto: see distill.precision
    image_size: ImageSize | None = None  # the student's images are resized to it; data.image_size if null
    cache: str | None = None  # a folder for what it says of each view (data.augment.views): asked once, then remembered
    shard: bool = False  # keep a part of its backbone's weights on each process, for one that no device can hold
    detector: DetectorConfig | None = None
    train: TrainConfig | None = None

    @property
    def trained_first(self) -> bool:
        """Whether the run has to train it."""
        return self.train is not None and self.is_built

    @property
    def as_its_weights_are(self) -> bool:
        """Whether it is built from published weights, and taught already."""
        return self.train is None and self.is_built

    @property
    def is_built(self) -> bool:
        """Whether it is one or the other of these."""
        return self.path is None and self.features is None and self.itself is None

    @model_validator(mode="before")
    @classmethod
    def _in_short(cls, value: Any) -> Any:
        return {"itself": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherConfig":
        if self.path and self.features:
            raise ValueError("path and features are both given; a teacher is one or the other, so leave out one")
        others = [key for key in ("path", "features", "image_size") if getattr(self, key)]
        if self.itself and others:
            raise ValueError(
                f"{others[0]} is given, but the teacher is the student itself ({self.itself}); leave it out"
            )
        if isinstance(self.detector, ArtifactConfig):
            raise ValueError(
                f"detector is one to train first; of one that is trained already give the path itself: path: "
                f"{self.detector.path}"
            )
        if self.is_built and self.detector is None:
            raise ValueError(
                "give path, the folder of a trained detector, or detector, with train to train it first; or features "
                "of a timm network; or say original or ema for the student itself"
            )
        if self.as_its_weights_are and not _is_trained(self.detector):
            raise ValueError(
                f"train is missing, and {self.detector.name} with weights: {self.detector.weights} detects nothing "
                "yet; give train to train it first, or the weights of a whole detector of this family"
            )
        if self.cache and (self.itself or self.shard):
            found = "is the student itself, which changes" if self.itself else "is sharded, and asked by all processes"
            raise ValueError(f"cache: the teacher {found}, so what it says cannot be kept; leave cache out")
        if self.precision == "auto" and (self.shard or self.cache):
            way = "tries a teacher as a whole, and shard is for one that fits no device"
            if self.cache:
                way = "may choose otherwise in the next run, and cache is for what a teacher says in one precision"
            raise ValueError(f"precision: auto {way}; say which it is")
        if self.class_map and self.path is None:
            raise ValueError("class_map is for a teacher from a path; any other has the data's classes")
        return self


TEACHER = "teacher"  # what a single one is called, here and in the run folder
RESERVED = (
    "epoch", "task", "macs", "params", "teacher_ap", "lr", "seconds", "macs_left", "teacher_share", "epoch_time",
    "time_left", "small_scales", "nonzero",
)  # fmt: skip
PENALTY = "sparsity"  # the column of what sparse training adds to the loss


class Config(Section):
    output_dir: str
    overwrite: bool = False
    seed: Seed = 0
    tracking: list[Literal["tensorboard", "trackio", "wandb"]] = []  # where numbers go besides results.csv; see [track]
    data: DataConfig
    student: DetectorConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = {}  # several in place of one, by name; each loss says whose it is
    inherit: list[str] = []  # parts that the student starts with from the (first) teacher, such as [neck, head]
    widths_of: str | None = None  # a detector folder: the student starts as narrow as that one
    losses: dict[str, LossConfig] = {}
    balance: Literal["none", "gradient"] = "none"  # how the losses' weights are meant, see distill.combiner
    guards: GuardConfig = GuardConfig()
    pruning: PruningConfig | None = None
    train: TrainConfig = TrainConfig()

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By name, be it one, several or none."""
        return self.teachers or ({TEACHER: self.teacher} if self.teacher else {})

    def teachers_itself(self, kind: str) -> list[str]:
        """The names of those that are the student itself, `original` or `ema`."""
        return [name for name, teacher in self.all_teachers.items() if teacher.itself == kind]

    @staticmethod
    def teacher_key(name: str) -> str:
        """Where a teacher's settings stand."""
        return name if name == TEACHER else f"teachers.{name}"

    def teacher_of(self, loss: str) -> str:
        """The name of the teacher that a loss belongs to."""
        return self.losses[loss].teacher or next(iter(self.all_teachers))

    def weight_of(self, name: str) -> float:
        """The weight of a knowledge term, given or not."""
        loss = self.losses[name]
        if loss.weight is not None:
            return loss.weight
        return 1.0 if self.balance == "gradient" else loss.published_weight

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        taken = [name for name in self.losses if name in (*RESERVED, PENALTY) or name.startswith("ap")]
        if taken:
            raise ValueError(f"losses.{taken[0]}: a column of results.csv has this name already; give it another")
        self._check_teachers()
        own, run = self.student, Path(self.output_dir).resolve()
        if isinstance(own, ArtifactConfig) and run in Path(own.path).resolve().parents:
            raise ValueError(
                f"output_dir: {self.output_dir} holds the student's own folder, {own.path}, and the run would replace "
                "it; choose another output_dir"
            )
        if self.losses and not self.all_teachers:
            raise ValueError("losses are given but no teacher; add a teacher section, or remove losses")
        if self.inherit and not self.all_teachers:
            raise ValueError("inherit is given but no teacher; add a teacher section, or remove inherit")
        if self.inherit and next(iter(self.all_teachers.values())).shard:
            raise ValueError("inherit copies from a teacher that is whole; leave out its shard, or inherit")
        if self.data.unlabelled and not self.losses:
            raise ValueError(
                "data.unlabelled is given but no losses; only a teacher's losses learn from such images, so add a "
                "teacher and losses, or remove data.unlabelled"
            )
        if self.data.train is None:
            self._check_all_unlabelled()
        if self.pruning and self.widths_of:
            raise ValueError("widths_of starts with a student that is cut already; leave it or pruning out")
        if self.pruning:
            pruning = self.pruning
            for name, section in {"": pruning, "blocks.": pruning.blocks, "masks.": pruning.masks}.items():
                self._check_recovery(f"pruning.{name}", section)
        return self

    def _check_recovery(self, prefix: str, section: TimedSection | None) -> None:
        if section and section.cut_epochs and section.cut_epochs[-1] >= self.train.epochs:
            key = "epochs" if section.epochs else "end"
            raise ValueError(
                f"{prefix}{key} is {getattr(section, key)}, but train.epochs is {self.train.epochs}, counted "
                f"from 0, so nothing would be left to recover in; lower {prefix}{key} or raise train.epochs"
            )

    def _check_teachers(self) -> None:
        names = list(self.all_teachers)
        if self.teacher and self.teachers:
            raise ValueError("teacher and teachers are both given; name them all under teachers (teacher=null)")
        folders: dict[str, str] = {}
        for name, teacher in self.all_teachers.items():
            key = self.teacher_key(name)
            if teacher.cache and self.data.augment.views is None:
                raise ValueError(
                    f"{key}.cache: remembers views that come again, and every epoch has others; give "
                    "data.augment.views, such as 4"
                )
            if teacher.cache and (other := folders.setdefault(teacher.cache, key)) != key:
                raise ValueError(f"{key}.cache: {teacher.cache} is the folder of {other}; give each its own")
            (height, width), own = self.data.image_size, teacher.image_size
            if own and own[0] * width != own[1] * height:
                raise ValueError(
                    f"{self.teacher_key(name)}.image_size: {list(own)} and data.image_size, [{height}, {width}], are "
                    f"of unlike shape; give a multiple, such as [{2 * height}, {2 * width}]"
                )
            if teacher.itself:
                self._check_itself(self.teacher_key(name), teacher.itself)
        for name in self.teachers:
            if name == TEACHER or not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"teachers.{name}: is no name; give letters, digits, - and _, other than {TEACHER!r}")
        for key, loss in self.losses.items():
            if loss.teacher is None and len(names) > 1:
                raise ValueError(f"losses.{key}.teacher: is missing; say whose loss it is: {', '.join(names)}")
            if loss.teacher is not None and names and loss.teacher not in names:
                raise ValueError(f"losses.{key}.teacher: found {loss.teacher!r}; there is {', '.join(names)}")

    def _check_itself(self, key: str, kind: str) -> None:
        if self.inherit:
            raise ValueError(f"inherit takes a teacher's tensors, but {key} is the student itself; leave it out")
        if kind == "ema":
            if not self.train.optimizer.ema:
                raise ValueError(f"{key}: ema needs an average; give train.optimizer.ema, such as 0.998")
        elif isinstance(self.student, ArtifactConfig):
            if self.student.new_head:
                raise ValueError(
                    f"{key}: original has the new, untrained class layers of student.new_head; give the path of a "
                    "teacher that knows the classes"
                )
        elif not self.pruning:
            raise ValueError(
                f"{key}: original is the student before its first cut, and nothing cuts this one; add a pruning "
                "section, or start from a detector that is there already (student.path)"
            )

    def _check_all_unlabelled(self) -> None:
        for name, teacher in self.all_teachers.items():
            if teacher.trained_first:
                key = self.teacher_key(name)
                raise ValueError(
                    f"{key}: cannot be trained first without labelled images (data.train); give {key}.path"
                )
        if self.balance == "gradient":
            raise ValueError(
                "balance: gradient goes by the task's gradient, and data.train=null leaves no task; say none"
            )
