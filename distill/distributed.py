"""What a cut needs from Accelerate: the wrappers around the trained unit come off, and nothing holds on to them."""

import gc

from accelerate import Accelerator
from torch import nn


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
    gc.collect()
