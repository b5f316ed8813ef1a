"""From files on disk to batches: `open_index`, `build_augmentation`, `DetectionDataset`, `build_loader`."""

from distill.data.augment import Augmentation, build_augmentation, build_resize
from distill.data.dataset import (
    Batch,
    DetectionDataset,
    ImageMeta,
    Sample,
    build_loader,
    collate_samples,
    set_epoch,
    to_original,
)
from distill.data.images import UnreadableImageError
from distill.data.index import DetectionIndex, IndexNotes, open_index
from distill.data.sampler import EpochSampler

__all__ = [
    "Augmentation",
    "Batch",
    "DetectionDataset",
    "DetectionIndex",
    "EpochSampler",
    "ImageMeta",
    "IndexNotes",
    "Sample",
    "UnreadableImageError",
    "build_augmentation",
    "build_loader",
    "build_resize",
    "collate_samples",
    "open_index",
    "set_epoch",
    "to_original",
]
