"""Sends a run's numbers to trackers - TensorBoard, Trackio, Weights & Biases - through Accelerate."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin
from PIL import Image

from distill.config import flatten
from distill.errors import UserError
from distill.run_folder import RunFolder
from distill.schema import Config

PROJECT = "distill"  # under which trackers gather runs


def build_accelerator(config: Config) -> Accelerator:
    """Accelerate as a run needs it; no tracker is started yet.

    Raises:
        UserError: a tracker's package is not installed; Accelerate itself would leave it out in silence.
    """
    there = {tracker.value for tracker in get_available_trackers()}
    for name in config.tracking:
        if name not in there:
            raise UserError(f"tracking: {name} is not installed; pip install {name}, or leave it out of tracking")
    folder = RunFolder(config.output_dir).tracking
    return Accelerator(
        # it would compile the losses along; `compile_parts` goes by its settings
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
        log_with=list(config.tracking) or None,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(folder)),
    )


def start_tracking(accelerator: Accelerator, config: Config) -> None:
    """Opens the run in each tracker, named after its folder, with its settings."""
    if not config.tracking:
        return
    name = Path(config.output_dir).resolve().name
    folder = RunFolder(config.output_dir).tracking
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
    options = {"wandb": {"name": name, "dir": str(folder)}, "trackio": {"name": name}}
    accelerator.init_trackers(PROJECT, flatten(config.model_dump(mode="json")), options)


def log_results(accelerator: Accelerator, row: Mapping[str, float | int | None]) -> None:
    """Sends an epoch's row of `results.csv`, without what is empty."""
    accelerator.log({key: value for key, value in row.items() if value is not None}, step=row["epoch"])


def stop_tracking(accelerator: Accelerator, config: Config) -> None:
    """Sends the pictures as they are in the end, and closes the run in each tracker.

    Not by `end_training`, which would end the processes' group too.
    """
    pictures = {}
    if accelerator.is_main_process and accelerator.trackers:
        files = sorted(RunFolder(config.output_dir).pictures.glob("*.png"))
        pictures = {file.stem: np.asarray(Image.open(file).convert("RGB")) for file in files}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            batches = {name: picture[None] for name, picture in pictures.items()}
            tracker.log_images(batches, config.train.epochs, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [picture] for name, picture in pictures.items()}, config.train.epochs)
        elif tracker.name == "trackio" and pictures:
            from trackio import Image as TrackedImage  # of an extra

            tracker.log({name: TrackedImage(picture) for name, picture in pictures.items()}, config.train.epochs)
        tracker.finish()
