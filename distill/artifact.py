"""What a run left behind, opened for a user: its detector, exported or not, and the settings of the data it is for."""

from collections.abc import Sequence
from pathlib import Path

import students
from distill.config import check_config, override, read_yaml
from distill.errors import UserError
from distill.exported import SUFFIXES, ExportedDetector
from distill.factory import Split, evaluation_split
from distill.run_folder import CONFIG, STUDENT
from distill.schema import Config
from students import Detector


def open_folder(path: Path) -> Detector:
    """The detector of an artifact folder, in eval mode on the CPU.

    Raises:
        UserError: there is no folder, it is a run's in place of its detector's, or its parts do not belong together.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a detector's, such as runs/x/student")
    if path.is_file():
        raise UserError(f"{path}: is a file; give a detector's folder, such as runs/x/student")
    if (path / STUDENT).is_dir():
        raise UserError(f"{path}: is a run; give the detector in it, {path / STUDENT}")
    if (path / CONFIG).is_file():
        raise UserError(f"{path}: is a run that has no student yet; finish it: train.py --resume {path}")
    try:
        return students.load(path)
    except ValueError as error:
        raise UserError(str(error)) from None


def open_detector(path: Path, threads: int | None = None) -> Detector | ExportedDetector:
    """The detector of an artifact folder, or of a .onnx or .pt2 file made from one; `threads` are ONNX Runtime's."""
    return ExportedDetector(path, threads) if path.suffix in SUFFIXES.values() else open_folder(path)


def data_settings(path: Path, config: str | None, overrides: Sequence[str]) -> Config:
    """The settings that say where a detector's data is.

    Args:
        path: the detector's folder or file.
        config: a config file; the config.yaml beside the detector otherwise.
        overrides: `dotted.key=value` each.

    Raises:
        UserError: there is no such file, or something in it is wrong.
    """
    source = Path(config) if config else path.resolve().parent / CONFIG
    if not source.is_file():
        raise UserError(f"{source}: no such file; name the config whose data to use with --config configs/NAME.yaml")
    return check_config(override(read_yaml(source), list(overrides)), str(source))


def images_for(
    detector: Detector | ExportedDetector, config: Config, image_size: tuple[int, int], split: str | None = None
) -> Split:
    """A split as the detector needs it: fitted as in its training, with its own classes in its own order.

    Args:
        detector: whose images they are.
        config: where the data is; also tells how to fit images where the detector's `info` does not.
        image_size: (height, width) in pixels.
        split: `data.test` otherwise, or `data.val` where there is no test split.
    """
    fit = {"image_size": image_size, "resize": detector.info.get("resize", config.data.resize)}
    data = config.data.model_copy(update=fit)
    return evaluation_split(data, split or data.test or data.val, detector.class_names)


def input_size(detector: Detector | ExportedDetector, config: Config | None = None) -> tuple[int, int]:
    """(height, width) in pixels of the images that a detector was trained for.

    Raises:
        UserError: neither the detector's `info` nor a config tells.
    """
    if "image_size" in detector.info:
        height, width = detector.info["image_size"]
        return height, width
    if config is None:
        raise UserError("image_size: nothing beside the detector tells it; save it with info={'image_size': [h, w]}")
    return config.data.image_size
