"""Settings of a run: its teachers, its training, and how all sections fit together."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator
from torch import nn

from distill.schema.base import Count, ImageSize, NotNegative, Positive, Section, Seed, Share
from distill.schema.data import DataConfig
from distill.schema.detectors import ArtifactConfig, DetectorConfig
from distill.schema.losses import LossConfig, TermConfig
from distill.schema.pruning import BY_GRADIENTS, PruningConfig, TimedSection
from students import FAMILIES


def _auto_or_none(value: Any) -> Any:
    if value not in ("auto", None):
        raise ValueError(
            f"found {value}; give auto, or say which to Accelerate: accelerate launch --mixed_precision bf16"
        )
    return value


class OptimizerConfig(Section):
    """AdamW, with a linear warm-up and a cosine down to `final` of the rate; a short warm-up again after each cut."""

    lr: Positive = 1e-3
    backbone_lr: Positive = 1.0  # as a share of lr
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 1.0
    final: Share = 0.02
    clip_norm: Positive | None = 10.0
    ema: Share = 0.998  # decay of the averaged copy that is evaluated and kept; 0 keeps the last weights


class GuardConfig(Section):
    """What is watched while a teacher teaches; see `distill.guards`."""

    every: Count = 5  # epochs between looks at the terms' gradients and at the teacher, the first one at the start
    dominates: Positive = 100.0  # how many times the task's gradient a term's may be
    # where it is more; skip leaves it out until the next look. A new head hardly passes the task's gradient on to the
    # pyramid, so that without balance some losses are far above it at first with the weights of their authors
    dominating_term: Literal["warn", "skip", "stop"] = "stop"
    bad_term: Literal["stop", "skip"] = "stop"  # where a term is no number


class TrainConfig(Section):
    """How long, and with which optimizer."""

    epochs: Count = 12
    # auto: see distill.precision; null: as Accelerate's own settings say
    precision: Annotated[Literal["auto"] | None, BeforeValidator(_auto_or_none)] = None
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
        if self.as_its_weights_are and getattr(self.detector, "new_head", False):
            raise ValueError(
                "new_head starts the class layers of its detector anew, and train is missing; leave new_head out and "
                "say in class_map which of its classes are the student's, or give train to train it first"
            )
        if self.as_its_weights_are and not _is_trained(self.detector):
            family = FAMILIES[self.detector.name]
            way_out = "give train to train it first, or " if getattr(family, "learns", True) else "give "
            raise ValueError(
                f"train is missing, and {self.detector.name} with weights: {self.detector.weights} detects nothing "
                f"yet; {way_out}the weights of a whole detector of this family"
            )
        if self.cache and (self.itself or self.shard):
            found = "is the student itself, which changes" if self.itself else "is sharded, and asked by all processes"
            raise ValueError(f"cache: the teacher {found}, so what it says cannot be kept; leave cache out")
        if self.precision == "auto" and (self.shard or self.cache):
            way = "tries a teacher as a whole, and shard is for one that fits no device"
            if self.cache:
                way = "may choose otherwise in the next run, and cache is for what a teacher says in one precision"
            raise ValueError(f"precision: auto {way}; say which it is")
        if self.class_map and not (self.path or self.as_its_weights_are):
            raise ValueError(
                "class_map is for a teacher from a path or with published weights; any other has the data's classes"
            )
        return self


def _is_plain(name: str) -> bool:
    return name.replace("_", "").replace("-", "").isalnum()


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
    losses: dict[str, LossConfig] = {}  # losses.NAME: null leaves one of a recipe's out
    # how the losses' weights are meant, see distill.combiner; none without labelled images, which leave no task
    balance: Literal["none", "gradient"] = "gradient"
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

    @field_validator("losses", mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        """`losses.NAME=null` leaves a recipe's loss out, `losses=null` all of them."""
        if isinstance(value, dict):
            return {name: loss for name, loss in value.items() if loss is not None}
        return {} if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _balance(cls, value: Any) -> Any:
        data = value.get("data") if isinstance(value, dict) else None
        return {"balance": "none"} | value if isinstance(data, dict) and data.get("train", "") is None else value

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        taken = [name for name in self.losses if name in (*RESERVED, PENALTY) or name.startswith("ap")]
        if taken:
            raise ValueError(f"losses.{taken[0]}: a column of results.csv has this name already; give it another")
        unfit = [name for name in self.losses if not _is_plain(name) or hasattr(nn.ModuleDict(), name)]
        if unfit:
            raise ValueError(
                f"losses.{unfit[0]}: cannot be the name of a module; give letters, digits, - and _, and no word that "
                "PyTorch's modules have, such as train"
            )
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
            if name == TEACHER or not _is_plain(name):
                raise ValueError(f"teachers.{name}: is no name; give letters, digits, - and _, other than {TEACHER!r}")
        for key, loss in self.losses.items():
            if loss.teacher is None and len(names) > 1:
                raise ValueError(f"losses.{key}.teacher: is missing; say whose loss it is: {', '.join(names)}")
            if loss.teacher is not None and names and loss.teacher not in names:
                raise ValueError(f"losses.{key}.teacher: found {loss.teacher!r}; there is {', '.join(names)}")
            begins, stop = self._begins(loss) if names else 0, loss.schedule.stop_epoch
            if stop is not None and stop <= begins:
                raise ValueError(
                    f"losses.{key}.schedule.stop_epoch: found {stop}, but the loss begins with epoch {begins}, counted "
                    f"from 0, so that it would never count; give {begins + 1} or more, or leave the loss out"
                )

            share, most = 1.0 if loss.weight is None else loss.weight, self.guards.dominates
            if self.balance == "gradient" and self.guards.dominating_term == "stop" and share > most:
                raise ValueError(
                    f"losses.{key}.weight: found {share:g}; with balance: gradient that is how many times the task's "
                    f"its gradient is, and guards.dominates allows {most:g}; lower it, or say balance: none"
                )

    def _begins(self, loss: TermConfig) -> int:
        """The epoch, counted from 0, before which a loss has no teacher."""
        teacher = self.all_teachers[loss.teacher or next(iter(self.all_teachers))]
        waits = teacher.itself == "original" and not isinstance(self.student, ArtifactConfig)
        return self.pruning.planned_epochs[0] if waits else 0

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
        elif not self.pruning or self.pruning.last_cut is None:
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
        if self.pruning and self.pruning.importance in BY_GRADIENTS:
            by_weights = "choose an importance that goes by weights, such as group_l2"
            if not self.pruning.knowledge:
                raise ValueError(
                    f"pruning.knowledge: without labelled images (data.train) there is no loss but the teachers', so "
                    f"{self.pruning.importance} would find no gradient; say true, or {by_weights}"
                )
            if all(teacher.itself == "original" for teacher in self.all_teachers.values()):
                raise ValueError(
                    f"pruning.importance: {self.pruning.importance} goes by gradients, and without labelled images "
                    f"(data.train) a student has none before it differs from its only teacher, original; {by_weights}"
                )
        if self.balance == "gradient":
            raise ValueError(
                "balance: gradient goes by the task's gradient, and data.train=null leaves no task; say none"
            )
