"""What each parameter adds to the loss, seen to first order."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from distill.data import Batch
from distill.distiller import Distiller
from distill.measure import eval_mode
from distill.pruning.graph import ChannelGroup
from teachers import Teacher


def trained_loss(unit: Distiller, teachers: Mapping[str, Teacher], batch: Batch, knowledge: bool = True) -> Tensor:
    """The loss of a batch as training has it: the task with all knowledge terms as they are weighted at present.

    Args:
        unit: the student with its terms.
        teachers: those of its terms, by name.
        batch: of training images.
        knowledge: False leaves the task alone.
    """
    if not knowledge or not unit.terms:
        return unit.task_loss(unit.student(batch.images), batch.targets)
    return unit(batch.images, batch.targets, unit.ask(teachers, batch.images, batch.targets))[0]


def measure_saliency(
    unit: Distiller, groups: Sequence[ChannelGroup], batches: Iterable[Batch], loss: Callable[[Batch], Tensor]
) -> dict[str, Tensor]:
    """Mean over batches of (w dL/dw)^2 for every entry of every parameter of the unit, by name.

    Its square root is how much the loss would change, to first order, were the entry 0 (Molchanov 2019, arXiv
    1906.10771). The network stands still: eval mode, with the batch norms that evaluation has; gradients of training
    are left alone. Every rank must be given the same batches.

    Args:
        unit: the student with its terms.
        groups: not looked at; every measurement takes the same arguments.
        batches: of training images; where there are none, all is 0.
        loss: of a batch, see `trained_loss`.

    Returns:
        float32 tensors of the parameters' shapes, on their device; zeros for what is not used, nothing for what is
        frozen.
    """
    live = {name: parameter for name, parameter in unit.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in live.items()}
    number = 0
    with eval_mode(unit), torch.enable_grad():
        for batch in batches:
            gradients = torch.autograd.grad(loss(batch), list(live.values()), allow_unused=True)
            for (name, parameter), gradient in zip(live.items(), gradients):
                if gradient is not None:
                    sums[name] += (parameter.detach() * gradient).float().square()
            number += 1
    return {name: total / max(1, number) for name, total in sums.items()}
