"""What makes a detector a teacher: it is frozen, stays in eval mode, and runs in a precision of its own."""

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from students.detector import Detector
from teachers.cache import Shown, TeacherCache
from teachers.shard import shard_backbone

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen detector. It is no `nn.Module`, so no trainer can register, wrap, train or save it by accident.

    Args:
        detector: the detector; it is frozen in place, dropout and drop-path included.
        device: where it runs.
        precision: `float32`, `bfloat16` or `float16` (autocast).
        shard: deal its backbone's weights out to all processes of the group, if there is one; they are brought together
            block by block in each pass, which all processes then have to make.

    Attributes:
        shape: the detector, or of a sharded one a copy without values, for counting what it costs.
        cache: what it has said already; None if that is not kept.
    """

    cache: TeacherCache | None = None

    def __init__(
        self,
        detector: Detector,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        shard: bool = False,
    ):
        self.detector = self.shape = freeze(detector)
        self.device = torch.device(device)
        self.dtype = PRECISIONS[precision]
        self.sharded = shard and dist.is_available() and dist.is_initialized()
        if self.sharded:
            self.shape = copy.deepcopy(detector).to("meta")
            shard_backbone(self.detector, self.device)  # before the rest is moved: as a whole it may not fit
            self.detector.to(self.device)
        else:
            self.detector.to(self.device, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor, shown: Sequence[Shown] | None = None):
        """The detector's raw output for images (B, 3, H, W) in [0, 1], as float32 tensors without a graph.

        Args:
            images: to look at.
            shown: which views of the bank they are; where there is a cache, it answers for those that it knows.
        """
        if self.cache is not None and shown is not None:
            return self.cache.recall(shown, images, self)
        if self.detector.training:
            raise RuntimeError("the teacher was put in train mode; its dropout and batch norm would teach noise")
        enabled = self.dtype is not torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            output = self.detector(images)
        return type(output)(*(tuple(level.float() for level in levels) for levels in output)) if enabled else output


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients, for the module and all below it; returns it."""
    return module.eval().requires_grad_(False)
