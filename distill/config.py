"""A run's settings: YAML and dotted overrides, checked by pydantic; a wrong key or value is one line with a way out."""

import copy
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distill.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenseConfig(Section):
    """Settings of `students.dense.DenseDetector`."""

    name: Literal["dense"] = "dense"
    backbone: str
    weights: str = "none"
    neck: Literal["fpn", "pan"] = "fpn"
    channels: Count = 96
    levels: list[int] = [3, 4, 5]
    head_depth: Count = 2


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
    image_size: tuple[Count, Count]
    resize: Literal["letterbox", "stretch"] = "letterbox"
    classes: list[str] | None = None
    class_map: dict[str, str | None] = {}
    unreadable: Literal["error", "skip"] = "error"
    batch_size: Count = 8
    workers: Annotated[int, Field(ge=0)] = 2
    augment: AugmentConfig = AugmentConfig()
    synthetic: SyntheticConfig | None = None

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) != 2:
            raise ValueError(f"found {value}; give [height, width] in pixels, or one number for a square")
        return (value, value) if isinstance(value, int) else value


class OptimizerConfig(Section):
    """AdamW, with a linear warm-up and a cosine down to `final` of the rate; a short warm-up again after each cut."""

    lr: Positive = 1e-3
    backbone_lr: Positive = 1.0  # as a share of lr
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    final: Share = 0.02
    clip_norm: Positive | None = 10.0
    ema: Share = 0.998  # decay of the averaged copy that is evaluated and kept; 0 keeps the last weights


class ScheduleConfig(Section):
    """Settings of `distill.combiner.WeightSchedule`."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    final: Share = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    stop_epoch: Annotated[int, Field(ge=0)] | None = None


class TermConfig(Section):
    """What every knowledge term has: its weight, and how that goes over the run."""

    weight: Annotated[float, Field(ge=0)] = 1.0  # with balance: gradient, the share of the task's gradient
    schedule: ScheduleConfig = ScheduleConfig()


class SoftLabelConfig(TermConfig):
    """`losses.soft_label.dense_sigmoid`."""

    name: Literal["dense_sigmoid"]
    beta: Annotated[float, Field(ge=0)] = 1.0


class BoxMimicConfig(TermConfig):
    """`losses.localization.box_mimic`."""

    name: Literal["box_mimic"]
    kind: Literal["giou", "smooth_l1"] = "giou"


class FeatureMimicConfig(TermConfig):
    """`losses.feature_mimic`, behind an adapter a level."""

    name: Literal["plain_mimic", "pkd"]


class FPNAttentionConfig(TermConfig):
    """`losses.fpn_attention.attention_transfer`."""

    name: Literal["attention_transfer"]


LossConfig = Annotated[
    SoftLabelConfig | BoxMimicConfig | FeatureMimicConfig | FPNAttentionConfig, Field(discriminator="name")
]


class PruningConfig(Section):
    """Channels are cut at the start of the epochs `start` to `end`, `every` so many, on a cubic schedule."""

    target: Annotated[float, Field(gt=0, lt=1)]  # MACs left at the end, as a share of the uncut student's
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=0)]
    every: Count = 1
    importance: Literal["group_l1", "taylor"] = "group_l1"
    ranking: Literal["uniform", "global"] = "uniform"  # the same share of every group, or the weakest channels anywhere
    per_macs: bool = False  # with global ranking: the weakest for what they cost
    floor: Share = 0.0  # what every group keeps of its width
    round_to: Count = 8
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    evaluate: bool = False  # AP right after each cut, before any training

    @model_validator(mode="after")
    def _ordered(self) -> "PruningConfig":
        if self.end < self.start:
            raise ValueError(f"end ({self.end}) lies before start ({self.start}); cuts go from start to end")
        return self


class TrainConfig(Section):
    """How long, and with which optimizer."""

    epochs: Count = 12
    optimizer: OptimizerConfig = OptimizerConfig()


class TeacherConfig(Section):
    """A detector folder (`path`), or a detector to train first (`detector` and `train`); a given path wins."""

    path: str | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    detector: DenseConfig | None = None
    train: TrainConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "TeacherConfig":
        if self.path is None and (self.detector is None or self.train is None):
            raise ValueError(
                "give path, the folder of a trained detector, or both detector and train to train it first"
            )
        return self


class Config(Section):
    output_dir: str
    overwrite: bool = False
    seed: Seed = 0
    data: DataConfig
    student: DenseConfig
    teacher: TeacherConfig | None = None
    losses: dict[str, LossConfig] = {}
    balance: Literal["none", "gradient"] = "none"  # how the losses' weights are meant, see distill.combiner
    pruning: PruningConfig | None = None
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        if self.losses and self.teacher is None:
            raise ValueError("losses are given but no teacher; add a teacher section, or remove losses")
        if self.pruning and self.pruning.end >= self.train.epochs:
            raise ValueError(
                f"pruning.end is {self.pruning.end}, but train.epochs is {self.train.epochs}, counted from 0, "
                f"so nothing would be left to recover in; lower pruning.end or raise train.epochs"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The checked settings of a YAML file.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value` each, the value in YAML.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong value.
    """
    return check_config(override(read_yaml(path), overrides or []), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file; see configs/, or run train.py --list{_near_file(path)}")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: is not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: holds no settings; a config is a YAML mapping such as configs/quickstart.yaml")
    return settings


def override(settings: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A copy of the settings with each `dotted.key=value` set."""
    settings = copy.deepcopy(settings)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"{item!r}: an override is written key=value, such as train.epochs=20")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{key}: {text!r} is not a YAML value; quote it") from None
        section = settings
        *parents, leaf = key.split(".")
        for i, parent in enumerate(parents):
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise UserError(f"{key}: {'.'.join(parents[: i + 1])} is a single value and has no keys below it")
        section[leaf] = value
    return settings


def check_config(settings: dict[str, Any], source: str) -> Config:
    """Settings as a `Config`; the first thing wrong is named with its path, what was allowed and the nearest match."""
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """One line for what pydantic found wrong first; an unknown key goes before the keys that it left missing."""
    found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")[0]
    path = [str(p) for p in found["loc"]]
    kind, value = found["type"], found["input"]
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    names, allowed = _resolve(path)
    key = ".".join(name for name in names if not name.isdecimal())
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], allowed, 1)
        hint = f"did you mean {'.'.join([*names[:-1], near[0]])}?" if near else f"allowed: {', '.join(allowed)}"
        return f"{key}: no such key; {hint}{more}"
    if kind == "missing":
        return f"{key}: is missing; add it, or give {key}=VALUE on the command line{more}"
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), found["ctx"]["expected"].replace("'", "").split(), 1)
        hint = f"; did you mean {near[0].rstrip(',')}?" if near else ""
        return f"{key}: {value!r} is not allowed; choose {found['ctx']['expected']}{hint}{more}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        options = found["ctx"].get("expected_tags") or ", ".join(repr(tag) for model in LOSSES for tag in _tags(model))
        if not isinstance(value, dict):
            return f"{key}: found {value!r}; a section with name: {options} is needed{more}"
        if "name" not in value:
            return f"{key}.name: is missing; choose {options}{more}"
        near = difflib.get_close_matches(str(value["name"]), options.replace("'", "").split(", "), 1)
        hint = f", did you mean {near[0]}" if near else ""
        return f"{key}: name {value['name']!r} is not allowed{hint}; choose name: {options}{more}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{key}: found {value!r}; a section is needed, with keys of its own such as in configs/*.yaml{more}"
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{found['ctx']['error']}{more}"
    message = found["msg"][0].lower() + found["msg"][1:]
    shown = f"; found {value!r}" if not isinstance(value, dict) else ""
    return f"{key}: {message}{shown}{more}"


def _resolve(path: list[str]) -> tuple[list[str], list[str]]:
    """The user's own key path, without pydantic's union tags, and the keys allowed where the last one stands."""
    names, allowed, model = [], list(Config.model_fields), Config
    for part in path:
        tagged = [m for m in LOSSES if names[:1] == ["losses"] and part in _tags(m)]
        if len(names) == 2 and tagged:
            model = tagged[0]
        else:
            names.append(part)
            field = model.model_fields.get(part) if model else None
            allowed = list(model.model_fields) if model else allowed
            model = _section_of(field.annotation) if field else None
    return names, allowed


LOSSES = (SoftLabelConfig, BoxMimicConfig, FeatureMimicConfig, FPNAttentionConfig)


def _tags(model: type[Section]) -> tuple[str, ...]:
    return model.model_fields["name"].annotation.__args__


def _section_of(annotation: Any) -> type[Section] | None:
    options = (annotation, *getattr(annotation, "__args__", ()))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _near_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], 1)
    return f"; did you mean {folder / near[0]}?" if near else ""
