"""Teachers: detectors that are frozen and only asked."""

from teachers.cache import CacheError, TeacherCache
from teachers.classes import speak
from teachers.features import FeatureOutput, FeatureTeacher
from teachers.frozen import PRECISIONS, Teacher, freeze, wait_for
from teachers.inherit import inherit
from teachers.labels import label_images
from teachers.scaled import ScaledDetector

__all__ = [
    "PRECISIONS",
    "CacheError",
    "FeatureOutput",
    "FeatureTeacher",
    "ScaledDetector",
    "Teacher",
    "TeacherCache",
    "freeze",
    "inherit",
    "label_images",
    "speak",
    "wait_for",
]
