"""What a run says about itself: the banner before, the numbers and the table after."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from distill.distiller import Distiller
from distill.evaluation import EvaluationResult
from distill.factory import Data
from distill.measure import count_macs, count_nonzero, count_parameters, share_nonzero
from distill.pruning.cost import BUDGETS
from distill.pruning.pruner import Pruner
from distill.pruning.sparsity import small_scales
from distill.report import counted, human_ap, human_count, human_macs, human_milliseconds, human_share
from distill.run import Run
from distill.schema import TEACHER, ArtifactConfig, Config, PruningConfig, ScheduleConfig
from distill.terms import KnowledgeTerm
from students import Detector

ORIGINAL, AVERAGE = "the student before its first cut", "the student's own average"


def size(detector: Detector, image_size: tuple[int, int]) -> str:
    """Such as '3.40M parameters, 1.25G MACs'."""
    return f"{human_count(count_parameters(detector))} parameters, {human_macs(count_macs(detector, image_size))} MACs"


def banner_rows(
    config: Config,
    data: Data,
    unit: Distiller,
    teachers: Mapping[str, Detector],
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
        "Data": f"{config.data.root} ({data.val.index.format}): "
        + f"{len(data.train.index) if config.data.train else 'nothing to'} train, {len(data.val.index)} val"
        + (f", {len(data.test.index)} test" if data.test is not data.val else "")
        + f"; {len(data.class_names)} classes; {width}x{height} px",
        role.capitalize(): _title_and_size(unit.student, config.data.image_size)
        + (f" ({config.student.path})" if isinstance(config.student, ArtifactConfig) else ""),
    }
    if data.unlabelled is not None:
        rows["Unlabelled"] = unlabelled_row(config, data, unit)
    share = " of the task's gradient" if config.balance == "gradient" else ""
    for name, teacher in teachers.items():
        settings = config.all_teachers[name]
        title = teacher_title(name).capitalize()
        source = settings.path or {"original": ORIGINAL, "ema": AVERAGE}.get(settings.itself, "trained first")
        source = settings.detector.weights if settings.as_its_weights_are else source
        source = f"{settings.features.weights}; teaches by its features" if settings.features else source
        if settings.image_size:
            source += f", sees {settings.image_size[1]}x{settings.image_size[0]} px"
        rows[title] = f"{_title_and_size(teacher, config.data.image_size)} ({source})"
        if teacher.unknown:
            rows[title] += f"; does not know {', '.join(teacher.class_names[label] for label in teacher.unknown)}"
        terms = {loss: unit.terms[loss] for loss, by in unit.taught_by.items() if by == name}
        if not terms and not (config.inherit and name == next(iter(teachers))):
            rows[title] += "; no loss learns from it, it is only compared with"
        if terms:
            of = "" if len(teachers) == 1 else f" of {name}"
            rows[f"Distillation{of}"] = ", ".join(
                f"{loss}: {config.losses[loss].name} x {unit.combiner.weights[loss]:g}{share}"
                + describe_schedule(config.losses[loss].schedule, config.train.epochs)
                for loss in terms
            )
            rows |= {f"Levels{of}": pairings} if (pairings := describe_levels(terms)) else {}
    if pruner:
        rows["Pruning"] = f"to {pruner.target:.0%} of the {pruner.counted_in}, {_how_cut(config.pruning)}"
        rows["Pruning"] += ", all but the last only set channels to 0" if pruner.soft_epochs else ""
    if config.pruning:
        rows |= _other_pruning(config.pruning)
    rows["Training"] = (
        f"{counted(config.train.epochs, 'epoch')}, batches of {config.data.batch_size} a process, seed {config.seed}"
    )
    rows["Output"] = config.output_dir
    return rows


def _how_cut(config: PruningConfig) -> str:
    """By what channels are chosen, and when."""
    per = f" per {config.per}" if config.per != "none" else ""
    return f"by {config.importance}, ranking {config.ranking}{per}, {times(config.cut_epochs, 'cut')}"


def _other_pruning(config: PruningConfig) -> dict[str, str]:
    """The rows of what is pruned besides channels."""
    rows = {}
    if config.blocks:
        rows["Blocks"] = f"{counted(config.blocks.count, 'block')} less, by "
        rows["Blocks"] += f"{config.blocks.importance}, {times(config.blocks.cut_epochs, 'cut')}"
    if masks := config.masks:
        share = f", {masks.sparsity:.0%} of them 0" if masks.sparsity else ""
        rows["Masks"] = f"{masks.kind}{share}, by {masks.importance}, {times(masks.cut_epochs, 'choice')}"
    if sparsity := config.sparsity:
        rates = ((name, getattr(sparsity, name)) for name in ("weights", "scales", "groups"))
        until = sparsity.end or config.last_cut
        rows["Sparsity"] = ", ".join(f"{name} x {rate:g}" for name, rate in rates if rate)
        rows["Sparsity"] += f", for the first {counted(until, 'epoch')}" if until else ""
    return rows


def times(epochs: Sequence[int], what: str) -> str:
    """Such as '2 cuts before epochs 3, 6', of epochs counted from 0."""
    numbers = [str(epoch + 1) for epoch in epochs]
    if len(epochs) > 2 and list(epochs) == list(range(epochs[0], epochs[-1] + 1)):
        numbers = [f"{numbers[0]} to {numbers[-1]}"]
    return f"{counted(len(epochs), what)} before {'epoch' if len(epochs) == 1 else 'epochs'} {', '.join(numbers)}"


def describe_schedule(schedule: ScheduleConfig, epochs: int) -> str:
    """Such as ' (warm-up 2 epochs, cosine to 0)'; nothing where a weight stays as it is."""
    parts = []
    if schedule.warmup_epochs:
        parts.append(f"warm-up {schedule.warmup_epochs:g} epochs")
        parts[0] += f", of which the run has {epochs}" if schedule.warmup_epochs > epochs else ""
    if schedule.shape != "constant":
        parts.append(f"{schedule.shape} to {schedule.final:g}")
    if schedule.stop_epoch is not None:
        parts.append(f"for the first {counted(schedule.stop_epoch, 'epoch')}")
    return f" ({', '.join(parts)})" if parts else ""


def describe_levels(terms: Mapping[str, KnowledgeTerm]) -> str:
    """Which levels of student and teacher meet: a line for all terms that pair them alike, naming them where others
    do it otherwise."""
    by_pairing: dict[str, list[str]] = {}
    for name, term in terms.items():
        if term.pairing:
            by_pairing.setdefault(term.pairing, []).append(name)
    if len(by_pairing) == 1:
        return next(iter(by_pairing))
    return "\n".join(f"{', '.join(names)}: {pairing}" for pairing, names in by_pairing.items())


def unlabelled_row(config: Config, data: Data, unit: Distiller) -> str:
    """Which images have no labels, and what that means for the losses."""
    settings, number = config.data.unlabelled, len(data.unlabelled)
    share = f"{settings.ratio:.0%} of what is trained on" if config.data.train else "all that is trained on"
    by_boxes = [name for name, term in unit.terms.items() if term.uses_boxes]
    text = f"{settings.root}: {number} images, {share}; without the task's loss"
    if by_boxes:
        text += (
            f"; {', '.join(by_boxes)}: by what the teacher detects with a score of {settings.score_threshold:g} or more"
        )
    return text


def teacher_title(name: str) -> str:
    """What a teacher is called in tables."""
    return TEACHER if name == TEACHER else f"{TEACHER} {name}"


def best(aps: Mapping[str, float | None]) -> str | None:
    """The name with the highest AP, the first of equals; None if there is none."""
    return max(aps, key=lambda name: aps[name] or 0.0, default=None)


def describe_config(config: dict[str, Any]) -> dict[str, str]:
    """The settings that one asks for first, by heading."""
    data, student = config.get("data") or {}, config.get("student") or {}
    teachers = config.get("teachers") or {TEACHER: config.get("teacher")}
    pruning = config.get("pruning") or {}
    size = data.get("image_size")
    rows = {"Data": f"{data.get('root')}" + (f", {size[1]}x{size[0]} px" if isinstance(size, list) else "")}
    rows["Student"] = ", ".join(
        str(student[key])
        for key in ("name", "path", "size", "backbone", "neck", "channels")
        if student.get(key) not in (None, "dense", "artifact")
    )
    for name, teacher in teachers.items():
        if teacher:
            detector = teacher.get("detector") or {}
            source = teacher.get("path") or {"original": ORIGINAL, "ema": AVERAGE}.get(teacher.get("itself"))
            source = source or {**detector, **(teacher.get("features") or {})}.get("backbone") or detector.get("name")
            rows[teacher_title(name).capitalize()] = str(source or "")
    losses = config.get("losses") or {}
    if losses:
        balance = " of the task's gradient" if config.get("balance") == "gradient" else ""
        rows["Losses"] = ", ".join(
            f"{name}: {loss.get('name')}"
            + (f" x {loss['weight']:g}{balance}" if loss.get("weight") is not None else "")
            for name, loss in losses.items()
        )
    if pruning:
        section = PruningConfig(**pruning)
        if section.target is not None:
            rows["Pruning"] = f"to {human_share(section.target)} of the {BUDGETS[section.budget]}, "
            rows["Pruning"] += _how_cut(section)
        rows |= _other_pruning(section)
    train = config.get("train") or {}
    rows["Training"] = f"{train.get('epochs')} epochs, batches of {data.get('batch_size')}, seed {config.get('seed')}"
    return rows


def _title_and_size(detector: Detector, image_size: tuple[int, int]) -> str:
    return "; ".join([f"{detector.title}: {size(detector, image_size)}", *detector.notes])


def describe(result: EvaluationResult, detector: torch.nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
    """A detector's entry in `summary.json`, still without latency; it costs what it does as it is deployed.

    Of an exported file parameters and MACs are not known.
    """
    deployed = detector.deployed() if isinstance(detector, Detector) else None
    return {
        "ap": result.ap,
        "ap50": result.ap50,
        "ap75": result.ap75,
        "ap_small": result.ap_small,
        "ap_medium": result.ap_medium,
        "ap_large": result.ap_large,
        "per_class": result.per_class,
        "precision": result.precision,
        "params": count_parameters(deployed) if deployed else None,
        "nonzero": count_nonzero(deployed) if deployed else None,
        "macs": count_macs(deployed, image_size) if deployed else None,
    }


def results_row(
    epoch: int,
    losses: Mapping[str, float],
    cost: Mapping[str, float],
    result: EvaluationResult,
    other_aps: Mapping[str, float | None],
    lr: float,
    seconds: float,
) -> dict[str, float | int | None]:
    """An epoch's row in `results.csv`; the AP of others than the student under columns of their own."""
    scores = {"ap": result.ap, "ap50": result.ap50, "ap75": result.ap75, **other_aps}
    per_class = {f"ap_{name}": ap for name, ap in result.per_class.items()}
    return {"epoch": epoch, **losses, **cost, **scores, "lr": lr, "seconds": seconds, **per_class}


def cost_columns(run: Run, student: Detector, uncut_macs: int) -> dict[str, float]:
    """What a student costs, as columns of `results.csv`; what is trained sparse or masked tells how much is 0, too."""
    macs = count_macs(student, run.config.data.image_size)
    columns = {"macs": macs, "macs_left": macs / uncut_macs, "params": count_parameters(student)}
    columns |= {"small_scales": small_scales(student)} if run.sparsity else {}
    return columns | ({"nonzero": share_nonzero(student)} if run.masks else {})


def told_row(
    row: Mapping[str, Any], epochs: int, losses: Iterable[str], is_cut: bool, time_left: float
) -> dict[str, Any]:
    """An epoch's row as it is printed.

    Args:
        row: as in `results.csv`.
        epochs: of the run.
        losses: columns of losses.
        is_cut: whether the run cuts channels.
        time_left: in seconds.
    """
    told = {"epoch": f"{row['epoch']}/{epochs}"} | {name: row[name] for name in losses}
    told |= {"macs_left": row["macs_left"]} if is_cut else {}
    told |= {"AP": row["ap"], "AP50": row["ap50"]}
    if "teacher_ap" in row:
        told["teacher_share"] = row["ap"] / row["teacher_ap"] if row["teacher_ap"] else None
    return told | {"lr": row["lr"], "epoch_time": row["seconds"], "time_left": time_left}


def comparison(
    entries: dict[str, dict[str, Any] | None], reference: str | None = None
) -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Columns and rows of the table that compares detectors; missing entries are left out.

    Args:
        entries: entries of a summary, by the title of their row.
        reference: the title of the teacher whose AP the others are compared with; no such column without it.
    """
    teacher = entries.get(reference)
    entries = {title: entry for title, entry in entries.items() if entry is not None}
    known = [entry for entry in entries.values() if entry["params"] is not None]
    # a few weights of pretrained networks are 0 without any mask
    masked = any(entry.get("nonzero", entry["params"]) < 0.99 * entry["params"] for entry in known)
    rows = []
    for title, entry in entries.items():
        scores = [human_ap(entry[key]) for key in ("ap", "ap50", "ap75")]
        share = entry["ap"] / teacher["ap"] if teacher and teacher["ap"] and entry["ap"] is not None else None
        shares = [human_share(share)] if teacher else []
        counts = [entry["params"], *([entry.get("nonzero", entry["params"])] if masked else [])]
        cost = [*map(human_count, counts), human_macs(entry["macs"]), human_milliseconds(entry["latency_ms"])]
        rows.append([title, *scores, *shares, *cost])
    columns = (*(["of teacher"] if teacher else []), "params", *(["not 0"] if masked else []), "MACs", "latency")
    return ("", "AP", "AP50", "AP75", *columns), rows


def summary_table(summary: dict[str, Any], role: str = "student") -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Columns and rows of the same table, from what `summary.json` holds."""
    rows = {teacher_title(name): entry for name, entry in teachers_in(summary).items()}
    reference = best({title: entry["ap"] for title, entry in rows.items()})
    before = summary.get("student_before")
    rows |= {f"student before cutting, epoch {before['epoch']}": before} if before else {}
    return comparison(rows | {role: summary["student"]}, reference)


def teachers_in(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of the teachers in `summary.json`, by name."""
    return summary.get("teachers") or ({TEACHER: summary["teacher"]} if summary.get("teacher") else {})
