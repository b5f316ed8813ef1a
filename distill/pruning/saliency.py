"""What each parameter adds to the loss, seen to first order."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from distill.data import Batch
from distill.distiller import Distiller
from distill.measure import eval_mode
from teachers import Teacher


def measure_saliency(unit: Distiller, teachers: Mapping[str, Teacher], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Mean over batches of (w dL/dw)^2 for every entry of every parameter of the unit, by name.

    Its square root is how much the loss would change, to first order, were the entry 0 (Molchanov 2019, arXiv
    1906.10771). L is what is trained: the task with all knowledge terms as they are weighted at present. The network
    stands still: eval mode, with the batch norms that evaluation has; gradients of training are left alone. Every rank
    must be given the same batches.

    Args:
        unit: the student with its terms.
        teachers: those of its terms, by name.
        batches: of training images.

    Returns:
        float32 tensors of the parameters' shapes, on their device; zeros for what is frozen or not used.
    """
    parameters = dict(unit.named_parameters())
    live = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    number = 0
    with eval_mode(unit), torch.enable_grad():
        for batch in batches:
            lessons = unit.ask(teachers, batch.images, batch.targets)
            loss, _ = unit(batch.images, batch.targets, lessons)
            gradients = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
            for (name, parameter), gradient in zip(live.items(), gradients):
                if gradient is not None:
                    sums[name] += (parameter.detach() * gradient).float().square()
            number += 1
    return {name: total / max(1, number) for name, total in sums.items()}
