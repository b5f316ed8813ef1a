"""Teachers: detectors that are frozen and only asked."""

from teachers.frozen import PRECISIONS, Teacher, freeze
from teachers.inherit import inherit
from teachers.scaled import ScaledDetector

__all__ = ["PRECISIONS", "ScaledDetector", "Teacher", "freeze", "inherit"]
