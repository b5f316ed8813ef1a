"""Detectors that can be trained and pruned: the contract, its parts, its families, and how they are kept on disk."""

from students.adapter import Adapter, DetectedOutput
from students.artifact import FAMILIES, build, load, narrow, read_info, rebuild, renew_classes, save, told_classes
from students.checkpoint import OtherClassesError
from students.detector import IMPOSSIBLE, DenseOutput, Detections, Detector, of_images
from students.plan import Plan, apply_plan
from students.shared_weights import SharedWeight
from students.two_stage import RoiOutput, RoiSamples, TwoStageDetector, TwoStageOutput

__all__ = [
    "FAMILIES",
    "IMPOSSIBLE",
    "Adapter",
    "DenseOutput",
    "DetectedOutput",
    "Detections",
    "Detector",
    "OtherClassesError",
    "Plan",
    "RoiOutput",
    "RoiSamples",
    "SharedWeight",
    "TwoStageDetector",
    "TwoStageOutput",
    "apply_plan",
    "build",
    "load",
    "narrow",
    "of_images",
    "read_info",
    "rebuild",
    "renew_classes",
    "save",
    "told_classes",
]
