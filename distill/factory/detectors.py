"""Detectors from settings: new ones and saved ones, once it is known that they take the images."""

from collections.abc import Iterator, Mapping

import students
from distill.errors import UserError
from distill.measure import count_macs
from distill.schema import ArtifactConfig, Config, DetectorConfig
from students import Detector
from teachers import speak


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
                f"student.path: {settings.path} does not know {some([class_names[x] for x in student.unknown])}; name "
                "them in student.class_map, or say student.new_head=true to start its class layers anew"
            )
    require_learner(student, "student")
    check_image_size(student, config.data.image_size, "student")
    return student.train()


def build_detector(config: DetectorConfig, class_names: list[str], image_size: tuple[int, int], role: str) -> Detector:
    """A new detector; what its family refuses is told under the key of its role, `student` or `teacher.detector`."""
    try:
        detector = students.build(class_names=class_names, **config.model_dump())
    except ValueError as error:
        raise UserError(f"{role}.{error}") from None
    check_image_size(detector, image_size, role)
    return detector


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


def require_learner(detector: Detector, role: str) -> None:
    """Raises a UserError if a detector that is to be trained has no loss."""
    if not detector.learns:
        raise UserError(
            f"{role}: {detector.title} has no loss here, so it can only teach; name it as teacher.detector, with its "
            "weights and without train, or choose another student"
        )


def check_image_size(detector: Detector, image_size: tuple[int, int], role: str) -> None:
    """Raises a UserError if a detector cannot look at images of a size, such as a transformer of fixed input size."""
    reason = refusal(detector, image_size)
    if reason is None:
        return
    height, width = image_size
    larger = next((size for size in enlarged(image_size) if refusal(detector, size) is None), None)
    way_out = f"it takes {larger[1]}x{larger[0]}, data.image_size={list(larger)}" if larger else "change its size"
    raise UserError(
        f"{role}: {detector.title} does not take images of {width}x{height} px ({reason}); {way_out}, or choose "
        "another detector"
    )


def refusal(detector: Detector, image_size: tuple[int, int]) -> str | None:
    """What a detector's code says to images of (height, width); None where it takes them."""
    try:
        count_macs(detector, image_size)
    except (AssertionError, RuntimeError, ValueError) as error:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def enlarged(image_size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Larger sizes of about the same shape, in multiples of 32, up to four times as large."""
    height, width = image_size
    for quarter in range(5, 17):
        yield tuple(round(side * quarter / 4 / 32) * 32 for side in (height, width))


def some(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
