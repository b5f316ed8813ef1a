"""The optimizer and its learning rate, a function of the step alone, so that a resumed run needs no scheduler state."""

import math

from torch import nn
from torch.optim import AdamW, Optimizer


def build_optimizer(module: nn.Module, lr: float, backbone_lr: float, weight_decay: float) -> AdamW:
    """AdamW over all parameters; norms and biases (one dimension or none) do not decay.

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
    return AdamW(
        [
            {"params": p, "lr": lr * (backbone_lr if backbone else 1), "weight_decay": weight_decay if decays else 0.0}
            for (backbone, decays), p in groups.items()
        ]
    )


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
