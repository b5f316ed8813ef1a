"""Settings of what is cut, masked or trained sparse, and when."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from distill.pruning.schedule import cuts_at
from distill.schema.base import Count, Epoch, NotNegative, Number, Positive, Section, Share


def _least_and_most(value: Any) -> Any:
    """Refuses a single number, which could be either."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"found {value!r}; [least, most] is needed, shares of the width such as [0.5, 1.0]")
    return value


def _n_of_m(value: Any) -> Any:
    """2:4 as it was written: YAML takes it for a number with the base 60."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value


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


BY_GRADIENTS = ("taylor", "taylor_gate", "group_fisher")


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
    # [least, most] that layers keep of their width, by pattern
    limits: dict[str, Annotated[tuple[Share, Share], BeforeValidator(_least_and_most)]] = {}
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
