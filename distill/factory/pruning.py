"""What a student loses while it is trained, from settings."""

import torch

from distill.distiller import Distiller
from distill.errors import UserError
from distill.pruning.blocks import BlockPruner
from distill.pruning.guard import CutGuard
from distill.pruning.masks import Masks
from distill.pruning.pruner import Pruner
from distill.pruning.sensitivity import read_curves
from distill.pruning.sparsity import SparsityPenalty
from distill.schema import Config, TimedSection


def build_pruner(config: Config, unit: Distiller, device: torch.device | None = None) -> Pruner | None:
    """The pruner, once it is known that its target can be reached; None where no channels are to be cut.

    Args:
        config: whose pruning section counts.
        unit: the uncut student with its adapters.
        device: where latency is measured, if that is the budget; None: where the student is.
    """
    if config.pruning is None or config.pruning.target is None:
        return None
    elsewhere = {*TimedSection.model_fields, "sensitivity", "warmup_steps", "evaluate"}
    elsewhere |= {"guard", "sparsity", "blocks", "masks"}
    curves = read_curves(config.pruning.sensitivity) if config.pruning.sensitivity else None
    settings = config.pruning.model_dump(exclude=elsewhere)
    pruner = Pruner(config.data.image_size, epochs=config.pruning.cut_epochs, curves=curves, device=device, **settings)
    pruner.check(unit)
    return pruner


def build_block_pruner(config: Config, unit: Distiller) -> BlockPruner | None:
    """What takes blocks out, once it is known that there are as many; None where none is to go."""
    blocks = config.pruning and config.pruning.blocks
    if not blocks:
        return None
    settings = blocks.model_dump(exclude=set(TimedSection.model_fields))
    pruner = BlockPruner(config.data.image_size, epochs=blocks.cut_epochs, **settings)
    pruner.check(unit)
    return pruner


def build_sparsity(config: Config, unit: Distiller) -> SparsityPenalty | None:
    """What sparse training adds to the loss; None where it is no part of the settings."""
    sparsity = config.pruning and config.pruning.sparsity
    if not sparsity:
        return None
    end = sparsity.end or config.pruning.last_cut or config.train.epochs
    penalty = SparsityPenalty(end, **sparsity.model_dump(exclude={"end"}))
    try:
        penalty.follow(unit, config.data.image_size)
    except ValueError as error:
        raise UserError(f"pruning.sparsity.{error}") from None
    return penalty


def build_masks(config: Config, unit: Distiller) -> Masks | None:
    """What holds weights at 0, once it is known that there are layers for it; None where there is to be no mask."""
    section = config.pruning and config.pruning.masks
    if not section:
        return None
    masks = Masks(epochs=section.cut_epochs, **section.model_dump(exclude=set(TimedSection.model_fields)))
    try:
        masks.check(unit.student)
    except ValueError as error:
        raise UserError(f"pruning.masks.{error}") from None
    return masks


def build_guard(config: Config) -> CutGuard | None:
    """What judges cuts; None where every cut stays."""
    if config.pruning is None or config.pruning.guard is None:
        return None
    return CutGuard(config.pruning.planned_epochs, config.train.epochs, **config.pruning.guard.model_dump())
