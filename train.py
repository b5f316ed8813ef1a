"""Trains a student, with or without a teacher, cutting it between epochs on the way. The whole loop is in this file.

python train.py configs/quickstart.yaml
accelerate launch train.py configs/bccd.yaml data.root=PATH train.epochs=30
python train.py --resume runs/bccd
"""

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import students
from distill import factory
from distill.catalog import print_catalog
from distill.checkpoint import (
    EpochProgress,
    Progress,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from distill.config import check_config, load_config, override, trains_alike
from distill.data import set_epoch, start_after
from distill.distiller import Distiller
from distill.distributed import compile_options, compile_parts, on_main, share_buffers
from distill.ema import EMA
from distill.errors import UserError
from distill.evaluation import DetectionEvaluator, EvaluationResult, run_evaluation
from distill.footprint import estimate, human_bytes
from distill.guards import check_losses, check_terms, check_unchanged, find_objects, fingerprint, tell_left_out
from distill.interruption import Interruption, Stopped
from distill.measure import count_macs, count_parameters, measure_cuts, measure_latency, share_nonzero
from distill.model_card import write_model_card
from distill.optimization import build_optimizer, rate_at, set_rate
from distill.pictures import Album
from distill.precision import Trial, Way, recorded, settle, try_student, try_teacher
from distill.pruning.sparsity import small_scales
from distill.report import Report, StepProgress, counted, human_count
from distill.run import Run
from distill.run_folder import OF_TEACHERS, RunFolder
from distill.schema import PENALTY, TEACHER, ArtifactConfig, Config
from distill.summary import banner_rows, best, describe, results_row, summary_table, teacher_title
from distill.surgery import Surgery
from distill.teacher_cache import cost, open_caches, prepare_caches
from distill.tracking import build_accelerator, log_results, start_tracking, stop_tracking
from distill.trouble import in_plain_words, is_of_peer
from students import Detector
from teachers import Teacher, inherit

CHECK_EVERY = 10  # steps between two looks at the losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.epochs=20")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an interrupted run from its last checkpoint, with key=value changed",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and build everything, print the banner, train nothing"
    )
    parser.add_argument("--list", action="store_true", help="list configs, detectors, losses and importances")
    args = parser.parse_intermixed_args()
    try:
        if args.list:
            print_catalog()
            sys.stdout.flush()
        elif args.resume:
            changes = [item for item in (args.config, *args.overrides) if item]
            other = ["--dry-run"] * args.dry_run + [item for item in changes if "=" not in item]
            if other:
                raise UserError(f"--resume goes on with the settings of {args.resume}; leave out {other[0]}")
            run = RunFolder.open(args.resume)
            # the folder may have been moved since it was written
            settings = override(run.config, [*changes, f"output_dir={args.resume}"])
            config = check_config(settings, str(run.config_file))
            if changes:
                run.save_config(config.model_dump(mode="json"))
            train(config, resume=True)
        elif args.config:
            train(load_config(args.config, args.overrides), dry_run=args.dry_run)
        else:
            parser.error("name a config, such as configs/quickstart.yaml, or say --list or --resume RUN")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_of_peer(error):
            raise
        print("error: another process of this run ended before training began, and has said why", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.status
    except BrokenPipeError:  # whoever reads has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; go on from the last checkpoint with train.py --resume and its output_dir", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def train(config: Config, resume: bool = False, dry_run: bool = False, role: str = "student") -> None:
    """One run, from settings to the last table; a teacher that must be trained first is a run of its own."""
    accelerator = build_accelerator(config)
    on_main(accelerator, lambda: factory.draw_data(config.data))
    data = factory.build_data(config.data, config.seed)
    set_seed(config.seed)
    student = factory.build_student(config, data.class_names)
    detectors = factory.build_teachers(config, data.class_names, student)
    unit = factory.build_unit(config, student, detectors)
    pruner = factory.build_pruner(config, unit, accelerator.device)
    blocks = factory.build_block_pruner(config, unit)
    sparsity, masks = factory.build_sparsity(config, unit), factory.build_masks(config, unit)

    folder = RunFolder(config.output_dir)
    untrained = {name: teacher for name, teacher in config.all_teachers.items() if teacher.trained_first}
    if not resume:
        settings = config.model_dump(mode="json")
        kept = OF_TEACHERS if untrained else ()
        if dry_run:
            folder.check_free(config.overwrite, kept)
        else:
            on_main(accelerator, lambda: RunFolder.create(folder.path, settings, overwrite=config.overwrite, keep=kept))
    elif not dry_run:
        on_main(accelerator, folder.take)
    with in_plain_words(config, data.train.loader):
        report = Report(None if dry_run else folder.log_file, enabled=accelerator.is_main_process)
        report.banner(f"distill · {folder.path}", banner_rows(config, data, unit, detectors, pruner, accelerator, role))
        for index in data.indices:
            for note in index.notes.summary():
                report.warn(f"{index.image_root if not index.labelled else config.data.root}, {index.split}: {note}")
        for name, cache in prepare_caches(config, data, unit, detectors, report.warn, untrained).items():
            report.say(f"{config.teacher_key(name)}.cache: {cost(cache)}; {human_bytes(cache.free_bytes)} are free")
        if dry_run:
            teachers = make_teachers(config, detectors, accelerator, None, data, report)
            way = settle_student(config, unit, teachers, accelerator, None, data, report)
            halves = {"no": None if way.precision == "float32" else torch.bfloat16, "fp16": torch.float16}
            half = halves.get(accelerator.mixed_precision, torch.bfloat16)
            step = estimate(config, unit, teachers, accelerator.device, accelerator.num_processes, half)
            report.banner(f"a step of {config.data.batch_size} images", step.rows())
            report.say("dry run: everything was built and fits together; nothing was trained, no run folder written")
            return

        for name in untrained:
            detectors[name] = train_teacher(config, name, folder, report, accelerator)
        keep_published(config, detectors, folder, accelerator)
        teachers = make_teachers(config, detectors, accelerator, folder, data, report)
        caches = prepare_caches(config, data, unit, detectors, report.warn)
        open_caches(config, caches, teachers, accelerator)
        way = settle_student(config, unit, teachers, accelerator, folder, data, report)
        start_tracking(accelerator, config)
        with Interruption(accelerator, config.train.save_minutes) as interruption:
            run = Run(
                config,
                data,
                unit,
                teachers,
                pruner,
                blocks,
                sparsity,
                masks,
                factory.build_guard(config),
                folder,
                report,
                accelerator,
                interruption,
                role,
                way,
            )
            while fit(run):  # the guard took a cut back
                accelerator.free_memory()
                run.unit = factory.build_unit(config, factory.build_student(config, data.class_names), detectors)
        stop_tracking(accelerator, config)


def make_teachers(
    config: Config,
    detectors: dict[str, Detector],
    accelerator: Accelerator,
    folder: RunFolder | None,
    data: factory.Data,
    report: Report,
) -> dict[str, Teacher]:
    """Freezes detectors, each on this process's device."""
    teachers, device = {}, accelerator.device
    for name, detector in detectors.items():
        settings, key = config.all_teachers[name], f"{config.teacher_key(name)}.precision"
        way = recorded(key, settings.precision, None)
        if settings.precision == "auto":

            def attempt(detector: Detector = detector) -> dict[Way, Trial]:
                return try_teacher(detector, device, data.sample(device).images)

            way = settle(key, attempt, folder, accelerator, report)
        teachers[name] = Teacher(detector, device, way.precision, settings.shard, compile_options(), way.channels_last)
    return teachers


def settle_student(
    config: Config,
    unit: Distiller,
    teachers: dict[str, Teacher],
    accelerator: Accelerator,
    folder: RunFolder | None,
    data: factory.Data,
    report: Report,
) -> Way:
    """What the student is trained in, apart from Accelerate's mixed precision."""
    if config.train.precision is None:
        return Way()
    if accelerator.mixed_precision != "no":
        raise UserError(
            f"train.precision: auto chooses by itself, but Accelerate's settings say {accelerator.mixed_precision}; "
            "leave out one of them"
        )

    def attempt() -> dict[Way, Trial]:
        return try_student(unit.to(accelerator.device), teachers, accelerator.device, data.sample(accelerator.device))

    return settle("train.precision", attempt, folder, accelerator, report)


def train_teacher(config: Config, name: str, folder: RunFolder, report: Report, accelerator: Accelerator) -> Detector:
    """A run's own teacher: trained by the same loop, once; a finished one with the same settings is reused."""
    training, key = RunFolder(folder.teacher_run(name)), config.teacher_key(name)
    settings = factory.teacher_run_config(config, config.all_teachers[name], training.path)
    same = training.config_file.is_file() and trains_alike(
        check_config(training.config, str(training.config_file)), settings
    )
    if same and training.is_finished:
        report.say(f"{key}: {training.path} is finished and has the same settings; it is reused")
    else:
        report.say(f"{key}: is trained first, in {training.path}")
        train(settings, resume=same, role="teacher")
        accelerator.wait_for_everyone()  # until the main process has saved it
        report.say(f"{key}: is trained; now the student, in {folder.path}")
    teacher = students.load(training.student)
    if accelerator.is_main_process:
        students.save(teacher, folder.teacher(name), students.read_info(training.student))
    return factory.at_own_size(teacher, config.all_teachers[name], config.data)


def fit(run: Run) -> bool:
    """Trains the unit, from its last checkpoint if there is one, and writes what it was worth.

    Returns:
        True where the guard took a cut back: to go on, a new unit is to be trained from its last checkpoint.
    """
    config, unit, teachers, accelerator, report = run.config, run.unit, run.teachers, run.accelerator, run.report
    settings, epochs, image_size = config.train.optimizer, config.train.epochs, config.data.image_size
    student = unit.to(accelerator.device, memory_format=run.way.memory_format).student
    unit.run_as(run.way.precision, run.way.memory_format)
    resumes = bool(find_checkpoints(run.folder.checkpoints))
    if config.inherit and not resumes:
        taken = inherit(student, next(iter(teachers.values())).detector, config.inherit)
        parts = (f"{human_count(n)} of the {human_count(of)} values of its {part}" for part, (n, of) in taken.items())
        report.say(f"the student inherits {' and '.join(parts)}")
    optimizer = build_optimizer(unit, settings.lr, settings.backbone_lr, settings.weight_decay)
    ema = EMA(student, settings.ema) if settings.ema else None
    kept = ema.module if ema else student  # the weights that are evaluated and saved
    for name in config.teachers_itself("ema"):
        teachers[name].follow(kept)
    unit.bind({name: teacher.detector for name, teacher in teachers.items()})
    progress = Progress(uncut_macs=count_macs(student, image_size), processes=accelerator.num_processes)
    earlier = len(student.plans)
    if resumes:
        progress, refused = load_checkpoint(run.folder.checkpoints, unit, ema, optimizer, accelerator)
        for reason in refused:
            report.warn(f"{reason}; the one before it is taken")
        within = f", {progress.within.step} steps of the next" if progress.within else ""
        report.say(f"resumed: {progress.epoch} of {epochs} epochs are done{within}")
    unit.combiner.left_out = frozenset(progress.left_out)
    originals = config.teachers_itself("original")
    asleep = [] if progress.before or isinstance(config.student, ArtifactConfig) else originals
    unit.silence(asleep)
    if originals and not asleep:
        keep_originals(run, originals, there=resumes)
    if accelerator.is_main_process:
        run.folder.truncate_results(before_epoch=progress.epoch + 1)  # rows whose checkpoint was never written

    surgery = Surgery(run, ema, optimizer, progress)
    compile_parts([student])
    trained, stepper, loader = accelerator.prepare(unit, optimizer, run.data.train.loader)
    evaluate_val = evaluation(run.data.val, accelerator)
    evaluate_test = evaluation(run.data.test, accelerator) if run.data.test is not run.data.val else evaluate_val
    teacher_aps: dict[str, float | None] = {}
    untouched: dict[str, str] = {}
    album = Album(run.folder, run.data, accelerator, report)
    album.begin(kept, resumes)

    def meet_teachers(names: Iterable[str]) -> None:
        for name in names:
            teacher = teachers[name]
            untouched[name] = fingerprint(teacher.detector)
            if name in compared:
                teacher_aps[name] = evaluate_val(teacher.detector).ap
                if not teacher.sharded:  # what needs all processes cannot be asked by the one that draws
                    album.show(teacher_title(name), teacher.detector)

    others = [name for name, teacher in config.all_teachers.items() if teacher.itself != "ema"]
    compared = [name for name in others if teachers[name].detector.detects]
    meet_teachers(name for name in others if name not in asleep)
    seconds: list[float] = []
    reported: set[str] = set()
    for epoch in range(progress.epoch, epochs):
        starts = progress.within is None
        within = progress.within = progress.within or EpochProgress()
        began = time.perf_counter() - within.seconds
        # every epoch draws from a seed of its own, so that a resumed run goes on alike without any saved random state
        set_seed((config.seed * 100_003 + epoch) % 2**31, device_specific=True)

        def enter_step(step: int, epoch: int = epoch) -> None:
            rate = rate_at(
                epoch * len(loader) + step,
                total=epochs * len(loader),
                warmup=round(settings.warmup_epochs * len(loader)),
                final=settings.final,
                cut_step=progress.cut_epoch and progress.cut_epoch * len(loader),
                rewarm=min(config.pruning.warmup_steps, len(loader)) if config.pruning else 0,
            )
            set_rate(optimizer, rate)
            unit.combiner.step = epoch * len(loader) + step
            unit.combiner.epoch = epoch + step / len(loader)

        enter_step(within.step)  # what is measured between two epochs goes by the weights of this one
        woken = False
        if starts:
            plan = surgery.plan()
            if plan:
                if progress.before is None:
                    progress.before = describe(evaluate_test(kept), student, image_size) | {"epoch": epoch}
                    if asleep:  # of all ranks alike, as evaluating has shared the buffers
                        for name in asleep:
                            teachers[name].detector.load_state_dict(kept.state_dict())
                        keep_originals(run, asleep)
                        meet_teachers(asleep)
                        unit.silence(())
                        asleep, woken = [], True
                del trained  # a distributed wrapper would hold on to the old shapes
                trained = surgery.cut(plan, evaluate_val)
            surgery.set_to_zero(was_cut=bool(plan))
        if run.masks:
            run.masks.follow(student, epoch)

        def save(within: EpochProgress = within, began: float = began) -> None:
            within.seconds = time.perf_counter() - began
            save_checkpoint(run.folder.checkpoints, progress, unit, ema, optimizer, accelerator)

        if starts and unit.terms and (epoch % config.guards.every == 0 or woken):
            progress.left_out = look_at_losses(run)
            unit.combiner.left_out = frozenset(progress.left_out)
            check_unchanged(teachers, untouched)

        set_epoch(loader, epoch)
        start_after(run.data.train.loader, within.step * config.data.batch_size * accelerator.num_processes)
        with report.progress(len(loader) - within.step, f"epoch {epoch + 1}/{epochs}") as bar:
            losses = train_epoch(run, trained, loader, stepper, ema, within, enter_step, save, bar)
        if found := sorted(set(within.unreadable) - reported):
            report.warn(f"{counted(len(found), 'image')} could not be read and were skipped: {', '.join(found)}")
            reported.update(found)
        result = evaluate_val(kept)

        if surgery.takes_back(result.ap, losses["task"]):
            return True
        surgery.keep_best(result.ap)
        progress.epoch, progress.within = epoch + 1, None
        seconds.append(time.perf_counter() - began)
        macs, lr = count_macs(student, image_size), optimizer.param_groups[0]["lr"]
        cost = {"macs": macs, "macs_left": macs / progress.uncut_macs, "params": count_parameters(student)}
        if run.sparsity:
            cost["small_scales"] = small_scales(student)
        if run.masks:
            cost["nonzero"] = share_nonzero(student)
        teacher_ap = teacher_aps.get(best(teacher_aps))
        other_aps = {"ap_after_cut": within.ap_after_cut} | ({"teacher_ap": teacher_ap} if compared else {})
        results = results_row(epoch + 1, losses, cost, result, other_aps, lr, seconds[-1])
        if accelerator.is_main_process:
            run.folder.append_result(results)
        # after the row: a run that is killed between the two writes the row again, and never misses one
        save_checkpoint(run.folder.checkpoints, progress, unit, ema, optimizer, accelerator)
        row = {"epoch": f"{epoch + 1}/{epochs}", **losses}
        row |= {"macs_left": cost["macs_left"]} if run.pruner else {}
        row |= {"AP": result.ap, "AP50": result.ap50}
        row |= {"teacher_share": result.ap / teacher_ap if teacher_ap else None} if compared else {}
        time_left = mean(seconds[-3:]) * (epochs - epoch - 1)
        report.epoch_row(row | {"lr": lr, "epoch_time": seconds[-1], "time_left": time_left})
        log_results(accelerator, results)
        album.update(kept)

    kept = surgery.result()
    before = progress.before if len(kept.plans) > earlier else None
    finish(run, kept, evaluate_test, before, earlier, [name for name in compared if name in teacher_aps])
    album.update(kept, last=True)
    return False


def keep_published(config: Config, detectors: dict[str, Detector], folder: RunFolder, accelerator: Accelerator) -> None:
    """Puts teachers that are as their published weights are into the run folder."""
    for name, teacher in config.all_teachers.items():
        if teacher.as_its_weights_are and accelerator.is_main_process:
            detector = detectors[name].detector if teacher.image_size else detectors[name]
            info = {"image_size": list(teacher.image_size or config.data.image_size), "resize": config.data.resize}
            students.save(detector, folder.teacher(name), info)


def keep_originals(run: Run, names: Sequence[str], there: bool = False) -> None:
    """Puts teachers that are the student as it was into the run folder; where they are `there`, takes them from it."""
    info = {"image_size": list(run.config.data.image_size), "resize": run.config.data.resize}
    for name in names:
        folder, detector = run.folder.teacher(name), run.teachers[name].detector
        if there:
            detector.load_state_dict(factory.load_detector(str(folder), run.config.teacher_key(name)).state_dict())
        elif run.accelerator.is_main_process:
            students.save(detector, folder, info)


def look_at_losses(run: Run) -> list[str]:
    """Stops the run where a knowledge loss teaches nothing; where one drowns the task, does what the settings say.

    Returns:
        The names of the losses to leave out until the next look.
    """
    batch = find_objects(run.unit, run.teachers, run.calibration_batches())
    alike = [name for name, teacher in run.config.all_teachers.items() if teacher.itself]
    settings = run.config.guards
    found = check_terms(run.unit, run.teachers, batch, settings.dominates, alike) if batch else {}
    found = gather_object([found])[0]  # of the main process, so that no rounding lets others train on other losses
    if found and settings.dominating_term == "stop":
        raise UserError(f"{next(iter(found.values()))}; guards.dominating_term=warn goes on")
    skips = settings.dominating_term == "skip"
    for line in found.values():
        run.report.warn(f"{line}; until the next look it is left out" if skips else line)
    return list(found) if skips else []


def train_epoch(
    run: Run,
    trained: torch.nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    ema: EMA | None,
    within: EpochProgress,
    enter_step: Callable[[int], None],
    save: Callable[[], None],
    bar: StepProgress,
) -> dict[str, float]:
    """What is left of one pass over the training data; the mean of each weighted loss over the pass and all processes.

    Raises:
        Stopped: the run was asked to stop; everything up to here is saved.
        UserError: a loss is no longer a number.
    """
    unit, accelerator, settings, folder = run.unit, run.accelerator, run.config.train.optimizer, run.folder
    rank = accelerator.process_index
    trained.train()
    sums = {name: torch.tensor(value, device=accelerator.device) for name, value in within.sums.items()}
    seen: deque[tuple[int, list[str]]] = deque(maxlen=CHECK_EVERY)
    left_out: list[tuple[int, str, list[str]]] = []

    def bring_forward(steps: int) -> None:
        reduced = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
        within.step, within.sums = steps, dict(zip(sums, reduced))

    for step, batch in enumerate(loader, within.step):
        within.unreadable += batch.unreadable
        if not len(batch.images):  # none could be read; the step must be made all the same, or other ranks would wait
            batch = next(run.calibration_batches(1), None)
            if batch is None:
                raise UserError(f"{run.config.data.root}: not one training image could be read; mend the files")
        enter_step(step)
        seen.append((unit.combiner.step, [meta.file for meta in batch.metas]))
        # likewise a seed of its own, so that an epoch can be gone on with in its middle
        torch.manual_seed(hash((run.config.seed, unit.combiner.step, rank)) % 2**63)
        with accelerator.accumulate(trained):
            lessons = unit.ask(run.teachers, batch.images, batch.targets, batch.metas)
            before = unit.skipped.copy()
            loss, parts = trained(batch.images, batch.targets, lessons)
            left_out += [(unit.combiner.step, name, seen[-1][1]) for name in unit.skipped - before]
            if run.sparsity:
                penalty = run.sparsity(unit.combiner.epoch)
                loss, parts = loss + penalty, parts | {PENALTY: penalty.detach()}
            accelerator.backward(loss)
            if accelerator.sync_gradients and settings.clip_norm:
                accelerator.clip_grad_norm_(unit.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        if run.masks:
            run.masks.hold()
        if ema and accelerator.sync_gradients:
            ema.update(unit.student)
        sums = {name: value + sums.get(name, 0) for name, value in parts.items()}
        # reading a loss makes a GPU wait, so that is done only now and then
        looks = step % CHECK_EVERY == 0
        bar.advance({name: float(value) for name, value in parts.items()} if looks else None)
        due = run.interruption.due() if accelerator.sync_gradients else None
        if looks or due:
            check_losses(unit, accelerator, seen, folder.failure_file)
        if due:
            bring_forward(step + 1)
            save()
        if due == "stop":
            run.interruption.stop(f"all {step + 1} steps of the epoch are kept; train.py --resume {folder.outermost}")
    check_losses(unit, accelerator, seen, folder.failure_file)
    for line in tell_left_out(unit, accelerator, left_out, folder.failure_file):
        run.report.warn(line)
    bring_forward(len(loader))
    return {name: value / within.step for name, value in within.sums.items()}


def evaluation(split: factory.Split, accelerator: Accelerator) -> Callable[[Detector], EvaluationResult]:
    """A function that says what a detector is worth on a split."""
    evaluator = DetectionEvaluator(split.index.to_coco(), split.index.class_names)
    loader = accelerator.prepare(split.loader)

    def evaluate(detector: Detector) -> EvaluationResult:
        share_buffers(accelerator, detector)
        return run_evaluation(detector, loader, evaluator, accelerator)

    return evaluate


def finish(
    run: Run,
    kept: Detector,
    evaluate: Callable[[Detector], EvaluationResult],
    before: dict[str, Any] | None,
    earlier: int,
    compared: Sequence[str],
) -> None:
    """Saves the student, writes the summary and prints the table that compares it with its teachers.

    Args:
        run: that is finished.
        kept: the student to save.
        evaluate: says what a detector is worth.
        before: what the student was worth and cost before its first cut in this run.
        earlier: cuts that it had when the run began.
        compared: names of the teachers to compare it with.
    """
    config, image_size = run.config, run.config.data.image_size
    split, device = config.data.test or config.data.val, run.accelerator.device
    after = describe(evaluate(kept), kept, image_size)
    teachers = {
        name: describe(evaluate(run.teachers[name].detector), run.teachers[name].shape, image_size) for name in compared
    }
    if not run.accelerator.is_main_process:
        return
    for name, entry in teachers.items():
        teacher = run.teachers[name]
        entry["latency_ms"] = None if teacher.sharded else measure_latency(teacher.detector, image_size)
    of_student, cuts = after | {"latency_ms": measure_latency(kept, image_size)}, []
    if before:
        uncut, *cuts = measure_cuts(kept, image_size, earlier)
        before, of_student = (
            before | {"latency_ms": uncut["latency_ms"]},
            after | {"latency_ms": cuts[-1]["latency_ms"]},
        )
        times = ", ".join(f"{stage['latency_ms']:.1f}" for stage in (uncut, *cuts))
        run.report.say(f"latency uncut and after each cut: {times} ms")
    info = {"image_size": list(image_size), "resize": config.data.resize, "epochs": config.train.epochs}
    facts = {key: value for key, value in after.items() if key != "precision"}
    students.save(kept, run.folder.student, info | {"split": split, **facts})
    summary = {
        **({"teachers": teachers} if config.teachers else {"teacher": teachers.get(TEACHER)}),
        "student_before": before,
        "student": of_student,
        "cuts": cuts,
        "split": split,
        "epochs": config.train.epochs,
    }
    run.folder.write_summary(summary)
    write_model_card(run.folder)
    run.report.table(
        f"{run.folder.path} on {split}, {image_size[1]}x{image_size[0]} px, latency of one image on {device.type}",
        *summary_table(summary, run.role),
    )


if __name__ == "__main__":
    sys.exit(main())
