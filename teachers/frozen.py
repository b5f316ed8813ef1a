"""What makes a detector a teacher: it is frozen, stays in eval mode, and is asked by the fastest way there is."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from students.detector import Detector
from students.folding import fold_norms
from teachers.cache import Shown, TeacherCache
from teachers.features import FeatureOutput
from teachers.shard import shard_backbone

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher:
    """A frozen detector. It is no `nn.Module`, so no trainer can register, wrap, train or save it by accident.

    What is asked is a copy of it whose batch norms are folded into its convolutions (`students.folding`), made with the
    first question, and anew after the detector's tensors were written to. Layers without a norm are the detector's own;
    the others are held twice, in half precision at half the size. On a GPU the copy has a stream of its own, so that
    its pass and the student's go on at the same time.

    Args:
        detector: the detector; it is frozen in place, dropout and drop-path included.
        device: where it runs.
        precision: `float32`, `bfloat16` or `float16` (autocast).
        shard: deal its backbone's weights out to all processes of the group, if there is one; they are brought together
            block by block in each pass, which all processes then have to make. There is no copy of it.
        compile_options: of `nn.Module.compile`, for the parts of the copy; None compiles nothing.
        channels_last: the memory format of weights and images; contiguous otherwise.

    Attributes:
        shape: the detector, or of a sharded one a copy without values, for counting what it costs.
        stream: that `begin` works on; None where there is only one.
        cache: what it has said already; None if that is not kept.
    """

    cache: TeacherCache | None = None

    def __init__(
        self,
        detector: Detector,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        shard: bool = False,
        compile_options: Mapping[str, Any] | None = None,
        channels_last: bool = True,
    ):
        self.detector = self.shape = freeze(detector)
        self.device = torch.device(device)
        self.dtype = PRECISIONS[precision]
        self.sharded = shard and dist.is_available() and dist.is_initialized()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._compile_options = compile_options
        self._copies = not self.sharded
        self._fast: Detector | None = None
        self._versions: list[tuple[int, int]] = []
        if self.sharded:
            self.shape = copy.deepcopy(detector).to("meta")
            shard_backbone(self.detector, self.device)  # before the rest is moved: as a whole it may not fit
            self.detector.to(self.device)
        else:
            self.detector.to(self.device, memory_format=self.memory_format)
        self._layers = list(self.detector.modules())

    def __call__(self, images: Tensor, head: bool = True):
        """The detector's raw output for images (B, 3, H, W) in [0, 1], as float32 tensors without a graph.

        Its predictions are the detector's within `students.folding.TOLERANCE`, and what half precision makes of them.

        Args:
            images: as for the detector.
            head: whether more than the pyramid is asked for; otherwise the output is a `FeatureOutput`.
        """
        output = self.begin(images, head)
        wait_for(self.stream, output)
        return output

    @torch.no_grad()
    def begin(self, images: Tensor, head: bool = True, shown: Sequence[Shown] | None = None):
        """The same, but on a GPU not there yet: `wait_for` has to be called before the output is read.

        Args:
            images: as for the detector.
            head: see `__call__`.
            shown: which views of the bank they are; where there is a cache, it answers for those that it knows.
        """
        if self.cache is not None and shown is not None:
            return self.cache.recall(shown, images, self)
        if self.detector.training:
            raise RuntimeError("the teacher was put in train mode; its dropout and batch norm would teach noise")
        fast = self._refreshed(images[:2])  # some layers refuse a single one where maps are of one cell
        if self.stream is None:
            return self._ask(fast, images, head)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            images.record_stream(self.stream)
            return self._ask(fast, images, head)

    def follow(self, detector: Detector) -> None:
        """Asks another detector from now on, as it is each time: one that goes on being trained."""
        self.detector = self.shape = detector
        self._copies, self._fast = False, None

    @property
    def bytes_held(self) -> int:
        """Of the detector's parameters on this process, and of those of its copy that are not the same."""
        owners = [self.detector] if self._fast is None else [self.detector, self._fast]
        parameters = {id(p): p for owner in owners for p in owner.parameters()}.values()
        local = [getattr(p, "to_local", lambda p=p: p)() for p in parameters]
        return sum(p.numel() * p.element_size() for p in local)

    def _ask(self, detector: Detector, images: Tensor, head: bool):
        half = self.dtype is not torch.float32
        if not self.sharded:  # whose weights lie as they were dealt out
            images = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=half):
            output = detector(images) if head else FeatureOutput(detector.pyramid(images))
        return type(output)(*(tuple(level.float() for level in levels) for levels in output)) if half else output

    def _refreshed(self, images: Tensor) -> Detector:
        """What is asked: the copy, made anew where the detector's tensors have been written to since."""
        if not self._copies:
            return self.detector
        # by the modules' own tables, as this is done in every step
        tables = (table for module in self._layers for table in (module._parameters, module._buffers))
        versions = [(id(x), x._version) for table in tables for x in table.values() if x is not None]
        if self._fast is None or versions != self._versions:
            self._fast, self._versions = self._copy(images), versions
        return self._fast

    def _copy(self, images: Tensor) -> Detector:
        with torch.autocast(self.device.type, enabled=False):
            fast = fold_norms(self.detector, images)
        if self.dtype is not torch.float32:
            shared = set(map(id, self.detector.parameters()))
            for parameter in fast.parameters():
                if id(parameter) not in shared:  # autocast would make this of it in every pass
                    parameter.data = parameter.data.to(self.dtype)
        if self._compile_options is not None:
            for part in fast.parts:
                part.compile(**self._compile_options)
        return fast


def wait_for(stream: torch.cuda.Stream | None, output: tuple[tuple[Tensor, ...], ...]) -> None:
    """Makes the current stream of a GPU wait until another one has finished what it gave out."""
    if stream is None:
        return
    current = torch.cuda.current_stream(stream.device)
    current.wait_stream(stream)
    for levels in output:
        for level in levels:
            if level.is_cuda:  # a cache leaves out what nobody reads
                level.record_stream(current)


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients, for the module and all below it; returns it."""
    return module.eval().requires_grad_(False)
