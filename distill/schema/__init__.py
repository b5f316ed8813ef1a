"""Every setting of a run, checked by pydantic; a file a part, and `Config` holds them all."""

from distill.schema.base import Section
from distill.schema.data import DataConfig
from distill.schema.detectors import DETECTORS, ArtifactConfig, DetectorConfig
from distill.schema.losses import LOSSES, LossConfig, ScheduleConfig, TermConfig
from distill.schema.pruning import PruningConfig, TimedSection
from distill.schema.run import PENALTY, RESERVED, TEACHER, Config, TeacherConfig

__all__ = [
    "DETECTORS",
    "LOSSES",
    "PENALTY",
    "RESERVED",
    "TEACHER",
    "ArtifactConfig",
    "Config",
    "DataConfig",
    "DetectorConfig",
    "LossConfig",
    "PruningConfig",
    "ScheduleConfig",
    "Section",
    "TeacherConfig",
    "TermConfig",
    "TimedSection",
]
