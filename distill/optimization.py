"""The optimizer and its learning rate, a function of the step alone, so that a resumed run needs no scheduler state."""

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

FUSED = ("cpu", "cuda")  # kinds of devices with a fused kernel


def build_optimizer(module: nn.Module, lr: float, backbone_lr: float, weight_decay: float) -> AdamW:
    """AdamW over all parameters; norms and biases (one dimension or none) do not decay.

    PyTorch's fused kernel, where there is one: on a CPU it takes a quarter of the time, and on a GPU it waits for
    nothing. It goes through a parameter, its gradient and its averages in the order that each lies in memory.

    Args:
        module: what to train; parameters below a module called `backbone` get their own rate.
        lr: learning rate.
        backbone_lr: the backbone's rate, as a share of `lr`.
        weight_decay: decoupled weight decay.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            # torchvision keeps the pyramid in its backbones; it is new, as other necks are
            backbone = "backbone" in parts and "fpn" not in parts
            groups.setdefault((backbone, parameter.dim() > 1), []).append(parameter)
    fused = all(p.device.type in FUSED for parameters in groups.values() for p in parameters)
    optimizer = AdamW(
        [
            {"params": p, "lr": lr * (backbone_lr if backbone else 1), "weight_decay": weight_decay if decays else 0.0}
            for (backbone, decays), p in groups.items()
        ],
        fused=fused,
    )
    optimizer.register_step_pre_hook(align)
    return optimizer


@torch.no_grad()
def align(optimizer: Optimizer, *arguments: object) -> None:
    """Lays gradients and averages out in memory as their parameters are, where a cut or a checkpoint has undone it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and not lie_alike(p.grad, p):
                p.grad = torch.empty_like(p).copy_(p.grad)
            state = optimizer.state.get(p, {})
            for name, value in state.items():
                if value.shape == p.shape and not lie_alike(value, p):
                    state[name] = torch.empty_like(p).copy_(value)


def lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    if one.stride() == other.stride():
        return True
    return all(a == b for a, b, size in zip(one.stride(), other.stride(), one.shape) if size > 1)


def rate_at(step: int, total: int, warmup: int, final: float, cut_step: int | None = None, rewarm: int = 0) -> float:
    """The learning rate as a share of its peak: linear warm-up, cosine to `final`, a short ramp again after a cut.

    Args:
        step: steps done before this one.
        total: steps of the whole run.
        warmup: steps of the first ramp.
        final: share of the peak at the end.
        cut_step: the step before which the last cut was made.
        rewarm: steps of the ramp after it.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    rate = final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    if cut_step is not None and step - cut_step < rewarm:
        rate *= (step - cut_step + 1) / (rewarm + 1)
    return rate


def set_rate(optimizer: Optimizer, share: float) -> None:
    """Sets every group to this share of its own peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault("initial_lr", group["lr"])
