"""What a run says about itself: the banner before, the numbers and the table after."""

from typing import Any

import torch
from accelerate import Accelerator

from distill.build import Data
from distill.distiller import Distiller
from distill.evaluation import EvaluationResult
from distill.measure import count_macs, count_parameters
from distill.pruning.pruner import Pruner
from distill.report import counted, human_ap, human_count, human_macs, human_share
from distill.schema import Config
from students import Detector


def size(detector: Detector, image_size: tuple[int, int]) -> str:
    """Such as '3.40M parameters, 1.25G MACs'."""
    return f"{human_count(count_parameters(detector))} parameters, {human_macs(count_macs(detector, image_size))} MACs"


def banner_rows(
    config: Config,
    data: Data,
    unit: Distiller,
    teacher: Detector | None,
    pruner: Pruner | None,
    accelerator: Accelerator,
    role: str,
) -> dict[str, str]:
    """The rows of a run's banner, by heading; `role` is what the detector that is trained plays, student or teacher."""
    height, width = config.data.image_size
    processes = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if accelerator.device.type == "cpu" else ""
    rows = {
        "Devices": f"{processes}{accelerator.device.type}{threads}, mixed precision: {accelerator.mixed_precision}",
        "Data": f"{config.data.root} ({data.train.index.format}): "
        + f"{len(data.train.index)} train, {len(data.val.index)} val"
        + (f", {len(data.test.index)} test" if data.test is not data.val else "")
        + f"; {len(data.class_names)} classes; {width}x{height} px",
        role.capitalize(): _title_and_size(unit.student, config.data.image_size),
    }
    if teacher is not None:
        source = config.teacher.path or "trained first"
        rows["Teacher"] = f"{_title_and_size(teacher, config.data.image_size)} ({source})"
    if unit.terms:
        share = " of the task's gradient" if config.balance == "gradient" else ""
        rows["Distillation"] = ", ".join(
            f"{name}: {loss.name} x {config.weight_of(name):g}{share}" for name, loss in config.losses.items()
        )
        term = next(iter(unit.terms.values()))
        pairs = (f"{unit.student.strides[i]}" for i, _ in term.pairs)
        rows["Levels"] = f"student and teacher meet at strides {', '.join(pairs)}"
    if pruner:
        number = len(pruner.epochs)
        when = f"before epoch {pruner.epochs[0] + 1}" + (f" to {pruner.epochs[-1] + 1}" if number > 1 else "")
        rows["Pruning"] = f"to {pruner.target:.0%} of the MACs, {counted(number, 'cut')} {when}"
    rows["Training"] = (
        f"{counted(config.train.epochs, 'epoch')}, batches of {config.data.batch_size} a process, seed {config.seed}"
    )
    rows["Output"] = config.output_dir
    return rows


def _title_and_size(detector: Detector, image_size: tuple[int, int]) -> str:
    return "; ".join([f"{detector.title}: {size(detector, image_size)}", *detector.notes])


def describe(result: EvaluationResult, detector: Detector, image_size: tuple[int, int]) -> dict[str, Any]:
    """A detector's entry in `summary.json`, still without latency."""
    return {
        "ap": result.ap,
        "ap50": result.ap50,
        "ap75": result.ap75,
        "ap_small": result.ap_small,
        "ap_medium": result.ap_medium,
        "ap_large": result.ap_large,
        "per_class": result.per_class,
        "params": count_parameters(detector),
        "macs": count_macs(detector, image_size),
    }


def comparison(
    entries: dict[str, dict[str, Any] | None], reference: str | None = None
) -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Columns and rows of the table that compares detectors; missing entries are left out.

    Args:
        entries: entries of a summary, by the title of their row.
        reference: the title of the teacher, whose AP the others are compared with; no such column without it.
    """
    teacher = entries.get(reference)
    rows = []
    for title, entry in entries.items():
        if entry is None:
            continue
        scores = [human_ap(entry[key]) for key in ("ap", "ap50", "ap75")]
        share = entry["ap"] / teacher["ap"] if teacher and teacher["ap"] and entry["ap"] is not None else None
        shares = [human_share(share)] if teacher else []
        cost = [human_count(entry["params"]), human_macs(entry["macs"]), f"{entry['latency_ms']:.1f} ms"]
        rows.append([title, *scores, *shares, *cost])
    return ("", "AP", "AP50", "AP75", *(["of teacher"] if teacher else []), "params", "MACs", "latency"), rows
