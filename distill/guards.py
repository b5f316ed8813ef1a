"""Checks that name what otherwise fails in silence: a loss that teaches nothing, one that drowns the rest, a teacher
that changes."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from distill.combiner import GRADIENT, gradient_norms
from distill.data import Batch
from distill.distiller import Distiller, count_labelled
from distill.ema import EMA
from distill.errors import UserError
from distill.run import Run
from distill.run_folder import RunFolder
from distill.schema import Config
from distill.terms import KnowledgeTerm
from teachers import Teacher, label_images


def look_at_losses(run: Run) -> list[str]:
    """Stops the run where a knowledge loss teaches nothing; where one drowns the task, does what the settings say.

    Returns:
        The names of the losses to leave out until the next look.
    """
    batch = find_objects(run.unit, run.teachers, run.calibration_batches())
    alike = [name for name, teacher in run.config.all_teachers.items() if teacher.itself]
    settings = run.config.guards
    found = check_terms(run.unit, run.teachers, batch, settings.dominates, alike) if batch else {}
    if batch is None:
        run.report.warn(
            "losses: on the training images that were looked at there is no object, neither labelled nor "
            "detected by a teacher, so whether each loss teaches was not looked at; where images have no labels, lower "
            "data.unlabelled.score_threshold"
        )
    for line in tell_blind(run.unit, run.teachers, run.calibration_batches()):
        run.report.warn(line)
    found = gather_object([found])[0]  # of the main process, so that no rounding lets others train on other losses
    if found and settings.dominating_term == "stop":
        raise UserError(f"{next(iter(found.values()))}; guards.dominating_term=warn goes on")
    skips = settings.dominating_term == "skip"
    for line in found.values():
        run.report.warn(f"{line}; until the next look it is left out" if skips else line)
    return list(found) if skips else []


def find_objects(unit: Distiller, teachers: Mapping[str, Teacher], batches: Iterable[Batch]) -> Batch | None:
    """The first batch with objects, as some losses are silent, and rightly so, without; None if there is no such batch.

    Where nothing is labelled, an object is what a teacher is sure enough of; where no teacher detects any, the first
    batch has to do.
    """
    detecting = [teacher for teacher in teachers.values() if teacher.detector.detects]
    for batch in batches:
        labelled = [target for target in batch.targets if target is not None]
        if not labelled:
            size, least = tuple(batch.images.shape[-2:]), unit.score_threshold
            if not detecting:
                return batch
            seen = (label_images(t.detector, t(batch.images), size, least) for t in detecting)
            labelled = [target for targets in seen for target in targets]
        if any(len(target["labels"]) for target in labelled):
            return batch
    return None


def check_terms(
    unit: Distiller, teachers: Mapping[str, Teacher], batch: Batch, dominates: float, alike: Collection[str] = ()
) -> dict[str, str]:
    """Looks at each knowledge term's gradient at the student's pyramid, by the most that it will weigh from now on.

    The unit is in train mode, as gradients are in training: before it, untrained batch norms would not normalise yet.
    All the same nothing changes, batch norms and the random generator are put back. Every rank must be given the same
    batch. Terms that will count nothing any more, or whose teacher is not there yet, are passed over.

    Args:
        unit: the student with its terms.
        teachers: its teachers, by name.
        batch: of training images, best with objects.
        dominates: how many times the task's gradient norm a term's may be.
        alike: names of teachers that are as the student is at first, and so have nothing to say then.

    Returns:
        A line for each term that dominates, by name.

    Raises:
        UserError: a term that has no gradient; or a teacher has been given gradients.
    """
    device = batch.images.device
    devices = [] if device.type == "cpu" else [device]
    modes = [(module, module.training) for module in unit.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in unit.buffers()]
    combiner, skipped = unit.combiner, unit.skipped.copy()
    with combiner.at_most(), torch.enable_grad(), torch.random.fork_rng(devices, device_type=device.type):
        lessons = unit.train().ask(teachers, batch.images, batch.targets)
        task, terms, features = unit.losses(batch.images, batch.targets, lessons)
        task_norm, *norms = gradient_norms([task, *terms.values()], features).tolist()
        shares = [combiner.share(name, task_norm, norm) if task_norm else 0.0 for name, norm in zip(terms, norms)]
        counts = [combiner.weight(name) > 0 for name in terms]
    for module, training in modes:
        module.training = training
    for buffer, before in buffers:
        buffer.copy_(before)
    no_numbers, unit.skipped = unit.skipped - skipped, skipped
    dominating = {}
    for name, norm, share, counting in zip(terms, norms, shares, counts):
        if not counting:
            continue
        if norm == 0 and unit.taught_by[name] in alike and name not in no_numbers:
            continue
        if not norm > 0:  # NaN too
            found = "no gradient" if norm == 0 else "a gradient that is no number"
            found = "a loss that is no number" if name in no_numbers else found
            why = unit.terms[name].silent_because if norm == 0 and name not in no_numbers else ""
            raise UserError(f"losses.{name}: gives the student {found}, so it teaches nothing{why}; leave it out")
        if share > dominates:
            fitting = combiner.weights[name] * dominates / share
            other = "" if combiner.balance == "gradient" else ", or say balance: gradient"
            dominating[name] = (
                f"losses.{name}: its gradient is {share:.3g} times the task's, more than guards.dominates, "
                f"{dominates:g}; lower its weight below {fitting:.2g}{other}"
            )
    for key, teacher in teachers.items():
        touched = [name for name, p in teacher.detector.named_parameters() if p.grad is not None or p.requires_grad]
        if touched:
            raise UserError(f"{Config.teacher_key(key)}: {touched[0]} takes part in training; a teacher must be frozen")
    return dominating


def tell_blind(unit: Distiller, teachers: Mapping[str, Teacher], batches: Iterable[Batch]) -> list[str]:
    """A line for each loss that goes by its teacher's detections, where these images show none: it would learn that all
    is background, as strongly as from a teacher that sees. Losses that go by boxes do so where there are no labels."""
    combiner = unit.combiner
    with combiner.at_most():
        waiting = {
            name: unit.score_threshold if term.score_threshold is None else term.score_threshold
            for name, term in unit.terms.items()
            if (term.score_threshold is not None or term.uses_boxes) and combiner.weight(name)
        }
    seen = dict.fromkeys(waiting, 0)
    for batch in batches if waiting else ():
        size, labelled = tuple(batch.images.shape[-2:]), count_labelled(batch.targets)
        for name, least in list(waiting.items()):
            images = batch.images[labelled if unit.terms[name].score_threshold is None else 0 :]
            if not len(images):
                continue
            seen[name] += len(images)
            teacher = teachers[unit.taught_by[name]]
            with torch.no_grad():
                found = label_images(teacher.detector, teacher(images), size, least)
            if any(len(target["labels"]) for target in found):
                del waiting[name]
    return [
        f"losses.{name}: {Config.teacher_key(unit.taught_by[name])} detects nothing with a score of {least:g} or more "
        f"on {seen[name]} {'unlabelled' if unit.terms[name].score_threshold is None else 'training'} images, so it "
        f"teaches that all is background; lower {_threshold_of(unit.terms[name], name)}, or take a teacher that knows "
        "such images"
        for name, least in waiting.items()
        if seen[name]
    ]


def _threshold_of(term: KnowledgeTerm, name: str) -> str:
    """The setting that says how sure the teacher must be of what a loss goes by."""
    return "data.unlabelled.score_threshold" if term.score_threshold is None else f"losses.{name}.score_threshold"


def check_losses(unit: Distiller, accelerator: Accelerator, seen: Iterable[tuple[int, list[str]]], file: Path) -> None:
    """Looks whether a loss was no number since the last look; every rank has to ask.

    Args:
        unit: the student with its terms.
        accelerator: on whose ranks it may have been.
        seen: the last steps, counted over the run, and the images of each on this rank.
        file: where everything that is needed to see it again is written, as JSON.

    Raises:
        UserError: it was; names the first such loss, its step and its images. Raised on all ranks.
    """
    step, losses = unit.combiner.bad_losses()
    flags = accelerator.reduce(torch.tensor(float(bool(losses)), device=accelerator.device))
    if not flags:
        return
    images = next((files for number, files in seen if number == step), [])
    step, losses, images = min(gather_object([(step, losses, images)] if losses else []))
    if accelerator.is_main_process:
        _write_failure(file, losses, step, unit, images)
    folder = RunFolder(file.parent).outermost
    way_out = "lower train.optimizer.lr" if losses[0] == "task" else f"lower losses.{losses[0]}.weight; 0 leaves it out"
    what = f"losses: {', '.join(losses)}"
    if losses == [GRADIENT]:
        what = "losses: all were numbers, but the gradient"
        way_out = "lower train.optimizer.lr"
        way_out += f", or leave out a loss, such as losses.{next(iter(unit.terms))}.weight=0" if unit.terms else ""
    raise UserError(
        f"{what} became NaN or infinite in step {step + 1} (epoch {int(unit.combiner.epoch) + 1}) "
        f"on {', '.join(images)}, see {file}; {way_out}: train.py --resume {folder} key=value goes on from the "
        "last checkpoint"
    )


def tell_left_out(
    unit: Distiller, accelerator: Accelerator, left_out: Iterable[tuple[int, str, list[str]]], file: Path
) -> list[str]:
    """A line for each loss that was no number and was left out of steps of an epoch; every rank has to ask.

    Args:
        unit: the student with its terms.
        accelerator: on whose ranks it may have been.
        left_out: step, counted over the run, name of the loss, and images of each time, on this rank.
        file: where the first time of all is written, as by `check_losses`.
    """
    times: dict[str, list[tuple[int, list[str]]]] = {}
    for step, name, images in sorted(gather_object(list(left_out))):
        times.setdefault(name, []).append((step, images))
    if times and accelerator.is_main_process:
        name, [(step, images), *_] = min(times.items(), key=lambda item: item[1][0])
        _write_failure(file, [name], step, unit, images)
    return [
        f"losses.{name}: was no number and was left out {len(found)} times in this epoch, first in step "
        f"{found[0][0] + 1} on {', '.join(found[0][1])}, see {file}"
        for name, found in times.items()
    ]


def _write_failure(file: Path, losses: list[str], step: int, unit: Distiller, images: list[str]) -> None:
    found = {"losses": losses, "step": step, "epoch": int(unit.combiner.epoch) + 1, "images": images}
    file.write_text(json.dumps(found, indent=2) + "\n")


def check_alike(accelerator: Accelerator, unit: Distiller, ema: EMA | None) -> None:
    """Raises a UserError if processes hold other parameters, or other widths, than the main one; every rank has to ask.

    A wrapper would copy the main process's values over all others and leave optimizer states that belong to none.
    """
    if accelerator.num_processes == 1:
        return
    digest = hashlib.sha256()
    for name, tensor in [*unit.named_parameters(), *(ema.module.named_parameters() if ema else ())]:
        _enter(digest, f"{name} {tuple(tensor.shape)}", tensor)
    # batch-norm statistics are left out: they are each process's own between two evaluations
    found = gather_object([digest.hexdigest()])
    others = [rank for rank, one in enumerate(found) if one != found[0]]
    if others:
        raise UserError(
            f"processes: {', '.join(map(str, others))} of {len(found)} hold another student than the main one; they "
            "must run the same code on the same kind of device"
        )


def fingerprint(module: nn.Module) -> str:
    """A hash of every parameter and buffer, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        _enter(digest, name, tensor)
    return digest.hexdigest()


def check_unchanged(teachers: Mapping[str, Teacher], before: Mapping[str, str]) -> None:
    """Raises a UserError if a teacher with a fingerprint is no longer the one that it was taken of."""
    for name, known in before.items():
        if fingerprint(teachers[name].detector) != known:
            key = Config.teacher_key(name)
            raise UserError(f"{key}: its weights or batch-norm statistics changed during training; it must be frozen")


def _enter(digest: "hashlib._Hash", name: str, tensor: torch.Tensor) -> None:
    digest.update(name.encode())
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # this process's part of a sharded one
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
