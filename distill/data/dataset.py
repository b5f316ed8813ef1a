"""Reads and augments one image at a time, and gathers images into batches."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info

from distill.data.augment import Augmentation, View
from distill.data.images import UnreadableImageError, read_image
from distill.data.index import DetectionIndex
from distill.data.mosaic import compose_mosaic
from distill.data.sampler import (
    Address,
    EpochSampler,
    MixedAddress,
    MixedSampler,
    mixed_length,
    mixed_places,
)
from distill.errors import UserError

NOTE_BYTES = 1024  # of a path


@dataclass(frozen=True)
class ImageMeta:
    """Where an image of a batch comes from, and how it was fitted into the input.

    For the evaluation transform, input pixel = original pixel * scale + offset. A crop or a flip comes before that and
    is not recorded; of a mosaic it is the first image's, as far as it is shown.

    Attributes:
        image_id: id in the annotations.
        file: path relative to the index's image root.
        original_size: (height, width) of the upright original in pixels.
        scale: input pixels per original pixel, (x, y).
        offset: top left corner of the image's content in the input, (x, y) pixels.
        valid_size: (height, width) of the input up to the content's bottom right corner; the rest is padding.
        number: of the image among all that are trained on, from 0, the unlabelled ones last.
        view: which of its views it is, from 0; its epoch where each has another one.
        pixels: CRC-32 of the input, where there is a bank of views; else 0.
    """

    image_id: int
    file: str
    original_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]
    valid_size: tuple[int, int]
    number: int = 0
    view: int = 0
    pixels: int = 0


class Sample(NamedTuple):
    """One image: (H, W, 3) uint8; boxes (N, 4) float32 xyxy input pixels; labels (N,) int64; None if unlabelled."""

    image: np.ndarray
    boxes: np.ndarray | None
    labels: np.ndarray | None
    meta: ImageMeta


class Batch(NamedTuple):
    """What a loader yields; images that could not be read are left out, so there may be fewer, even none.

    Attributes:
        images: (B, 3, H, W) float32 RGB in [0, 1].
        targets: one dict an image: `boxes` (N, 4) float32 xyxy in input pixels, `labels` (N,) int64. None where the
            image is unlabelled; such images come last.
        metas: one an image.
        unreadable: files that were left out.
    """

    images: Tensor
    targets: list[dict[str, Tensor] | None]
    metas: list[ImageMeta]
    unreadable: list[str]


class DetectionDataset(Dataset):
    """The images of an index, seen through a transform.

    An item's address is (position, epoch), or a position for epoch 0. What is random in an item depends on the seed,
    its position and its view alone: not on the worker that makes it, nor on what was made before.

    Args:
        index: the images and boxes.
        transform: what makes a view of an image.
        seed: of the augmentation.
        unreadable: 'error', or 'skip' to yield the file's name in place of an image that fails to decode.
        mosaic: probability of showing an image with three others beside it, see `distill.data.mosaic`. Of those, one
            that fails to decode is left out, and named when its own turn comes.
        views: how many an image has, which epochs then show in turns; None: another one in every epoch.
        first: the number of its first image.

    Raises:
        UserError: `unreadable` is neither.
    """

    def __init__(
        self,
        index: DetectionIndex,
        transform: Augmentation,
        seed: int = 0,
        unreadable: str = "error",
        mosaic: float = 0.0,
        views: int | None = None,
        first: int = 0,
    ):
        if unreadable not in ("error", "skip"):
            raise UserError(f"data.unreadable: found {unreadable!r}; allowed are 'error' and 'skip'")
        self.index = index
        self.transform = transform
        self.seed = seed
        self.unreadable = unreadable
        self.mosaic = mosaic
        self.views = views
        self.first = first
        self.reading: Tensor | None = None  # where a loader's worker notes the file that it is at

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, address: Address | int) -> Sample | str:
        """The image at an address without its ignored boxes, or its file's name where it is left out.

        Raises:
            UnreadableImageError: the image fails to decode and is not to be skipped.
        """
        position, epoch = address if isinstance(address, tuple) else (address, 0)
        number = epoch % self.views if self.views else epoch
        index, rng = self.index, np.random.default_rng((self.seed, number, position))
        view = self._look(position, rng)
        if view is None:
            return index.file(position)
        if self.mosaic and rng.random() < self.mosaic:
            others = rng.integers(len(index), size=3).tolist()
            view = compose_mosaic([view, *(self._look(other, rng) for other in others)], rng)
        meta = ImageMeta(
            image_id=int(index.image_ids[position]),
            file=index.file(position),
            original_size=tuple(index.sizes[position].tolist()),
            scale=view.scale,
            offset=view.offset,
            valid_size=view.valid_size,
            number=self.first + position,
            view=number,
            pixels=zlib.crc32(view.image) if self.views else 0,
        )
        truth = (view.boxes, view.labels) if index.labelled else (None, None)
        return Sample(view.image, *truth, meta)

    def sampler(self, shuffle: bool, seed: int) -> EpochSampler:
        """An order of its addresses."""
        return EpochSampler(len(self), shuffle, seed)

    def spread(self, number: int) -> list[Address]:
        """Addresses in epoch 0 that lie evenly over all images, the same for every call."""
        return [(i * len(self) // number, 0) for i in range(number)]

    def _look(self, position: int, rng: np.random.Generator) -> View | None:
        """A view of the image at a position; None where it is left out."""
        try:
            image = self._read(position)
        except UnreadableImageError:
            if self.unreadable == "error":
                raise
            return None
        learned = ~self.index.ignored_of(position)
        return self.transform(
            image, self.index.boxes_of(position)[learned], self.index.labels_of(position)[learned], rng
        )

    def _read(self, position: int) -> np.ndarray:
        path, original_size = self.index.path(position), tuple(self.index.sizes[position].tolist())
        if self.reading is not None:
            _write_note(self.reading, str(path))
        image = read_image(path)
        if image.shape[:2] != original_size:
            height, width = image.shape[:2]
            raise UnreadableImageError(
                f"{path}: is {width}x{height} now, but was {original_size[1]}x{original_size[0]} when the data set was "
                "opened"
            )
        return image


class MixedDataset(Dataset):
    """Labelled and unlabelled images in a fixed ratio.

    Args:
        labelled: the labelled ones; an epoch sees each once.
        unlabelled: the others.
        ratio: share of unlabelled images, above 0 and below 1.
    """

    def __init__(self, labelled: DetectionDataset, unlabelled: DetectionDataset, ratio: float):
        self.sources = labelled, unlabelled
        self.ratio = Fraction(ratio).limit_denominator(1000)  # so that a third is a third at every place
        self.transform = labelled.transform

    def __len__(self) -> int:
        return mixed_length(len(self.sources[0]), self.ratio)

    def __getitem__(self, address: MixedAddress) -> Sample | str:
        source, position, epoch = address
        return self.sources[source][position, epoch]

    def sampler(self, shuffle: bool, seed: int) -> MixedSampler:
        """An order of its addresses."""
        return MixedSampler(*map(len, self.sources), self.ratio, shuffle, seed)

    def spread(self, number: int) -> list[MixedAddress]:
        """Addresses in epoch 0, mixed as in training, that lie evenly over both kinds; the same for every call."""
        places = mixed_places(number, self.ratio)
        found = [iter(source.spread(places.count(kind))) for kind, source in enumerate(self.sources)]
        return [(kind, *next(found[kind])) for kind in places]


def collate_samples(samples: Sequence[Sample | str], image_size: tuple[int, int]) -> Batch:
    """Gathers what a dataset gave into a batch.

    Args:
        samples: images, or names of files that could not be read.
        image_size: (height, width) of every image, so that a batch without images has a shape too.
    """
    kept = [sample for sample in samples if isinstance(sample, Sample)]
    kept.sort(key=lambda sample: sample.boxes is None)  # stable
    # channels last is how images lie on disk and how convolutions run fastest, on CPU and GPU alike
    images = torch.empty(len(kept), 3, *image_size, memory_format=torch.channels_last)
    for image, sample in zip(images, kept):
        image.copy_(torch.from_numpy(sample.image).permute(2, 0, 1))
    return Batch(
        images=images.div_(255),
        targets=[_target(sample) for sample in kept],
        metas=[sample.meta for sample in kept],
        unreadable=[sample for sample in samples if isinstance(sample, str)],
    )


def _target(sample: Sample) -> dict[str, Tensor] | None:
    if sample.boxes is None:
        return None
    return {"boxes": torch.from_numpy(sample.boxes), "labels": torch.from_numpy(sample.labels)}


def to_original(boxes: Tensor, meta: ImageMeta) -> Tensor:
    """Maps boxes of an evaluated image back to the original and clips them to it.

    Args:
        boxes: (N, 4) xyxy, input pixels.
        meta: the image's.

    Returns:
        (N, 4) xyxy, pixels of the original.
    """
    height, width = meta.original_size
    boxes = (boxes - boxes.new_tensor(meta.offset * 2)) / boxes.new_tensor(meta.scale * 2)
    return boxes.clamp(min=0).minimum(boxes.new_tensor((width, height, width, height)))


def build_loader(
    dataset: DetectionDataset | MixedDataset,
    batch_size: int,
    *,
    workers: int = 0,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """A loader of `Batch`es; call `set_epoch(loader, epoch)` before each epoch.

    Args:
        dataset: what to load.
        batch_size: images a batch.
        workers: processes that load; 0 loads in this one.
        shuffle: whether every epoch has an order of its own.
        seed: of the order.
        drop_last: whether to leave out a last batch that is smaller.
    """
    return DataLoader(
        dataset,
        batch_sampler=BatchSampler(dataset.sampler(shuffle, seed), batch_size, drop_last),
        collate_fn=partial(collate_samples, image_size=dataset.transform.image_size),
        num_workers=workers,
        worker_init_fn=partial(
            _start_worker, notes=torch.zeros(workers, NOTE_BYTES, dtype=torch.uint8).share_memory_()
        ),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, so that iterating draws nothing from torch's global generator
    )


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Tells a loader's sampler which epoch comes next, whether or not accelerate has wrapped the loader."""
    if hasattr(loader, "set_epoch"):  # accelerate's loader sets its own count at the start of each pass
        loader.set_epoch(epoch)
    else:
        loader.batch_sampler.sampler.set_epoch(epoch)


def start_after(loader: DataLoader, images: int) -> None:
    """Makes the next pass of a loader that `build_loader` made, and no other, leave out its first images."""
    loader.batch_sampler.sampler.start_after(images)


def being_read(loader: DataLoader) -> list[str]:
    """The files that the workers of a loader that `build_loader` made were at last; for when one of them died."""
    notes = (
        bytes(note.tolist()).rstrip(b"\0").decode(errors="replace") for note in loader.worker_init_fn.keywords["notes"]
    )
    return sorted({note for note in notes if note})


def _start_worker(worker: int, notes: Tensor) -> None:
    cv2.setNumThreads(0)  # workers already fill the cores
    if hasattr(os, "setpgrp"):  # a terminal's Ctrl-C and a launcher's SIGTERM go to a whole group of processes, but a
        os.setpgrp()  # run that is told to stop still needs its images
    dataset = get_worker_info().dataset
    for source in getattr(dataset, "sources", (dataset,)):
        source.reading = notes[worker]


def _write_note(note: Tensor, text: str) -> None:
    content = text.encode()[: len(note)].ljust(len(note), b"\0")
    note.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))  # at once: it may be read at any moment
