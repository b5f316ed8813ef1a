"""Runs a student without computing anything, operation by operation: once to follow its channels, then to see a cut."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill.distiller import Distiller
from distill.pruning.channels import Channels, Labels
from distill.pruning.rules import bind, find_rule, operation_name, tensors_in


class Step(NamedTuple):
    """One operation that channels run through.

    Attributes:
        number: how many operations ran before it.
        operation: its name without namespace and overload.
        module: the innermost module that it ran in.
        inputs: all labels that went in.
        outputs: for each tensor that came out, its shape and labels.
    """

    number: int
    operation: str
    module: nn.Module
    inputs: list[np.ndarray]
    outputs: list[tuple[tuple[int, ...], Labels]]

    @property
    def labels(self) -> list[np.ndarray]:
        """All that went in or came out."""
        return self.inputs + [label for _, labels in self.outputs for label in labels if label is not None]


def counts(function: Any) -> bool:
    """Whether an operation has a number: torch puts in a detach here and there, and not in every run alike."""
    return operation_name(function) != "detach"


class Tracer(TorchDispatchMode):
    """Follows the channels of all that a unit computes.

    Attributes:
        channels: what was found.
        steps: every operation that a channel runs through, in order.
    """

    def __init__(self, unit: Distiller):
        super().__init__()
        self.unit, self.channels = unit, Channels(unit)
        self.steps: list[Step] = []
        self._number = -1

    def run(self, image: Tensor) -> None:
        """Traces the unit as it is, where the image is; best on the meta device."""
        hooks = [part.register_forward_pre_hook(self._enter) for part in self.unit.modules()]
        hooks += [part.register_forward_hook(self._leave) for part in self.unit.modules()]
        with torch.no_grad(), self:
            self.unit.traced_outputs(image)
        for hook in hooks:
            hook.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self.channels.running.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.channels.running.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._number += counts(function)
        out = function(*args, **(kwargs or {}))
        self._follow(function, bind(function, args, kwargs or {}), out)
        return out

    def _follow(self, function: Any, args: dict[str, Any], out: Any) -> None:
        channels, name, outputs = self.channels, operation_name(function), tensors_in(out)
        inputs = [label for x in tensors_in(args) for label in channels[x] if label is not None]
        if not inputs and name != "expand":
            return
        rule = find_rule(function)
        if rule is None:
            channels.freeze(inputs, f"{name} is not followed, in {channels.here}")
        else:
            found = rule(channels, args, out)
            for x, labels in zip(outputs, [found] if len(outputs) == 1 else found, strict=True):
                channels[x] = labels
        if counts(function):
            shapes = [(tuple(x.shape), channels[x]) for x in outputs]
            self.steps.append(Step(self._number, name, channels.running[-1], inputs, shapes))


class Rehearsal(TorchDispatchMode):
    """Runs a cut network and stops at the first operation that gives other widths than foretold.

    Attributes:
        number: of the operation that ran last.
    """

    def __init__(self, steps: Sequence[Step], kept: np.ndarray):
        super().__init__()
        self.steps, self.kept = {step.number: step for step in steps}, kept
        self.number = -1

    def passes(self, unit: Distiller, image: Tensor) -> bool:
        try:
            with torch.no_grad(), self:
                unit.traced_outputs(image)
        except Exception:  # whatever the network's code says to widths that it did not count on
            return False
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += counts(function)
        out = function(*args, **(kwargs or {}))
        step = self.steps.get(self.number) if counts(function) else None
        if step is not None:
            foretold = [self._shape(*output) for output in step.outputs]
            if operation_name(function) != step.operation or [tuple(x.shape) for x in tensors_in(out)] != foretold:
                raise ValueError("not as foretold")
        return out

    def _shape(self, shape: tuple[int, ...], labels: Labels) -> tuple[int, ...]:
        return tuple(n if label is None else int(self.kept[label].sum()) for n, label in zip(shape, labels))
