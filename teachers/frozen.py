"""What makes a detector a teacher: it is frozen, stays in eval mode, and runs in a precision of its own."""

import torch
from torch import Tensor, nn

from students.detector import Detector

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen detector. It is no `nn.Module`, so no trainer can register, wrap, train or save it by accident.

    Args:
        detector: the detector; it is frozen in place, dropout and drop-path included.
        device: where it runs.
        precision: `float32`, `bfloat16` or `float16` (autocast).
    """

    def __init__(self, detector: Detector, device: torch.device | str = "cpu", precision: str = "float32"):
        self.detector = freeze(detector).to(device, memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.dtype = PRECISIONS[precision]

    @torch.no_grad()
    def __call__(self, images: Tensor):
        """The detector's raw output for images (B, 3, H, W) in [0, 1], as float32 tensors without a graph."""
        if self.detector.training:
            raise RuntimeError("the teacher was put in train mode; its dropout and batch norm would teach noise")
        enabled = self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            output = self.detector(images)
        return type(output)(*(tuple(level.float() for level in levels) for levels in output)) if enabled else output


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients, for the module and all below it; returns it."""
    return module.eval().requires_grad_(False)
