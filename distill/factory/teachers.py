"""Teachers from settings: trained here before, published, made of features alone, or the student itself."""

import copy
import math
from pathlib import Path

import timm

import students
from distill.errors import UserError
from distill.factory.detectors import build_detector, check_image_size, load_detector, require_learner
from distill.measure import count_macs
from distill.schema import Config, DataConfig, TeacherConfig
from students import Detector
from teachers import FeatureTeacher, ScaledDetector, speak


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
            check_image_size(detector, teacher.image_size or config.data.image_size, key)
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
