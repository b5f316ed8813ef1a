"""What several processes need beyond Accelerate: one that acts for all, and wrappers that come off before a cut."""

import gc
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, broadcast_object_list
from torch import nn

from distill.errors import UserError


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Acts on the main process while the others wait; a `UserError` there is raised everywhere, so that none hangs."""
    problem: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            problem = [str(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


def release(accelerator: Accelerator, unit: nn.Module) -> None:
    """Forgets every wrapper around a unit, so that it can change shape and be prepared again.

    A distributed wrapper keeps buckets and hooks for the old shapes and must be gone before a new one is made; the
    caller drops its own reference first. The mixed-precision patch of `forward` comes off too, or it would pile up.
    What was compiled for the old shapes is forgotten: torch gives compiling up after a few shapes.

    Args:
        accelerator: which prepared the unit.
        unit: the bare unit.
    """
    for wrapped in [m for m in accelerator._models if accelerator.unwrap_model(m) is unit]:
        accelerator._models.remove(wrapped)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        del wrapped
    unit._is_accelerate_prepared = False  # or it would stay as it is now, in full precision and uncompiled
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        torch.compiler.reset()
    gc.collect()


@torch.no_grad()
def share_buffers(accelerator: Accelerator, detector: nn.Module) -> None:
    """Gives every process the main process's buffers, which are the ones that are saved.

    Batch-norm statistics come from each process's own images; unshared, every rank would evaluate another detector.
    """
    if accelerator.num_processes > 1:
        for buffer in detector.buffers():
            torch.distributed.broadcast(buffer, src=0)
