"""Teachers: detectors that are frozen and only asked."""

from teachers.frozen import PRECISIONS, Teacher, freeze
from teachers.inherit import inherit

__all__ = ["PRECISIONS", "Teacher", "freeze", "inherit"]
