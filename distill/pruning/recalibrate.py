"""After a cut the activations that remain have other statistics than the batch norms remember: measure them again."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.data import Batch, DetectionDataset, MixedDataset, collate_samples
from distill.measure import eval_mode

PIXELS = 3_000_000  # of images, which is 8 of 640x640


@torch.no_grad()
def recalibrate_batch_norms(detector: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replaces the running statistics of every batch norm by those of a few batches, all weighted alike.

    Nothing else changes: weights, modes, and the momentum that training goes on with. Norms that see nothing, such as
    where no image could be read, keep what they have. Every rank must be given the same
    batches, and then ends with the same statistics.

    Args:
        detector: any detector; one without batch norms is left alone.
        batches: images (B, 3, H, W) in [0, 1].
    """
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    with eval_mode(detector), _cumulative(norms):
        for images in batches:
            detector(images)


@contextmanager
def _cumulative(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    before = [(norm.momentum, norm.training, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: a plain mean over all batches
    try:
        yield
    finally:
        for norm, (momentum, training, (running_mean, running_var, tracked)) in zip(norms, before):
            norm.momentum, norm.training = momentum, training
            if not norm.num_batches_tracked:
                norm.running_mean.copy_(running_mean)
                norm.running_var.copy_(running_var)
            norm.num_batches_tracked.copy_(tracked)


@torch.no_grad()
def share_statistics(source: nn.Module, target: nn.Module) -> None:
    """Gives a detector's running statistics to another of the same shape, such as its averaged copy's to a student.

    Training moves them on within a few steps, so what is exact for the copy, which is evaluated, is enough for the
    student.
    """
    statistics = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(statistics[name])


def batches_needed(batch_size: int, image_size: tuple[int, int], most: int = 8) -> int:
    """Batches that statistics of channels take: what counts is positions, of which few large images have as many."""
    pixels = batch_size * image_size[0] * image_size[1]
    return max(1, min(most, math.ceil(PIXELS / pixels)))


def calibration_batches(
    dataset: DetectionDataset | MixedDataset, batch_size: int, device: torch.device, number: int = 8
) -> Iterator[Batch]:
    """Batches of training images spread evenly over the data set, the same for every call and rank."""
    batch_size = min(batch_size, len(dataset))
    wanted = batch_size * min(len(dataset) // batch_size, number)  # whole batches only: one image has poor statistics
    addresses = dataset.spread(wanted)
    for first in range(0, wanted, batch_size):
        samples = [dataset[address] for address in addresses[first : first + batch_size]]
        batch = collate_samples(samples, dataset.transform.image_size)
        if len(batch.images):
            yield batch._replace(images=batch.images.to(device))
