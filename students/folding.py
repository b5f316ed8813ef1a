"""Batch norms as part of the convolutions before them: the same function in eval mode, in one layer instead of two."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

from students.detector import Detector

TOLERANCE = 1e-3  # of the largest value of a map; rounding in float32 makes it 1e-6 to 1e-4
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d)


@torch.no_grad()
def fold_norms(detector: Detector, images: Tensor) -> Detector:
    """A detector that predicts the same in eval mode with fewer layers; what it does not change it shares.

    A norm is folded where one pass shows that a convolution's output goes into this norm and nowhere else, and that
    both run once. Layers that only help training are merged first, see `Detector.deployed`.

    Args:
        detector: in eval mode; it stays as it is.
        images: (B, 3, H, W) in [0, 1], on its device; one or two are enough.

    Returns:
        A copy in eval mode, whose parameters want no gradient. Its predictions for the images differ by `TOLERANCE` of
        the largest value of each map at most; where they would by more, the detector itself.
    """
    deployed = detector.deployed()
    tensors = dict([*detector.named_parameters(), *detector.named_buffers()])
    if deployed is detector:
        deployed = copy.deepcopy(detector, {id(tensor): tensor for tensor in tensors.values()})
    else:
        _share(deployed, tensors)
    for conv, norm in _find_pairs(deployed, images):
        layer = deployed.get_submodule(conv)
        layer.weight, layer.bias = (x.requires_grad_(False) for x in fold_norm(layer, deployed.get_submodule(norm)))
        parent, _, leaf = norm.rpartition(".")
        setattr(deployed.get_submodule(parent), leaf, _rest(deployed.get_submodule(norm)))
    return deployed if largest_difference(deployed(images), detector(images)) <= TOLERANCE else detector


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the convolution that does what a convolution and a batch norm do in eval mode."""
    statistics = norm.running_mean, norm.running_var, norm.eps
    return fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)


def largest_difference(output: NamedTuple, expected: NamedTuple) -> float:
    """Of two outputs of one kind, as a share of the largest value of each level's map; NaN where there is one."""
    return level_differences(output, expected, lambda x: x.abs().max()).max().item()


def level_differences(output: NamedTuple, expected: NamedTuple, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each level's map, how large the difference of two outputs of one kind is against what was expected."""
    return torch.stack(
        [
            size(one.float() - other.float()) / size(other.float()).clamp(min=1e-6)
            for levels, others in zip(output, expected)
            for one, other in zip(levels, others)
            if other.numel()
        ]
    )


@dataclass
class _Outcome:
    """What becomes of a convolution's output."""

    conv: str
    norms: list[str] = field(default_factory=list)  # that take it as a whole
    read: bool = False  # by anything else


class _Watch(TorchFunctionMode):
    """Follows the outputs of convolutions through a pass, by the functions and norms that read them."""

    def __init__(self, convs: dict[int, str]):
        super().__init__()
        self.convs = convs  # by the identity of their weights
        self.outcomes: dict[int, _Outcome] = {}
        self.outputs: list[Tensor] = []  # held, or another tensor could get the identity of one
        self.within: int | None = None  # what the norm that is running was given

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(True for _ in _tensors(result)):  # what gives none asked for a shape, or the like
            self.read((args, kwargs))
        if func is F.conv2d:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if id(weight) in self.convs:
                self.outcomes[id(result)] = _Outcome(self.convs[id(weight)])
                self.outputs.append(result)
        return result

    def read(self, values: Any) -> None:
        for tensor in _tensors(values):
            if id(tensor) in self.outcomes and id(tensor) != self.within:
                self.outcomes[id(tensor)].read = True

    @contextmanager
    def hooks(self, norms: dict[str, nn.Module]) -> Iterator[None]:
        def enter(name: str):
            def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self.within = id(inputs[0])
                if self.within in self.outcomes:
                    self.outcomes[self.within].norms.append(name)

            return hook

        def leave(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.within = None

        handles = [norm.register_forward_pre_hook(enter(name)) for name, norm in norms.items()]
        handles += [norm.register_forward_hook(leave) for norm in norms.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _find_pairs(detector: Detector, images: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and norms that one layer can stand for."""
    modules = dict(detector.named_modules())
    # a hook of its own would see something else in the layer's place
    bare = {name: m for name, m in modules.items() if not (m._forward_hooks or m._forward_pre_hooks)}
    convs = {id(m.weight): name for name, m in bare.items() if isinstance(m, nn.Conv2d)}
    norms = {name: m for name, m in bare.items() if type(m) in NORMS and m.running_mean is not None}
    watch = _Watch(convs)
    with watch.hooks(norms), watch:
        output = detector(images)
    watch.read(output)
    outcomes = list(watch.outcomes.values())
    runs = [outcome.conv for outcome in outcomes] + [norm for outcome in outcomes for norm in outcome.norms]
    return [
        (outcome.conv, outcome.norms[0])
        for outcome in outcomes
        if len(outcome.norms) == 1
        and not outcome.read
        and runs.count(outcome.conv) == 1
        and runs.count(outcome.norms[0]) == 1
    ]


def _rest(norm: nn.Module) -> nn.Module:
    """What a norm does besides: timm's have an activation."""
    return norm.act if isinstance(norm, BatchNormAct2d | FrozenBatchNormAct2d) else nn.Identity()


def _share(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts tensors in the place of equal ones of the same name."""
    for name, own in [*module.named_parameters(), *module.named_buffers()]:
        other = tensors.get(name)
        if other is not None and own.shape == other.shape and torch.equal(own, other):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, other)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
