"""From checked settings to objects; the only place that knows both."""

from distill.factory.data import Data, Split, build_data, draw_data, evaluation_split, open_split
from distill.factory.detectors import build_detector, build_student, load_detector
from distill.factory.losses import build_term, build_unit
from distill.factory.pruning import build_block_pruner, build_guard, build_masks, build_pruner, build_sparsity
from distill.factory.teachers import at_own_size, build_teachers, teacher_run_config

__all__ = [
    "Data",
    "Split",
    "at_own_size",
    "build_block_pruner",
    "build_data",
    "build_detector",
    "build_guard",
    "build_masks",
    "build_pruner",
    "build_sparsity",
    "build_student",
    "build_teachers",
    "build_term",
    "build_unit",
    "draw_data",
    "evaluation_split",
    "load_detector",
    "open_split",
    "teacher_run_config",
]
