"""A cut as data: which indices of which tensors stay, and the one function that applies it to all or to nothing."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Cut:
    """What stays of one width that several tensors share.

    Attributes:
        width: entries before the cut.
        keep: indices that stay, ascending.
        slices: (tensor name, dimension) pairs that are cut so.
    """

    width: int
    keep: tuple[int, ...]
    slices: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Plan:
    """One pruning step. It holds names and indices only, so replaying it needs no tracing and no pruner.

    Attributes:
        cuts: what stays of the tensors.
        numbers: (dotted name, by how much it becomes less) of ints in which blocks keep a width beside their tensors,
            such as the one at which they split their channels; `0.splits.1` is the second of a list.
        blocks: (module name, what of it stays) of residual branches that go: the name, within the module, of what comes
            after the sum, such as `act2`; empty where the module's input itself stays. They go first: nothing of them
            is among the cuts.
    """

    cuts: tuple[Cut, ...]
    numbers: tuple[tuple[str, int], ...] = ()
    blocks: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_removed(cls, removed: dict[tuple[str, int | None], set[int]], tensors: dict[str, Tensor]) -> "Plan":
        """From the indices that go, by (tensor name, dimension); numbers have no dimension."""
        groups: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = {}
        numbers = []
        for (name, dim), gone in removed.items():
            if dim is None:
                numbers.append((name, len(gone)))
                continue
            width = tensors[name].shape[dim]
            keep = tuple(i for i in range(width) if i not in gone)
            if gone:
                groups.setdefault((width, keep), []).append((name, dim))
        cuts = tuple(Cut(width, keep, tuple(slices)) for (width, keep), slices in groups.items())
        return cls(cuts, tuple((name, less) for name, less in numbers if less))

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> "Plan":
        cuts = tuple(
            Cut(c["width"], tuple(c["keep"]), tuple((name, dim) for name, dim in c["slices"]))
            for c in data
            if "keep" in c
        )
        numbers = tuple((c["number"], c["less"]) for c in data if "number" in c)
        return cls(cuts, numbers, tuple((c["block"], c["stays"]) for c in data if "block" in c))

    def to_json(self) -> list[dict[str, Any]]:
        cuts = [{"width": c.width, "keep": list(c.keep), "slices": [list(s) for s in c.slices]} for c in self.cuts]
        numbers = ({"number": name, "less": less} for name, less in self.numbers)
        return [*({"block": name, "stays": stays} for name, stays in self.blocks), *cuts, *numbers]

    def below(self, prefix: str) -> "Plan":
        """The part of the plan that concerns tensors under `prefix`, with the prefix taken off their names."""
        cuts = (
            Cut(c.width, c.keep, tuple((n.removeprefix(prefix), d) for n, d in c.slices if n.startswith(prefix)))
            for c in self.cuts
        )
        numbers = ((name.removeprefix(prefix), less) for name, less in self.numbers if name.startswith(prefix))
        blocks = ((name.removeprefix(prefix), stays) for name, stays in self.blocks if name.startswith(prefix))
        return Plan(tuple(cut for cut in cuts if cut.slices), tuple(numbers), tuple(blocks))

    def __bool__(self) -> bool:
        return bool(self.cuts or self.blocks)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: all that a plan can cut."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def apply_plan(targets: Iterable[tuple[nn.Module, Plan]], optimizers: Sequence[Optimizer] = ()) -> None:
    """Applies one cut to every module that follows the student's shape and to optimizer state, or to nothing.

    Parameters keep their identity (their data is replaced), so optimizers, schedulers and Accelerate go on holding the
    live ones; of the optimizer state, tensors of the parameter's shape (momentum, exp_avg, exp_avg_sq and so on) are
    sliced alike and step counters stay. Gradients are dropped. `requires_grad` does not change. What a block had that
    goes leaves the optimizers, too. A distributed wrapper must be taken off first and rebuilt afterwards: it holds the
    old shapes.

    Raises:
        ValueError: a tensor or block is missing, or a tensor has another width than the plan was made for; nothing has
            changed then.
        RuntimeError: something else went wrong on the way, such as memory that ran out; it names the layer and the
            first layer of its group, and nothing has changed then either.
    """
    targets = list(targets)
    changes: list[tuple[Any, str, Any]] = []  # (owner, attribute or key, new value)
    for module, plan in targets:
        changes += _stage(module, plan, optimizers) + _stage_blocks(module, plan.blocks, optimizers)
    done: list[tuple[Any, str, Any]] = []
    try:
        for owner, key, value in changes:
            done.append((owner, key, _get(owner, key)))
            _set(owner, key, value)
    except BaseException as error:
        for owner, key, value in reversed(done):
            _set(owner, key, value)
        if isinstance(error, Exception) and done:
            raise RuntimeError(f"{_place(done[-1][0], targets, optimizers)}: {error}; nothing was cut") from error
        raise


def _place(owner: Any, targets: Sequence[tuple[nn.Module, Plan]], optimizers: Sequence[Optimizer]) -> str:
    """What a change concerned, in words: the layer and the group that is cut there."""
    owner = next((p for optimizer in optimizers for p, state in optimizer.state.items() if state is owner), owner)
    for module, plan in targets:
        for layer, part in module.named_modules():
            if not any(owner is other for other in (part, part._buffers, *part._parameters.values())):
                continue
            slices = (cut.slices for cut in plan.cuts)
            group = next((s[0][0] for s in slices if any(name.rpartition(".")[0] == layer for name, _ in s)), layer)
            return f"plan: cutting {layer}, of the group of {group.removesuffix('.weight')}, failed"
    return "plan: cutting failed"


def _stage(module: nn.Module, plan: Plan, optimizers: Sequence[Optimizer]) -> list[tuple[Any, str, Any]]:
    """Everything that the plan changes, computed without changing anything."""
    tensors = named_tensors(module)
    by_tensor: dict[str, list[tuple[int, Cut]]] = {}
    for cut in plan.cuts:
        for name, dim in cut.slices:
            if name not in tensors:
                raise ValueError(f"plan: cuts {name!r}, which this network does not have")
            if tensors[name].shape[dim] != cut.width:
                found = tensors[name].shape[dim]
                raise ValueError(f"plan: was made for {name!r} of width {cut.width}; here it is {found}")
            by_tensor.setdefault(name, []).append((dim, cut))

    changes: list[tuple[Any, str, Any]] = []
    new_shapes: dict[nn.Module, dict[str, torch.Size]] = {}
    for name, cuts in by_tensor.items():
        owner_name, _, leaf = name.rpartition(".")
        owner, old = module.get_submodule(owner_name), tensors[name]
        new = _slice(old.detach(), cuts)
        new_shapes.setdefault(owner, {})[leaf] = new.shape
        if not isinstance(old, nn.Parameter):
            changes.append((owner._buffers, leaf, new))
            continue
        # the gradient first: on the way back it must come after the data, whose shape it has
        changes += [(old, "grad", None), (old, "data", new)]
        for optimizer in optimizers:
            state = optimizer.state.get(old, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == old.shape:
                    changes.append((state, key, _slice(value, cuts)))
    for owner, shapes in new_shapes.items():
        changes += [(owner, key, value) for key, value in _new_widths(owner, shapes).items()]
    return changes + _stage_numbers(module, plan.numbers)


def _stage_numbers(module: nn.Module, numbers: Sequence[tuple[str, int]]) -> list[tuple[Any, str, Any]]:
    found: dict[tuple[nn.Module, str], Any] = {}
    for name, less in numbers:
        path, _, key = name.rpartition(".")
        place = int(key) if key.isdigit() else None
        if place is not None:
            path, _, key = path.rpartition(".")
        try:
            owner = module.get_submodule(path)
            old = found.get((owner, key), getattr(owner, key))
            new = old - less if place is None else type(old)([*old[:place], old[place] - less, *old[place + 1 :]])
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"plan: changes the number {name!r}, which this network does not have") from error
        found[(owner, key)] = new
    return [(owner, key, value) for (owner, key), value in found.items()]


def _stage_blocks(
    module: nn.Module, blocks: Sequence[tuple[str, str]], optimizers: Sequence[Optimizer]
) -> list[tuple[Any, str, Any]]:
    """Other modules in the place of blocks, and optimizers without what only the blocks had."""
    changes: list[tuple[Any, str, Any]] = []
    staying = []
    for name, stays in blocks:
        parent, _, key = name.rpartition(".")
        try:
            block = module.get_submodule(name)
            left = block.get_submodule(stays) if stays else nn.Identity().train(block.training)
        except AttributeError as error:
            raise ValueError(f"plan: removes {name!r}, which this network does not have") from error
        changes.append((module.get_submodule(parent)._modules, key, left))
        # what comes in now belongs to someone else
        changes += [(part, "inplace", False) for part in left.modules() if getattr(part, "inplace", False)]
        staying.append(left)
    prefixes = tuple(f"{name}." for name, _ in blocks)
    everything = list(module.named_parameters(remove_duplicate=False))
    kept = {p for name, p in everything if not name.startswith(prefixes)} | {p for m in staying for p in m.parameters()}
    gone = {p for _, p in everything} - kept
    for optimizer in optimizers:
        groups = optimizer.param_groups
        if not gone & {p for group in groups for p in group["params"]}:  # an averaged copy is nobody's
            continue
        changes += [(group, "params", [p for p in group["params"] if p not in gone]) for group in groups]
        state = {p: value for p, value in optimizer.state.items() if p not in gone}
        changes.append((optimizer, "state", defaultdict(dict, state)))
    return changes


def _slice(tensor: Tensor, cuts: list[tuple[int, Cut]]) -> Tensor:
    # index_select always gives rows first, so what lay channels-last must be put so again
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    for dim, cut in cuts:
        tensor = tensor.index_select(dim, torch.tensor(cut.keep, device=tensor.device, dtype=torch.long))
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def loses_whole_groups(weight: Tensor) -> bool:
    """Whether a grouped convolution loses groups as wholes; otherwise each group loses the same places.

    Groups of up to 16 inputs go whole: single channels where it is depthwise, and the widths that their architects gave
    to groups stay. Of wider groups (and so mostly fewer) all stay, and become narrower.

    Args:
        weight: (outputs, inputs of one group, ...) of the convolution before the cut.
    """
    return weight.shape[1] <= 16


def _new_widths(module: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, Any]:
    """The width attributes that a layer keeps beside its tensors."""
    shape = shapes.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd) and shape is not None:
        if module.transposed:
            return {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
        groups = module.groups
        if groups > 1 and loses_whole_groups(module.weight):
            groups = shape[0] * groups // module.out_channels
        return {"out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}
    if isinstance(module, nn.Linear) and shape is not None:
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {"num_features": next(iter(shapes.values()))[0]}
    if isinstance(module, nn.GroupNorm) and shape is not None:
        if module.num_groups == 1:
            return {"num_channels": shape[0]}
        group_size = module.num_channels // module.num_groups
        if shape[0] % group_size:
            raise ValueError(f"plan: leaves {shape[0]} channels to a group norm with groups of {group_size}")
        return {"num_channels": shape[0], "num_groups": shape[0] // group_size}
    if hasattr(module, "normalized_shape") and shape is not None:
        return {"normalized_shape": tuple(shape)}
    return {}


def _get(owner: Any, key: str) -> Any:
    return owner[key] if isinstance(owner, dict) else getattr(owner, key)


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[key] = value
    else:
        setattr(owner, key, value)
