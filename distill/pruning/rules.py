"""How channels run through each ATen operation: which labels are the same channel, and what labels its output has.

A rule gets what is known so far, the operation's arguments by name and its result; it gives the labels of the result, a
list of them where the result is several tensors.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.pruning.channels import FIXED, Channels, Labels
from students.plan import loses_whole_groups

Rule = Callable[[Channels, dict[str, Any], Any], Labels | list[Labels]]


def operation_name(function: Any) -> str:
    """Without namespace, overload, and the mark of an operation in place."""
    return function._schema.name.partition("::")[2].rstrip("_")


def bind(function: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an ATen operation by name, defaults included."""
    bound = {a.name: a.default_value for a in function._schema.arguments if a.has_default_value()}
    return bound | {a.name: value for a, value in zip(function._schema.arguments, args)} | kwargs


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors among the arguments or results of an operation, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [x for value in values for x in tensors_in(value)] if isinstance(values, list | tuple) else []


def pointwise(c: Channels, args: dict[str, Any], out: Any) -> Labels:
    """Every entry by itself, shapes broadcast."""
    first = tensors_in(out)[0]
    found: Labels = []
    for back in range(first.dim(), 0, -1):
        size = first.shape[-back]
        met = [c[x][-back] for x in tensors_in(args) if x.dim() >= back and x.shape[-back] == size > 1]
        label = met[0] if met else None
        for other in met[1:]:
            if label is not None or other is not None:
                label = c.same(label, other)
        found.append(label)
    return found


def convolution(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    x, weight = c[args["input"]], c[args["weight"]]
    c.freeze([*x[2:], *weight[2:]], f"a convolution runs along it, in {c.here}")
    made, read = (weight[1], weight[0]) if args["transposed"] else weight[:2]
    groups = args["groups"]
    if groups > 1:
        made = _grouped(c, x[1], made, read, groups, args)
    elif x[1] is not None or read is not None:
        c.same(x[1], read)
    if args["bias"] is not None and made is not None:
        c.same(made, c[args["bias"]][0])
    return [x[0], made, *[None] * (out.dim() - 2)]


def _grouped(
    c: Channels, x: np.ndarray, made: np.ndarray | None, read: np.ndarray | None, groups: int, args: dict[str, Any]
) -> np.ndarray | None:
    """Either whole groups go (in a depthwise convolution they are single channels), or a place in every group."""
    if args["transposed"] or x is None or made is None:
        c.freeze([x, made, read], f"a grouped convolution in {c.here}")
        return made
    if not isinstance(c.running[-1], nn.modules.conv._ConvNd):  # code of its own, such as a blur, keeps the number
        c.follow_numbers([x])
    inputs, outputs = x.reshape(groups, -1), made.reshape(groups, -1)
    if loses_whole_groups(args["weight"]):
        c.same(inputs, inputs[:, :1])
        c.same(outputs, inputs[:, :1])
        c.freeze([read], "its group of a convolution stays or goes as one")
    else:
        c.same(inputs, read)
        c.same(outputs, outputs[:1])
    return made


def batch_norm(c: Channels, args: dict[str, Any], out: Sequence[Tensor]) -> list[Labels]:
    x = c[args["input"]]
    for key in ("weight", "bias", "running_mean", "running_var"):
        if args.get(key) is not None and (x[1] is not None or args[key].numel() > 1):
            c.same(x[1], c[args[key]][0])
    return [x, *([x[1]] if o.shape == args["input"].shape[1:2] else [None] * o.dim() for o in tensors_in(out)[1:])]


def group_norm(c: Channels, args: dict[str, Any], out: Sequence[Tensor]) -> list[Labels]:
    x, sets = c[args["input"]], None
    if args["group"] > 1 and x[1] is not None:  # one group is a layer norm: each channel may go by itself
        sets = x[1].reshape(args["group"], -1)
        c.same(sets, sets[:, :1])
        sets = sets[:, 0]
    for key in ("weight", "bias"):
        if args[key] is not None and x[1] is not None:
            c.same(x[1], c[args[key]][0])
    return [x, *([None, sets] for _ in tensors_in(out)[1:])]


def layer_norm(c: Channels, args: dict[str, Any], out: Sequence[Tensor]) -> list[Labels]:
    """Also RMS norm. Statistics are afterwards those of the channels that are left."""
    x = c[args["input"]]
    for key in ("weight", "bias"):
        if args.get(key) is not None:
            for back in range(1, args[key].dim() + 1):
                if args[key].shape[-back] > 1:
                    c.same(x[-back], c[args[key]][-back])
    return [x, *([None] * o.dim() for o in tensors_in(out)[1:])]


def matrix_product(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    """mm, addmm, bmm and baddbmm: inputs (.., N, K) and (.., K, M), and what is added to their product."""
    *added, one, other = tensors_in(args)
    one, other = c[one], c[other]
    if one[-1] is not None or other[-2] is not None:
        c.same(one[-1], other[-2])
    found = [*one[:-1], other[-1]]
    if len(found) == 3 and (one[0] is not None or other[0] is not None):
        found[0] = c.same(one[0], other[0])
    for x in added:
        for back, label in enumerate(reversed(c[x]), start=1):
            if x.shape[-back] > 1 and (label is not None or found[-back] is not None):
                found[-back] = c.same(found[-back], label)
    return found


def spatial(dims: int) -> Callable:
    """Pooling, resizing and padding: the last `dims` dimensions are positions, the others stay as they are."""

    def rule(c: Channels, args: dict[str, Any], out: Any) -> Labels | list[Labels]:
        x = c[tensors_in(args)[0]]
        c.freeze(x[-dims:], f"it is resized in {c.here}")
        found = [[*x[:-dims], *[None] * dims] for _ in tensors_in(out)]
        return found[0] if len(found) == 1 else found

    return rule


def statistic(c: Channels, args: dict[str, Any], out: Any) -> Labels | list[Labels]:
    """Mean, sum, norm or extreme over some dimensions: over channels, it is afterwards that of those which are left."""
    x = tensors_in(args)[0]
    given = args.get("dim")
    given = range(x.dim()) if given is None or given == [] else [given] if isinstance(given, int) else given
    gone = {dim % x.dim() for dim in given}
    if args.get("keepdim"):
        found = [None if dim in gone else label for dim, label in enumerate(c[x])]
    else:
        found = [label for dim, label in enumerate(c[x]) if dim not in gone]
    number = len(tensors_in(out))
    return found if number == 1 else [found] * number


def along(c: Channels, args: dict[str, Any], out: Any) -> Labels:
    """Softmax and running sums: along channels they are not followed."""
    x = list(c[args["self"]])
    c.freeze([x[args["dim"]]], f"it is summed along in {c.here}")
    return x


def view(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    """Any change of shape alone. Where channels are split in two dimensions, one of these goes on as the channels."""
    x = args["self"]
    old = [(size, label) for size, label in zip(x.shape, c[x]) if size != 1]
    new = [(dim, size) for dim, size in enumerate(out.shape) if size != 1]
    found: Labels = [None] * out.dim()
    while old and new:
        before, after = [old.pop(0)], [new.pop(0)]
        while (have := math.prod(size for size, _ in before)) != (want := math.prod(size for _, size in after)):
            (before if have < want else after).append((old if have < want else new).pop(0))
        labels = [label for _, label in before if label is not None]
        if len(before) == len(after) == 1:
            found[after[0][0]] = before[0][1]
        elif len(labels) > 1:
            c.freeze(labels, f"two widths become one in {c.here}")
        elif labels:
            grid = np.empty([size for size, _ in before], dtype=np.int64)
            shape = [1 if label is None else size for size, label in before]
            grid[...] = labels[0].reshape(shape)
            grid = grid.reshape([size for _, size in after])
            carrier = _carrier(grid)
            rest = tuple(slice(None) if axis == carrier else slice(0, 1) for axis in range(grid.ndim))
            c.same(grid, grid[rest])
            found[after[carrier][0]] = grid[rest].ravel()
    return found


def _carrier(grid: np.ndarray) -> int:
    """The axis that alone tells channels apart; where all do, the longest, so that the fewest channels are tied."""
    for axis in range(grid.ndim):
        rest = tuple(slice(None) if other == axis else slice(0, 1) for other in range(grid.ndim))
        if (grid == grid[rest]).all():
            return axis
    return int(np.argmax(grid.shape))


def expand(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    """What is repeated is repeated as often as there are channels in what it meets."""
    x = args["self"]
    labels = [None] * (out.dim() - x.dim()) + c[x]
    sizes = [1] * (out.dim() - x.dim()) + list(x.shape)
    return [
        label if old == size else c.new("", dim, size)
        for dim, (label, old, size) in enumerate(zip(labels, sizes, out.shape))
    ]


def permute(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    x = c[args["self"]]
    if "dims" in args:
        return [x[dim] for dim in args["dims"]]
    if "dim0" in args:
        x = list(x)
        x[args["dim0"]], x[args["dim1"]] = x[args["dim1"]], x[args["dim0"]]
        return x
    return x[::-1]


def slice_channels(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    x, dim = list(c[args["self"]]), args["dim"]
    if x[dim] is not None:
        whole = x[dim]
        start, end, _ = slice(args["start"], args["end"]).indices(len(whole))
        x[dim] = whole[start : end : args["step"]]
        if len(x[dim]) < len(whole):
            c.follow_numbers([x[dim], whole[:start], whole[:end], whole])
    return x


def split(c: Channels, args: dict[str, Any], out: Sequence[Tensor]) -> list[Labels]:
    """Into parts of equal size, whose channels go together, or of sizes given one by one."""
    x, dim = c[args["self"]], args["dim"]
    if x[dim] is None:
        found = [x for _ in out]
    else:
        parts = np.split(x[dim], np.cumsum([part.shape[dim] for part in out])[:-1])
        found = [[part if d == dim % len(x) else label for d, label in enumerate(x)] for part in parts]
        if "split_size" in args:
            if len({len(part) for part in parts}) > 1:
                c.freeze(parts, f"it is split into unequal parts in {c.here}")
            else:
                c.same(np.stack(parts), parts[0])
        c.follow_numbers([*parts, x[dim]])
    return found[0] if len(found) == 1 else found


def pick(c: Channels, args: dict[str, Any], out: Any) -> Labels | list[Labels]:
    """select and unbind: one index of a dimension, whose place says what it is."""
    x = list(c[args["self"]])
    c.freeze([x.pop(args["dim"])], f"it is read by its place in {c.here}")
    return x if isinstance(out, Tensor) else [x for _ in out]


def join(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    """cat: one after the other along a dimension; the others are the same."""
    parts = [x for x in args["tensors"] if x.dim() == out.dim()]
    labels, dim = [c[x] for x in parts], args["dim"] % out.dim()
    found: Labels = []
    for d in range(out.dim()):
        met = [label[d] for label in labels]
        if all(label is None for label in met):
            found.append(None)
        elif d == dim:
            sizes = [x.shape[d] for x in parts]
            found.append(np.concatenate([np.full(n, FIXED) if m is None else m for n, m in zip(sizes, met)]))
        else:
            label = met[0]
            for other in met[1:]:
                label = c.same(label, other)
            found.append(label)
    return found


def stack(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    found = pointwise(c, args, [args["tensors"][0]])
    found.insert(args["dim"] % out.dim(), None)
    return found


def pad(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    x = list(c[args["self"]])
    for back, (low, high) in enumerate(zip(args["pad"][::2], args["pad"][1::2]), start=1):
        if x[-back] is not None:
            kept = x[-back][max(0, -low) : len(x[-back]) + min(0, high)]
            x[-back] = np.pad(kept, (max(0, low), max(0, high)), constant_values=FIXED)
    return x


def roi_align(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    return [None, c[args["input"]][1], None, None]


def fresh(c: Channels, args: dict[str, Any], out: Tensor) -> Labels:
    """A new tensor that takes only its type and device from another."""
    return [None] * out.dim()


# fmt: off
STATISTICS = ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "linalg_vector_norm",
              "norm", "prod", "logsumexp", "any", "all")
POINTWISE = ("alias", "clone", "contiguous", "copy", "detach", "dropout", "empty_like", "fill", "full_like",
             "hardswish", "lift_fresh", "native_dropout", "ones_like", "_prelu_kernel", "rand_like", "_to_copy", "zero",
             "zeros_like", "bernoulli")
VIEWS = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "_reshape_alias", "flatten")
# fmt: on
RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(STATISTICS, statistic),
    **dict.fromkeys(VIEWS, view),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), matrix_product),
    **dict.fromkeys(("permute", "transpose", "t"), permute),
    **dict.fromkeys(("split", "split_with_sizes"), split),
    **dict.fromkeys(("select", "unbind"), pick),
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum"), along),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), fresh),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"), batch_norm),
    "native_group_norm": group_norm,
    "convolution": convolution,
    "expand": expand,
    "slice": slice_channels,
    "cat": join,
    "stack": stack,
    "constant_pad_nd": pad,
    "roi_align": roi_align,
}


def find_rule(function: Any) -> Rule | None:
    """The rule of an ATen operation; None for one that cannot be followed."""
    name = operation_name(function)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in function.tags:
        return pointwise
    dims = re.search(r"([123])d", name)
    return spatial(int(dims[1])) if dims and re.search("pool|upsample|_pad", name) else None
