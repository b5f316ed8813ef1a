"""Splits of a data set and loaders over them, from settings."""

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from distill.data import (
    Batch,
    DetectionDataset,
    DetectionIndex,
    MixedDataset,
    build_augmentation,
    build_loader,
    build_resize,
    open_index,
    open_unlabelled,
)
from distill.data.synthetic import draw_scenes
from distill.errors import UserError
from distill.pruning.recalibrate import calibration_batches
from distill.schema import DataConfig


@dataclass
class Split:
    """One split of a data set: its index and a loader over it."""

    index: DetectionIndex
    loader: DataLoader


@dataclass
class Data:
    """What a run reads.

    Attributes:
        train: shuffled and augmented; its loader also gives the unlabelled images.
        val: evaluated after every epoch.
        test: evaluated in the end, for the table; the validation split if there is no other.
        unlabelled: images that only teachers say something about; where all are, `train` has the same.
    """

    train: Split
    val: Split
    test: Split
    unlabelled: DetectionIndex | None = None

    def sample(self, device: torch.device) -> Batch:
        """A batch of training images, the same on every call and rank."""
        loader = self.train.loader
        return next(calibration_batches(loader.dataset, loader.batch_sampler.batch_size, device, 1))

    @property
    def class_names(self) -> list[str]:
        return list(self.val.index.class_names)

    @property
    def indices(self) -> list[DetectionIndex]:
        """Each once."""
        found = (self.train.index, self.unlabelled, self.val.index, self.test.index)
        return list({id(index): index for index in found if index is not None}.values())


def draw_data(config: DataConfig) -> None:
    """Draws the synthetic scenes, if the settings ask for them and they are not there yet."""
    if config.synthetic:
        scenes = config.synthetic
        draw_scenes(config.root, train=scenes.train, val=scenes.val, image_size=scenes.size, seed=scenes.seed)


def build_data(config: DataConfig, seed: int = 0) -> Data:
    """Opens the splits that the settings name."""
    labelled = open_split(config, config.train, config.classes) if config.train else None
    if labelled is not None and not len(labelled.boxes):
        raise UserError(
            f"data.train: {config.root}, {config.train}: no annotations found, "
            f"none of its {len(labelled)} images has a box; check the annotation files and data.class_map"
        )
    val = evaluation_split(config, config.val, config.classes if labelled is None else labelled.class_names)
    class_names = val.index.class_names
    test = evaluation_split(config, config.test, class_names) if config.test else val
    unlabelled = None
    if config.unlabelled:
        unlabelled = open_unlabelled(config.unlabelled.root, config.unlabelled.split, class_names, config.unreadable)

    changes = config.augment.model_dump(exclude={"mosaic", "views"})
    augmentation = build_augmentation(config.image_size, config.resize, **changes)
    train = labelled if labelled is not None else unlabelled
    settings = config.unreadable, config.augment.mosaic, config.augment.views
    dataset = DetectionDataset(train, augmentation, seed, *settings)
    if labelled is not None and unlabelled is not None:
        # another seed, or images of the same number would be flipped and cropped alike
        others = DetectionDataset(unlabelled, augmentation, seed + 1, *settings, first=len(train))
        dataset = MixedDataset(dataset, others, config.unlabelled.ratio)
    # a last batch of one or two images would upset the batch norms
    drop_last = len(dataset) > config.batch_size
    loader = build_loader(
        dataset, config.batch_size, workers=config.workers, shuffle=True, seed=seed, drop_last=drop_last
    )
    return Data(Split(train, loader), val, test, unlabelled)


def open_split(config: DataConfig, split: str, classes: list[str] | tuple[str, ...] | None) -> DetectionIndex:
    """One split's index, with the class map applied."""
    return open_index(
        config.root, split, classes=classes, class_map=config.class_map or None, unreadable=config.unreadable
    )


def evaluation_split(config: DataConfig, split: str, classes: list[str] | tuple[str, ...] | None) -> Split:
    """A split in its own order, resized only."""
    index = open_split(config, split, classes)
    dataset = DetectionDataset(index, build_resize(config.image_size, config.resize), unreadable=config.unreadable)
    return Split(index, build_loader(dataset, config.batch_size, workers=config.workers))
