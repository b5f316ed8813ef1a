"""Which modules of a network are a residual branch: what goes in comes out again, and what the branch adds to it."""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill.pruning.rules import bind, operation_name, tensors_in
from students import Detector, Plan
from students.plan import apply_plan

Version = int  # of a tensor: another one after every operation that writes into it


@dataclass(frozen=True)
class Block:
    """A module that gives its input plus something.

    Attributes:
        name: within the detector.
        stays: the name, within the module, of what comes after the sum, such as `act2`; empty if nothing does.
    """

    name: str
    stays: str = ""


def find_blocks(detector: Detector, image_size: tuple[int, int]) -> list[Block]:
    """All modules that give input + f(input), or a norm or activation of that sum, in the order of the network.

    Found by following a run on the meta device, so it does not matter what the modules are called, nor of which class
    they are. Of modules within each other it is the innermost; one that runs several times must do so alike. A sum may
    have several branches, as in transformer blocks; they are one block.

    Args:
        detector: any; it is not touched.
        image_size: height and width, pixels.
    """
    skeleton = copy.deepcopy(detector).to("meta").eval()
    image = torch.empty(1, 3, *image_size, device="meta")
    places = Counter(module for _, module in skeleton.named_modules(remove_duplicate=False))
    # one that stands in several places would have to go from all of them
    names = {module: name for name, module in skeleton.named_modules() if name and places[module] == 1}
    sums = _Sums()
    with torch.no_grad(), sums:
        hooks = [module.register_forward_pre_hook(sums.enter) for module in names]
        hooks += [module.register_forward_hook(sums.leave) for module in names]
        skeleton.traced(skeleton(image), num_boxes=2)
        for hook in hooks:
            hook.remove()
    found = [Block(names[module], stays.pop()) for module, stays in sums.found.items() if len(stays) == 1]
    found = [block for block in found if block.stays is not None and _owns_weights(skeleton, block)]
    order = {name: place for place, name in enumerate(names.values())}
    inner = [a for a in found if not any(b.name.startswith(f"{a.name}.") for b in found)]
    inner.sort(key=lambda block: order[block.name])
    if _runs_without(skeleton, inner, image):
        return inner
    return [block for block in inner if _runs_without(skeleton, [block], image)]


def without(blocks: Iterable[Block]) -> Plan:
    """The plan that takes blocks out."""
    return Plan((), blocks=tuple((block.name, block.stays) for block in blocks))


class _Call:
    """A module while it runs, and afterwards as its caller sees it."""

    def __init__(self, module: nn.Module, entered: list[Version]):
        self.module, self.entered = module, entered
        self.inner: list[_Call] = []
        self.left: Version = -1


class _Sums(TorchDispatchMode):
    """Follows which tensors are sums of which, and what modules make of their input.

    Attributes:
        found: by module, for each of its runs what stays once its branch goes, as in `Block`; None for a run that does
            not give a sum with its input.
    """

    def __init__(self):
        super().__init__()
        self.found: dict[nn.Module, set[str | None]] = {}
        self._calls: list[_Call] = []
        self._versions: dict[int, Version] = {}
        self._summands: dict[Version, tuple[Version, ...]] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        summands: tuple[Version, ...] = ()
        if operation_name(function) == "add":
            given = bind(function, args, kwargs or {})
            parts = tensors_in([given["self"], given["other"]])
            if len(parts) == 2 and parts[0].shape == parts[1].shape and given.get("alpha", 1) == 1:
                summands = tuple(map(self._version, parts))
        out = function(*args, **(kwargs or {}))
        if operation_name(function) != "detach":
            for x in tensors_in(out):
                self._summands[self._renew(x)] = summands
        return out

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self._calls.append(_Call(module, [self._version(x) for x in tensors_in(inputs)]))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        call = self._calls.pop()
        stays = None
        if isinstance(output, Tensor):
            call.left = self._version(output)
            # torch's own layers have nothing to take out of them
            if len(call.entered) == 1 and call.inner:
                stays = self._stays(call)
            if self._calls:
                self._calls[-1].inner.append(call)
        self.found.setdefault(module, set()).add(stays)

    def _stays(self, call: _Call) -> str | None:
        (entered,) = call.entered
        if self._leads(call.left, entered):
            return ""
        inside = {module: name for name, module in call.module.named_modules() if name}
        for last in call.inner:
            weights = any(p.dim() > 1 for p in last.module.parameters())
            if last.left == call.left and len(last.entered) == 1 and not weights and last.module in inside:
                return inside[last.module] if self._leads(last.entered[0], entered) else None
        return None

    def _leads(self, version: Version, entered: Version) -> bool:
        """Whether a tensor is a sum that has what entered, once, among its summands."""
        summands = self._summands.get(version, ())
        return sum(part == entered or self._leads(part, entered) for part in summands) == 1

    def _version(self, x: Tensor) -> Version:
        return self._versions[id(x)] if id(x) in self._versions else self._renew(x)

    def _renew(self, x: Tensor) -> Version:
        self._versions[id(x)] = len(self._alive)
        self._alive.append(x)
        return self._versions[id(x)]


def _owns_weights(detector: nn.Module, block: Block) -> bool:
    return any(p.dim() > 1 for p in detector.get_submodule(block.name).parameters())


def _runs_without(detector: Detector, blocks: list[Block], image: Tensor) -> bool:
    """Whether code outside of blocks can do without them, forwards and backwards."""
    trial, image = copy.deepcopy(detector), image.clone().requires_grad_()
    try:
        apply_plan([(trial, without(blocks))])
        with torch.enable_grad():
            sum(x.sum() for x in trial.traced(trial(image), num_boxes=2)).backward()
    except Exception:  # whatever the network's code says where it reads something of the block
        return False
    return True
