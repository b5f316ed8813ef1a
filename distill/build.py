"""From checked settings to objects; the only place that knows both."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch.utils.data import DataLoader

import students
from distill.combiner import Combiner, WeightSchedule
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
from distill.distiller import Distiller
from distill.errors import UserError
from distill.measure import count_macs
from distill.pruning.blocks import BlockPruner
from distill.pruning.guard import CutGuard
from distill.pruning.masks import Masks
from distill.pruning.pruner import Pruner
from distill.pruning.recalibrate import calibration_batches
from distill.pruning.sensitivity import read_curves
from distill.pruning.sparsity import SparsityPenalty
from distill.schema import ArtifactConfig, Config, DataConfig, DetectorConfig, TeacherConfig, TermConfig, TimedSection
from distill.terms import TERMS, FeatureTerm, KnowledgeTerm
from distill.terms.adapter import ChannelSelection
from distill.terms.published import published
from students import Detector
from teachers import FeatureTeacher, ScaledDetector, inherit, speak


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


def build_detector(config: DetectorConfig, class_names: list[str], image_size: tuple[int, int], role: str) -> Detector:
    """A new detector; what its family refuses is told under the key of its role, `student` or `teacher.detector`."""
    try:
        detector = students.build(class_names=class_names, **config.model_dump())
    except ValueError as error:
        raise UserError(f"{role}.{error}") from None
    check_image_size(detector, image_size, role)
    return detector


def require_learner(detector: Detector, role: str) -> None:
    """Raises a UserError if a detector that is to be trained has no loss."""
    if not detector.learns:
        raise UserError(
            f"{role}: {detector.title} has no loss here, so it can only teach; name it as teacher.detector, with its "
            "weights and without train, or choose another student"
        )


def check_image_size(detector: Detector, image_size: tuple[int, int], role: str) -> None:
    """Raises a UserError if a detector cannot look at images of a size, such as a transformer of fixed input size."""
    try:
        count_macs(detector, image_size)
    except (AssertionError, RuntimeError, ValueError) as error:
        height, width = image_size
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        larger = next(filter(partial(takes, detector), enlarged(image_size)), None)
        way_out = f"it takes {larger[1]}x{larger[0]}, data.image_size={list(larger)}" if larger else "change its size"
        raise UserError(
            f"{role}: {detector.title} does not take images of {width}x{height} px ({reason}); {way_out}, or choose "
            "another detector"
        ) from error


def takes(detector: Detector, image_size: tuple[int, int]) -> bool:
    """Whether a forward pass on images of (height, width) can be made at all."""
    try:
        count_macs(detector, image_size)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def enlarged(image_size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Larger sizes of about the same shape, in multiples of 32, up to four times as large."""
    height, width = image_size
    for quarter in range(5, 17):
        yield tuple(round(side * quarter / 4 / 32) * 32 for side in (height, width))


def build_student(config: Config, class_names: list[str]) -> Detector:
    """The student as the run starts with it: a new one, or the one that the settings give a path to, in train mode."""
    settings = config.student
    if not isinstance(settings, ArtifactConfig):
        student = build_detector(settings, class_names, config.data.image_size, "student")
        require_learner(student, "student")
        if config.widths_of:
            try:
                students.narrow(student, config.widths_of)
            except ValueError as error:
                raise UserError(f"widths_of: {error}") from None
        return student
    if settings.new_head:
        student = load_detector(settings.path, "student")
        try:
            student = students.renew_classes(student, class_names)
        except ValueError as error:
            raise UserError(f"student.{error}") from None
    else:
        student = load_detector(settings.path, "student", class_names, settings.class_map)
        if student.unknown:
            raise UserError(
                f"student.path: {settings.path} does not know {_some([class_names[x] for x in student.unknown])}; name "
                "them in student.class_map, or say student.new_head=true to start its class layers anew"
            )
    require_learner(student, "student")
    check_image_size(student, config.data.image_size, "student")
    return student.train()


def build_teachers(config: Config, class_names: list[str], student: Detector) -> dict[str, Detector]:
    """The teachers: loaded where the settings give a path, or filled from published weights, else untrained, to be
    trained or just to be looked at.

    One that is the student itself is a copy of it so far.
    """
    teachers = {}
    for name, teacher in config.all_teachers.items():
        key = config.teacher_key(name)
        if teacher.itself:
            detector = copy.deepcopy(student)
        elif teacher.features:
            detector = build_feature_teacher(teacher, config.data, key)
        elif teacher.path is not None:
            detector = load_detector(teacher.path, key, class_names, teacher.class_map)
        else:
            image_size = teacher.image_size or config.data.image_size
            if teacher.trained_first:
                detector = build_detector(teacher.detector, class_names, image_size, f"{key}.detector")
                require_learner(detector, f"{key}.detector")
            else:
                detector = build_published(teacher, class_names, key)
                check_image_size(detector, image_size, f"{key}.detector")
        teachers[name] = at_own_size(detector, teacher, config.data)
    return teachers


def build_published(teacher: TeacherConfig, class_names: list[str], key: str) -> Detector:
    """A teacher with the classes that its published weights know, brought to the student's by name; where the weights
    tell no names, they know classes in the student's order, or by number: "0", "1", ..."""
    settings = teacher.detector
    arguments = settings.model_dump()
    try:
        told = students.told_classes(settings.name, settings.weights)
        try:
            detector = students.build(class_names=told or class_names, **arguments)
        except students.OtherClassesError as error:
            told = [str(label) for label in range(error.number)]
            detector = students.build(class_names=told, **arguments)
    except ValueError as error:
        raise UserError(f"{key}.detector.{error}") from None
    if detector.only_backbone:
        raise UserError(
            f"{key}.detector.weights: {settings.weights} is a backbone's, so {detector.title} detects nothing yet; "
            f"give {key}.train to train it first, or the weights of a whole detector"
        )
    if teacher.class_map and not told:
        detector.class_names = [str(label) for label in range(len(class_names))]
    try:
        speak(detector, class_names, teacher.class_map)
    except ValueError as error:
        raise UserError(f"{key}.{error}") from None
    return detector


def build_feature_teacher(teacher: TeacherConfig, data: DataConfig, key: str) -> FeatureTeacher:
    """A timm network that teaches by its features, once it is known that it takes images of the size it will see."""
    try:
        network = FeatureTeacher(**teacher.features.model_dump(), image_size=teacher.image_size or data.image_size)
    except ValueError as error:
        raise UserError(f"{key}.features.{error}") from None
    height, width = teacher.image_size or data.image_size
    try:
        count_macs(network, (height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        own = list(timm.get_pretrained_cfg(teacher.features.backbone).input_size[1:])
        way_out = f"a size that it takes, such as {key}.image_size={own} and a data.image_size of the same shape"
        if network.patch:
            stride = 2 ** round(math.log2(network.patch))
            fitting = [side // stride * network.patch for side in data.image_size]
            way_out = f"{key}.image_size={fitting}, so that its patches of {network.patch} px are cells of {stride}"
            if any(side % stride for side in data.image_size):
                way_out = f"data.image_size multiples of {stride}, and {key}.image_size {network.patch}/{stride} of it"
        raise UserError(
            f"{key}.features: {teacher.features.backbone} does not take images of {width}x{height} px ({reason}); "
            f"give {way_out}"
        ) from error
    return network


def at_own_size(detector: Detector, teacher: TeacherConfig, data: DataConfig) -> Detector:
    """A teacher for the student's images: behind a resize where it has an image size of its own."""
    return ScaledDetector(detector, teacher.image_size[0] / data.image_size[0]) if teacher.image_size else detector


def teacher_run_config(config: Config, teacher: TeacherConfig, output_dir: Path) -> Config:
    """The settings of the run that trains a teacher: plain training of its `detector` on the same labelled data, with
    another view of an image in every epoch."""
    image_size = teacher.image_size or config.data.image_size
    augment = config.data.augment.model_copy(update={"views": None})
    return Config(
        output_dir=str(output_dir),
        overwrite=True,
        seed=config.seed,
        tracking=config.tracking,
        data=config.data.model_copy(update={"unlabelled": None, "image_size": image_size, "augment": augment}),
        student=teacher.detector,
        train=teacher.train,
    )


def trains_alike(one: Config, other: Config) -> bool:
    """Whether two runs come to the same end: where they write and how many processes load does not matter, nor what is
    watched, as long as nothing is left out for it, nor how losses are balanced where there are none."""
    passed_over = {"output_dir", "overwrite", "tracking", "data"}
    if not (one.losses or other.losses):
        passed_over |= {"balance", "guards"}
    if all("skip" not in (config.guards.dominating_term, config.guards.bad_term) for config in (one, other)):
        passed_over.add("guards")
    return all(
        getattr(one, key) == getattr(other, key) for key in Config.model_fields if key not in passed_over
    ) and one.data.model_copy(update={"workers": 0}) == other.data.model_copy(update={"workers": 0})


def load_detector(
    path: str, key: str, class_names: list[str] | None = None, class_map: Mapping[str, str | None] | None = None
) -> Detector:
    """The detector of an artifact folder; with its classes in the order of `class_names`, if these are given."""
    try:
        detector = students.load(path)
    except ValueError as error:
        raise UserError(f"{key}.path: {error}") from None
    if class_names is None:
        return detector
    try:
        speak(detector, class_names, class_map)
    except ValueError as error:
        raise UserError(f"{key}.{error}") from None
    return detector


def build_unit(config: Config, student: Detector, teachers: dict[str, Detector]) -> Distiller:
    """The student and its knowledge terms."""
    if config.inherit:
        try:
            # once more when the teacher is trained; here to see that it fits
            inherit(student, next(iter(teachers.values())), config.inherit)
        except ValueError as error:
            raise UserError(str(error)) from None
    taught_by = {name: config.teacher_of(name) for name in config.losses}
    terms = {
        name: build_term(loss, student, teachers[taught_by[name]], name, config.data.unlabelled is not None)
        for name, loss in config.losses.items()
    }
    for name, term in terms.items():
        if config.pruning and config.all_teachers[taught_by[name]].itself == "ema":
            check_follows(term, f"losses.{name}", config.losses[name].name)
    left_out = {
        name: 1.0 if config.balance == "gradient" else published(loss.name, student)["weight"]
        for name, loss in config.losses.items()
    }
    combiner = Combiner(
        {name: left_out[name] if loss.weight is None else loss.weight for name, loss in config.losses.items()},
        {name: WeightSchedule(**loss.schedule.model_dump()) for name, loss in config.losses.items()},
        config.train.epochs,
        config.balance,
    )
    score_threshold = config.data.unlabelled.score_threshold if config.data.unlabelled else 0.0
    return Distiller(student, terms, combiner, config.guards.bad_term == "skip", taught_by, score_threshold)


def build_term(
    config: TermConfig, student: Detector, teacher: Detector, name: str, unlabelled: bool = False
) -> KnowledgeTerm:
    """One knowledge term between two detectors; `unlabelled` tells whether there are images without boxes."""
    settings, kind = published(config.name, student) | config.model_dump(exclude_none=True), TERMS[config.name]
    settings = {key: value for key, value in settings.items() if key not in ("name", "teacher", "weight", "schedule")}
    if not teacher.detects and (kind.uses_head or (kind.uses_boxes and unlabelled)):
        reason = "a head" if kind.uses_head else "boxes, which unlabelled images lack and its teacher does not see"
        fitting = (n for n, term in TERMS.items() if not (term.uses_head or (term.uses_boxes and unlabelled)))
        raise UserError(
            f"losses.{name}.name: {config.name} goes by {reason}; from {teacher.title} learn {', '.join(fitting)}"
        )
    try:
        term = kind(student, teacher, **settings)
    except ValueError as error:
        raise UserError(f"losses.{name}.{error}") from None
    if term.uses_classes and len(teacher.unknown) == len(teacher.class_names):
        raise UserError(
            f"losses.{name}.name: {config.name} goes by class scores, and its teacher knows none of the student's "
            f"{len(teacher.unknown)} classes, {_some(teacher.class_names)}; say which of its own they are in its "
            "class_map, or choose a loss over features"
        )
    return term


def check_follows(term: KnowledgeTerm, key: str, kind: str) -> None:
    """Raises a UserError where a teacher that is cut along with the student would leave a term's layers behind."""
    if all(isinstance(layer, ChannelSelection) for layer in term.output_layers):
        return
    way_out = f"say {key}.adapter=select" if isinstance(term, FeatureTerm) else "choose another loss"
    raise UserError(
        f"{key}.name: {kind} has layers as wide as its teacher, and the student's average, ema, is cut along with the "
        f"student; {way_out}, or leave out pruning"
    )


def build_pruner(config: Config, unit: Distiller, device: torch.device | None = None) -> Pruner | None:
    """The pruner, once it is known that its target can be reached; None where no channels are to be cut.

    Args:
        config: whose pruning section counts.
        unit: the uncut student with its adapters.
        device: where latency is measured, if that is the budget; None: where the student is.
    """
    if config.pruning is None or config.pruning.target is None:
        return None
    elsewhere = {*TimedSection.model_fields, "sensitivity", "warmup_steps", "evaluate"}
    elsewhere |= {"guard", "sparsity", "blocks", "masks"}
    curves = read_curves(config.pruning.sensitivity) if config.pruning.sensitivity else None
    settings = config.pruning.model_dump(exclude=elsewhere)
    pruner = Pruner(config.data.image_size, epochs=config.pruning.cut_epochs, curves=curves, device=device, **settings)
    pruner.check(unit)
    return pruner


def build_block_pruner(config: Config, unit: Distiller) -> BlockPruner | None:
    """What takes blocks out, once it is known that there are as many; None where none is to go."""
    blocks = config.pruning and config.pruning.blocks
    if not blocks:
        return None
    settings = blocks.model_dump(exclude=set(TimedSection.model_fields))
    pruner = BlockPruner(config.data.image_size, epochs=blocks.cut_epochs, **settings)
    pruner.check(unit)
    return pruner


def build_sparsity(config: Config, unit: Distiller) -> SparsityPenalty | None:
    """What sparse training adds to the loss; None where it is no part of the settings."""
    sparsity = config.pruning and config.pruning.sparsity
    if not sparsity:
        return None
    end = sparsity.end or config.pruning.last_cut or config.train.epochs
    penalty = SparsityPenalty(end, **sparsity.model_dump(exclude={"end"}))
    try:
        penalty.follow(unit, config.data.image_size)
    except ValueError as error:
        raise UserError(f"pruning.sparsity.{error}") from None
    return penalty


def build_masks(config: Config, unit: Distiller) -> Masks | None:
    """What holds weights at 0, once it is known that there are layers for it; None where there is to be no mask."""
    section = config.pruning and config.pruning.masks
    if not section:
        return None
    masks = Masks(epochs=section.cut_epochs, **section.model_dump(exclude=set(TimedSection.model_fields)))
    try:
        masks.check(unit.student)
    except ValueError as error:
        raise UserError(f"pruning.masks.{error}") from None
    return masks


def build_guard(config: Config) -> CutGuard | None:
    """What judges cuts; None where every cut stays."""
    if config.pruning is None or config.pruning.guard is None:
        return None
    return CutGuard(config.pruning.planned_epochs, config.train.epochs, **config.pruning.guard.model_dump())


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
