"""Teachers: detectors that are frozen and only asked."""

from teachers.frozen import PRECISIONS, Teacher, freeze

__all__ = ["PRECISIONS", "Teacher", "freeze"]
