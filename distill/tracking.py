"""Sends a run's numbers to trackers - TensorBoard, Trackio, Weights & Biases - through Accelerate."""

from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

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


def stop_tracking(accelerator: Accelerator) -> None:
    """Closes the run in each tracker; not `end_training`, which would end the processes' group for all of us."""
    for tracker in accelerator.trackers:
        tracker.finish()
