"""What a step of training takes, by part: memory by counting, time by multiply-accumulates at the device's own rate."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.combiner import gradient_norms
from distill.distiller import Distiller
from distill.measure import count_macs, count_parameters
from distill.report import human_macs
from distill.schema import Config
from teachers import Teacher

SAMPLE = 2  # images of the pass that activations are counted in; one would upset batch norms
BOXES = 8  # objects on each of them
FEW, MANY, SHORT = 4, 16, 1.0  # images that passes are timed on, on a CPU; MANY where FEW take less than SHORT seconds
NUMBER = 4  # bytes of a float32
MOVED = 7  # numbers that AdamW reads and writes for each parameter: itself, its gradient and two averages


@dataclass(frozen=True)
class Footprint:
    """What one step takes on one process.

    Attributes:
        memory: bytes, by part; their sum is the peak.
        seconds: by part; loading is not among them, as it goes on meanwhile.
        macs: multiply-accumulates of a step, by the parts that have any.
    """

    memory: dict[str, float]
    seconds: dict[str, float]
    macs: dict[str, float]

    def rows(self) -> dict[str, str]:
        """As rows of a banner."""
        memory, seconds = sum(self.memory.values()), sum(self.seconds.values())
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.memory.items() if size)
        times = ", ".join(f"{name} {human_seconds(value)}" for name, value in self.seconds.items() if value)
        rates = ", ".join(f"{name} {human_macs(n)} MACs" for name, n in self.macs.items() if n)
        return {
            "Memory": f"about {human_bytes(memory)} a process: {parts}",
            "Step": f"about {human_seconds(seconds)}, loading aside: {times} ({rates})",
        }


def estimate(
    config: Config,
    unit: Distiller,
    teachers: Mapping[str, Teacher],
    device: torch.device,
    processes: int,
    half: torch.dtype | None,
) -> Footprint:
    """What a step of these settings will take.

    Weights, gradients, optimizer state and averages follow from the numbers of parameters. Activations are counted in
    one pass over `SAMPLE` images, as what autograd keeps, and are proportional to the batch. Time is that of multiply-
    accumulates at the rate that the device has over a few images: forwards of teachers, both ways of the unit.

    Args:
        config: of the run.
        unit: the uncut student with its terms; stays as it is.
        teachers: on the device, by name.
        device: where training will run.
        processes: how many take part; with several, gradients lie in buckets once more.
        half: the half precision that passes run in, if any; activations then count half, and weights half more.
    """
    size, batch = config.data.image_size, config.data.batch_size
    unit = copy.deepcopy(unit).to(device, memory_format=torch.channels_last).train()
    unit.bind({name: teacher.detector for name, teacher in teachers.items()})
    trained = [p for p in unit.parameters() if p.requires_grad]
    number, of_student = sum(p.numel() for p in trained), sum(p.numel() for p in unit.student.parameters())
    adapters = count_parameters(unit) - of_student
    copies = 2 + (processes > 1) + 0.5 * bool(half)  # weights and gradients
    with unit.combiner.at_most():  # a term that is only warming up costs what it will
        kept, outputs, largest = count_kept(unit, teachers, size)
    scale = 0.5 if half else 1.0
    memory = {
        "student": NUMBER * of_student * copies,
        "adapters": NUMBER * adapters * copies,
        "optimizer": NUMBER * 2 * number,
        "average": NUMBER * of_student * bool(config.train.optimizer.ema),
        "teacher": sum(teacher.bytes_held for teacher in teachers.values()),
        "its outputs": outputs * batch,
        "activations": kept * scale * batch,
        # backwards, the gradient of one activation comes while what was kept for it is still there
        "on the way": largest * scale * batch,
    }

    sample = min(batch, FEW) if device.type == "cpu" else batch
    with unit.combiner.at_most():
        asked, both, task = time_passes(unit, teachers, size, sample, device, half)
        if sample < batch and asked + both < SHORT:  # what does not grow with the batch counts
            sample = min(batch, MANY)
            asked, both, task = time_passes(unit, teachers, size, sample, device, half)
    forwards = sum(count_macs(teacher.shape, size) for teacher in teachers.values()) * batch
    of_student_macs = 3 * count_macs(unit.student, size) * batch
    seconds = {
        "teacher": asked * batch / sample,
        "student": task * batch / sample,
        "adapters and losses": max(0.0, both - task) * batch / sample,
        "optimizer": MOVED * NUMBER * number / bandwidth(device),
    }
    return Footprint(memory, seconds, {"teacher": forwards, "student": of_student_macs})


def count_kept(unit: Distiller, teachers: Mapping[str, Teacher], size: tuple[int, int]) -> tuple[float, float, float]:
    """Bytes for each image: what autograd keeps for the pass back, the teachers' outputs, the largest kept tensor."""
    images, targets = blank(SAMPLE, size, next(unit.parameters()).device)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*unit.parameters(), *unit.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    lessons = unit.ask(teachers, images, targets)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unit.losses(images, targets, lessons)
    outputs = {
        level.untyped_storage().data_ptr(): level.untyped_storage().nbytes()
        for lesson in lessons.values()
        for levels in lesson.output
        for level in levels
    }
    sizes = [tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in outputs]
    return sum(sizes) / SAMPLE, sum(outputs.values()) / SAMPLE, max(sizes, default=0) / SAMPLE


def time_passes(
    unit: Distiller,
    teachers: Mapping[str, Teacher],
    size: tuple[int, int],
    batch: int,
    device: torch.device,
    half: torch.dtype | None,
) -> tuple[float, float, float]:
    """Seconds of the teachers' passes, of the unit's forwards and back, and of the same without knowledge terms."""
    images, targets = blank(batch, size, device)

    def ask() -> object:
        return unit.ask(teachers, images, targets)

    lessons = ask()

    def distil() -> None:
        with torch.autocast(device.type, half, enabled=bool(half)):
            task, terms, features = unit.losses(images, targets, lessons)
        if unit.combiner.balance == "gradient" and terms:  # at every tenth step
            gradient_norms([task, *terms.values()][: 1 + len(terms) // unit.combiner.EVERY], features)
        sum(terms.values(), task).backward()

    def learn() -> None:
        with torch.autocast(device.type, half, enabled=bool(half)):
            task = unit.task_loss(unit.student(images), targets)
        task.backward()

    asked = fastest(ask, device) if teachers else 0.0
    return asked, fastest(distil, device), fastest(learn, device)


def fastest(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Seconds of the fastest of a few passes, after one that does not count.

    Of a single thread on a CPU it is the processor's time, which other programs do not lengthen.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    taken = []
    for _ in range(1 + repeats):
        began = clock()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(clock() - began)
    return min(taken[1:])


def bandwidth(device: torch.device, numbers: int = 8_000_000) -> float:
    """Bytes a second that the device reads and writes."""
    tensor = torch.zeros(numbers, device=device)
    return 2 * NUMBER * numbers / fastest(lambda: tensor.add_(1.0), device)


def blank(batch: int, size: tuple[int, int], device: torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images of noise with objects anywhere on them, and their targets."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator).to(device, memory_format=torch.channels_last)
    corners = torch.rand(batch, BOXES, 2, generator=generator) * torch.tensor([width, height]) * 0.7
    boxes = torch.cat((corners, corners + torch.tensor([width, height]) * 0.25), dim=-1).to(device)
    labels = torch.zeros(BOXES, dtype=torch.long, device=device)
    return images, [{"boxes": one, "labels": labels} for one in boxes]


def human_bytes(size: float) -> str:
    """1_500_000_000 -> '1.50 GB'."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def human_seconds(seconds: float) -> str:
    """0.0123 -> '12 ms'."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
