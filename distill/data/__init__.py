"""From files on disk to batches: `open_index`, `build_augmentation`, `DetectionDataset`, `build_loader`."""

from distill.data.augment import Augmentation, build_augmentation, build_resize
from distill.data.dataset import (
    Batch,
    DetectionDataset,
    ImageMeta,
    MixedDataset,
    Sample,
    being_read,
    build_loader,
    collate_samples,
    set_epoch,
    start_after,
    to_original,
)
from distill.data.images import UnreadableImageError, read_image
from distill.data.index import DetectionIndex, IndexNotes, open_index, open_unlabelled
from distill.data.sampler import EpochSampler, MixedSampler

__all__ = [
    "Augmentation",
    "Batch",
    "DetectionDataset",
    "DetectionIndex",
    "EpochSampler",
    "ImageMeta",
    "IndexNotes",
    "MixedDataset",
    "MixedSampler",
    "Sample",
    "UnreadableImageError",
    "being_read",
    "build_augmentation",
    "build_loader",
    "build_resize",
    "collate_samples",
    "open_index",
    "open_unlabelled",
    "read_image",
    "set_epoch",
    "start_after",
    "to_original",
]
