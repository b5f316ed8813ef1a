"""What a run needs beyond Accelerate: a process that acts for all, wrappers that come off before a cut, and what is
compiled."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin, broadcast_object_list, gather_object
from torch import nn

from distill.errors import UserError
from students import Detector


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


@contextmanager
def together(accelerator: Accelerator, what: str, way_out: str) -> Iterator[None]:
    """What fails in one process is a `UserError` in all of them, so that none goes on alone.

    Args:
        accelerator: of the processes, each of which has to come here.
        what: has failed then, to begin the message with.
        way_out: to end it with.
    """
    problem, cause = None, None
    try:
        yield
    except (RuntimeError, ValueError, TypeError, MemoryError, LookupError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem, cause = str(error) if isinstance(error, UserError) else f"{what} ({reason}); {way_out}", error
    problems = [problem]
    if accelerator.num_processes > 1:
        problems = gather_object(problems)
    told = next((one for one in problems if one is not None), None)
    if told is not None:
        raise UserError(told) from cause


def compile_options() -> dict[str, Any] | None:
    """How to compile, for `nn.Module.compile`; None unless Accelerate's settings say so (`dynamo_backend`)."""
    plugin = TorchDynamoPlugin()
    return None if plugin.backend == DynamoBackend.NO else plugin.to_kwargs()


def compile_parts(detectors: Iterable[Detector]) -> None:
    """Compiles the parts of detectors in place, see `compile_options`.

    To be called again after a cut, as what was compiled for other shapes counts towards a limit beyond which all is
    eager. The losses are left as they are: how many objects there are, and what counts, changes from step to step.
    """
    options = compile_options()
    if options is None:
        return
    torch.compiler.reset()
    # what is kept for the pass back must outlast one of them: gradients are measured at the pyramid before the step's
    torch._functorch.config.donated_buffer = False
    for detector in detectors:
        for part in detector.parts:
            part.compile(**options)


def release(accelerator: Accelerator, unit: nn.Module) -> None:
    """Forgets every wrapper around a unit, so that it can change shape and be prepared again.

    A distributed wrapper keeps buckets and hooks for the old shapes and must be gone before a new one is made; the
    caller drops its own reference first. The mixed-precision patch of `forward` comes off too, or it would pile up.

    Args:
        accelerator: which prepared the unit.
        unit: the bare unit.
    """
    for wrapped in [m for m in accelerator._models if accelerator.unwrap_model(m) is unit]:
        accelerator._models.remove(wrapped)
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        del wrapped
    # where there is one process, the unit is its own wrapper, and is marked so: it would never be prepared again
    unit.__dict__.pop("_is_accelerate_prepared", None)
    gc.collect()


@torch.no_grad()
def share_buffers(accelerator: Accelerator, detector: nn.Module) -> None:
    """Gives every process the main process's buffers, which are the ones that are saved.

    Batch-norm statistics come from each process's own images; unshared, every rank would evaluate another detector.
    """
    if accelerator.num_processes > 1:
        for buffer in detector.buffers():
            torch.distributed.broadcast(buffer, src=0)
