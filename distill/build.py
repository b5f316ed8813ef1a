"""From checked settings to objects; the only place that knows both."""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

import students
from distill.combiner import Combiner, WeightSchedule
from distill.data import DetectionDataset, DetectionIndex, build_augmentation, build_loader, build_resize, open_index
from distill.data.synthetic import draw_scenes
from distill.distiller import Distiller
from distill.errors import UserError
from distill.measure import count_macs
from distill.pruning.pruner import Pruner
from distill.schema import Config, DataConfig, DetectorConfig, TermConfig
from distill.terms import TERMS, KnowledgeTerm
from students import Detector
from teachers import inherit


@dataclass
class Split:
    """One split of a data set: its index and a loader over it."""

    index: DetectionIndex
    loader: DataLoader


@dataclass
class Data:
    """What a run reads.

    Attributes:
        train: shuffled and augmented.
        val: evaluated after every epoch.
        test: evaluated in the end, for the table; the validation split if there is no other.
    """

    train: Split
    val: Split
    test: Split

    @property
    def class_names(self) -> list[str]:
        return list(self.train.index.class_names)


def draw_data(config: DataConfig) -> None:
    """Draws the synthetic scenes, if the settings ask for them and they are not there yet."""
    if config.synthetic:
        scenes = config.synthetic
        draw_scenes(config.root, train=scenes.train, val=scenes.val, image_size=scenes.size, seed=scenes.seed)


def build_data(config: DataConfig, seed: int = 0) -> Data:
    """Opens the splits that the settings name."""
    train = open_split(config, config.train, config.classes)
    if not len(train.boxes):
        raise UserError(
            f"data.train: {config.root}, {config.train}: no annotations found, "
            f"none of its {len(train)} images has a box; check the annotation files and data.class_map"
        )
    class_names = train.class_names
    augmentation = build_augmentation(config.image_size, config.resize, **config.augment.model_dump())
    dataset = DetectionDataset(train, augmentation, seed, config.unreadable)
    # a last batch of one or two images would upset the batch norms
    drop_last = len(train) > config.batch_size
    loader = build_loader(
        dataset, config.batch_size, workers=config.workers, shuffle=True, seed=seed, drop_last=drop_last
    )
    val = evaluation_split(config, config.val, class_names)
    test = evaluation_split(config, config.test, class_names) if config.test else val
    return Data(Split(train, loader), val, test)


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
    try:
        count_macs(detector, image_size)
    except (AssertionError, RuntimeError, ValueError) as error:  # such as of a transformer of fixed input size
        height, width = image_size
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{role}: {detector.title} does not take images of {width}x{height} px ({reason}); "
            "change data.image_size, or choose another detector"
        ) from error
    return detector


def build_teacher(config: Config, class_names: list[str]) -> Detector | None:
    """The teacher: loaded where the settings give a path, else untrained, to be trained or just to be looked at."""
    if config.teacher is None:
        return None
    if config.teacher.path is not None:
        return load_teacher(config.teacher.path, class_names)
    return build_detector(config.teacher.detector, class_names, config.data.image_size, "teacher.detector")


def teacher_run_config(config: Config, output_dir: Path) -> Config:
    """The settings of the run that trains the teacher: plain training of `teacher.detector` on the same data."""
    return Config(
        output_dir=str(output_dir),
        overwrite=True,
        seed=config.seed,
        data=config.data,
        student=config.teacher.detector,
        train=config.teacher.train,
    )


def trains_alike(one: Config, other: Config) -> bool:
    """Whether two runs come to the same end: where they write and how many processes load for them does not matter."""
    return all(
        getattr(one, key) == getattr(other, key)
        for key in Config.model_fields
        if key not in ("output_dir", "overwrite", "data")
    ) and one.data.model_copy(update={"workers": 0}) == other.data.model_copy(update={"workers": 0})


def load_teacher(path: str, class_names: list[str]) -> Detector:
    """The detector of an artifact folder, if it knows the data set's classes."""
    try:
        detector = students.load(path)
    except ValueError as error:
        raise UserError(f"teacher.path: {error}") from None
    if detector.class_names != class_names:
        raise UserError(
            f"teacher.path: {path} knows {len(detector.class_names)} classes, {_some(detector.class_names)}; "
            f"the student has {len(class_names)}, {_some(class_names)}; "
            "set data.classes and data.class_map so that both agree"
        )
    return detector


def build_unit(config: Config, class_names: list[str], teacher: Detector | None) -> Distiller:
    """The student and its knowledge terms, untrained."""
    student = build_detector(config.student, class_names, config.data.image_size, "student")
    if config.inherit:
        try:
            inherit(student, teacher, config.inherit)  # once more when the teacher is trained; here to see that it fits
        except ValueError as error:
            raise UserError(str(error)) from None
    terms = {name: build_term(loss, student, teacher, name) for name, loss in config.losses.items()}
    combiner = Combiner(
        {name: config.weight_of(name) for name in config.losses},
        {name: WeightSchedule(**loss.schedule.model_dump()) for name, loss in config.losses.items()},
        config.train.epochs,
        config.balance,
    )
    return Distiller(student, terms, combiner, skip_bad=config.guards.bad_term == "skip")


def build_term(config: TermConfig, student: Detector, teacher: Detector, name: str) -> KnowledgeTerm:
    """One knowledge term between two detectors."""
    settings = config.model_dump(exclude={"name", "weight", "schedule"})
    try:
        return TERMS[config.name](student, teacher, **settings)
    except ValueError as error:
        raise UserError(f"losses.{name}.{error}") from None


def build_pruner(config: Config, unit: Distiller) -> Pruner | None:
    """The pruner, once it is known that its target can be reached; None where nothing is to be cut."""
    if config.pruning is None:
        return None
    settings = config.pruning.model_dump(exclude={"warmup_steps", "evaluate"})
    image_size = config.data.image_size
    pruner = Pruner(count_macs(unit.student, image_size), image_size, **settings)
    pruner.check(unit)
    return pruner


def _some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
