"""What removed channels gave on average goes on being given: by a bias, or by the mean that a norm takes off.

A channel that gives the same everywhere, such as beta behind an activation where its batch norm's scale is 0, can so be
cut without any change, but for the borders that zeros pad (where the channel gave nothing); one that varies leaves the
best constant in its place. The norms' own statistics see the rest, see `distill.pruning.recalibrate`.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from distill.measure import eval_mode
from students import Plan, apply_plan


@torch.no_grad()
def measure_offsets(detector: nn.Module, plan: Plan, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """What has to be added to biases and running means in place of the channels that a plan takes.

    Convolutions and linear layers that read such channels are looked at; one without a bias that no batch norm follows
    (frozen ones count) can give nothing in return, nor can grouped and transposed convolutions.

    Args:
        detector: as it is before the cut; it stays so.
        plan: made for it. For blocks that go nothing is given: their input goes on being given by itself; channels are
            measured without them.
        batches: images (B, 3, H, W) in [0, 1]; every rank must be given the same.

    Returns:
        By tensor name, (width before the cut,).
    """
    if plan.blocks:
        detector = copy.deepcopy(detector)
        apply_plan([(detector, Plan((), blocks=plan.blocks))])
    gone = _channels_gone(detector, plan)
    if not gone:
        return {}
    sums: dict[str, Tensor] = {}
    positions: dict[str, int] = {}
    outputs: dict[str, tuple[str, float]] = {}  # by the tensor to change: the layer, and the sign
    last: tuple[Tensor, str, Tensor, int] | None = None  # what ran last and has no bias

    def add(tensor: str, layer: str, sign: float, total: Tensor, number: int) -> None:
        outputs[tensor] = (layer, sign)
        sums[tensor] = sums.get(tensor, 0) + total
        positions[tensor] = positions.get(tensor, 0) + number

    def read(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal last
            x = inputs[0]
            channels = 1 if isinstance(layer, nn.modules.conv._ConvNd) else x.dim() - 1
            others = [dim for dim in range(x.dim()) if dim != channels]
            total = x.sum(dim=others, dtype=torch.promote_types(x.dtype, torch.float32))[gone[name]]
            number = x.numel() // x.shape[channels]
            last = (output, name, total, number) if layer.bias is None else None
            if layer.bias is not None:
                add(f"{name}.bias", name, 1.0, total, number)

        return hook

    def normalise(name: str):
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if last is not None and inputs[0] is last[0]:
                add(f"{name}.running_mean", last[1], -1.0, *last[2:])

        return hook

    handles = [detector.get_submodule(name).register_forward_hook(read(name)) for name in gone]
    for name, module in detector.named_modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            handles.append(module.register_forward_pre_hook(normalise(name)))
    try:
        with eval_mode(detector):
            for images in batches:
                detector(images)
    finally:
        for handle in handles:
            handle.remove()
    offsets = {}
    for tensor, (layer, sign) in outputs.items():
        weight = detector.get_parameter(f"{layer}.weight").float().index_select(1, gone[layer])
        offsets[tensor] = (
            sign * (weight.flatten(2).sum(dim=2) if weight.dim() > 2 else weight) @ (sums[tensor] / positions[tensor])
        )
    return offsets


@torch.no_grad()
def add_offsets(detector: nn.Module, plan: Plan, offsets: Mapping[str, Tensor]) -> None:
    """Adds what `measure_offsets` found to a detector that the plan has been applied to."""
    kept = {name: cut.keep for cut in plan.cuts for name, dim in cut.slices if dim == 0}
    for name, offset in offsets.items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(detector.get_submodule(owner), leaf)
        left = offset[torch.tensor(kept[name], device=offset.device)] if name in kept else offset
        tensor.add_(left.to(tensor))


def _channels_gone(detector: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Input channels that plain convolutions and linear layers lose, by the layer's name."""
    gone = {}
    for cut in plan.cuts:
        indices = sorted(set(range(cut.width)) - set(cut.keep))
        for name, dim in cut.slices:
            layer = detector.get_submodule(name.rpartition(".")[0])
            plain = isinstance(layer, nn.Linear) or (
                isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and not layer.transposed
            )
            if plain and dim == 1 and name.endswith(".weight"):
                gone[name.removesuffix(".weight")] = torch.tensor(indices, device=layer.weight.device)
    return gone
