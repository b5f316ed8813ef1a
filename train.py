"""Trains a student, with or without a teacher, cutting it between epochs on the way. The whole loop is in this file.

python train.py configs/quickstart.yaml
accelerate launch train.py configs/bccd.yaml data.root=PATH train.epochs=30
python train.py --resume runs/bccd
"""

import argparse
import copy
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import students
from distill import build
from distill.catalog import print_catalog
from distill.checkpoint import EpochProgress, Progress, find_checkpoints, load_checkpoint, save_checkpoint
from distill.config import check_config, load_config, override
from distill.data import Batch, set_epoch, start_after
from distill.distiller import Distiller
from distill.distributed import compile_parts, on_main, release, share_buffers
from distill.ema import EMA
from distill.errors import UserError
from distill.evaluation import DetectionEvaluator, EvaluationResult, run_evaluation
from distill.footprint import estimate
from distill.guards import (
    check_alike,
    check_losses,
    check_terms,
    check_unchanged,
    find_objects,
    fingerprint,
    tell_left_out,
)
from distill.interruption import Interruption, Stopped
from distill.measure import count_macs, count_nonzero, count_parameters, measure_cuts, measure_latency
from distill.model_card import write_model_card
from distill.optimization import build_optimizer, rate_at, set_rate
from distill.pictures import Album
from distill.pruning.blocks import BlockPruner
from distill.pruning.cost import BUDGETS
from distill.pruning.masks import Masks, agree_on, set_to_zero
from distill.pruning.pruner import Pruner, agree, cut_everywhere
from distill.pruning.recalibrate import calibration_batches, recalibrate_batch_norms
from distill.pruning.soft import silence_channels
from distill.pruning.sparsity import SparsityPenalty, small_scales
from distill.report import Report, StepProgress, counted, human_count
from distill.run_folder import OF_TEACHERS, RunFolder
from distill.schema import PENALTY, TEACHER, Config
from distill.summary import banner_rows, best, describe, results_row, size, summary_table, teacher_title
from distill.tracking import build_accelerator, log_results, start_tracking, stop_tracking
from distill.trouble import in_plain_words, is_of_peer
from students import Detector, Plan
from students.plan import apply_plan
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
    except KeyboardInterrupt:
        print("interrupted; go on from the last checkpoint with train.py --resume and its output_dir", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


@dataclass
class Run:
    """What a run is made of."""

    config: Config
    data: build.Data
    unit: Distiller  # the student with its knowledge terms
    teachers: dict[str, Teacher]  # by name; none in plain training
    pruner: Pruner | None
    blocks: BlockPruner | None
    sparsity: SparsityPenalty | None
    masks: Masks | None
    folder: RunFolder
    report: Report
    accelerator: Accelerator
    interruption: Interruption
    role: str  # of the detector that is trained: student or teacher

    def calibration_batches(self, number: int = 8) -> Iterator[Batch]:
        """Training images, the same ones on every call and rank."""
        dataset, size = self.data.train.loader.dataset, self.config.data.batch_size
        return calibration_batches(dataset, size, self.accelerator.device, number)


def train(config: Config, resume: bool = False, dry_run: bool = False, role: str = "student") -> None:
    """One run, from settings to the last table; a teacher that must be trained first is a run of its own."""
    accelerator = build_accelerator(config)
    on_main(accelerator, lambda: build.draw_data(config.data))
    data = build.build_data(config.data, config.seed)
    set_seed(config.seed)
    detectors = build.build_teachers(config, data.class_names)
    unit = build.build_unit(config, data.class_names, detectors)
    pruner = build.build_pruner(config, unit, accelerator.device)
    blocks = build.build_block_pruner(config, unit)
    sparsity, masks = build.build_sparsity(config, unit), build.build_masks(config, unit)

    folder = RunFolder(config.output_dir)
    untrained = {name: teacher for name, teacher in config.all_teachers.items() if teacher.path is None}
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
        if dry_run:
            half = {"no": None, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.bfloat16)
            teachers = make_teachers(config, detectors, accelerator)
            step = estimate(config, unit, teachers, accelerator.device, accelerator.num_processes, half)
            report.banner(f"a step of {config.data.batch_size} images", step.rows())
            report.say("dry run: everything was built and fits together; nothing was trained, no run folder written")
            return

        for name in untrained:
            detectors[name] = train_teacher(config, name, folder, report, accelerator)
        teachers = make_teachers(config, detectors, accelerator)
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
                folder,
                report,
                accelerator,
                interruption,
                role,
            )
            fit(run)
        stop_tracking(accelerator, config)


def make_teachers(config: Config, detectors: dict[str, Detector], accelerator: Accelerator) -> dict[str, Teacher]:
    """Freezes detectors, each on this process's device."""
    settings = config.all_teachers
    return {
        name: Teacher(detector, accelerator.device, settings[name].precision, settings[name].shard)
        for name, detector in detectors.items()
    }


def train_teacher(config: Config, name: str, folder: RunFolder, report: Report, accelerator: Accelerator) -> Detector:
    """A run's own teacher: trained by the same loop, once; a finished one with the same settings is reused."""
    training, key = RunFolder(folder.teacher_run(name)), config.teacher_key(name)
    settings = build.teacher_run_config(config, config.all_teachers[name], training.path)
    same = training.config_file.is_file() and build.trains_alike(
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
    return build.at_own_size(teacher, config.all_teachers[name], config.data)


def fit(run: Run) -> None:
    """Trains the unit, from its last checkpoint if there is one, and writes what it was worth."""
    config, unit, teachers, accelerator, report = run.config, run.unit, run.teachers, run.accelerator, run.report
    settings, epochs, image_size = config.train.optimizer, config.train.epochs, config.data.image_size
    student = unit.to(accelerator.device, memory_format=torch.channels_last).student
    unit.bind({name: teacher.detector for name, teacher in teachers.items()})
    resumes = bool(find_checkpoints(run.folder.checkpoints))
    if config.inherit and not resumes:
        taken = inherit(student, next(iter(teachers.values())).detector, config.inherit)
        parts = (f"{human_count(n)} of the {human_count(of)} values of its {part}" for part, (n, of) in taken.items())
        report.say(f"the student inherits {' and '.join(parts)}")
    optimizer = build_optimizer(unit, settings.lr, settings.backbone_lr, settings.weight_decay)
    ema = EMA(student, settings.ema) if settings.ema else None
    kept = ema.module if ema else student  # the weights that are evaluated and saved
    progress = Progress(uncut_macs=count_macs(student, image_size), processes=accelerator.num_processes)
    if resumes:
        progress, refused = load_checkpoint(run.folder.checkpoints, unit, ema, optimizer, accelerator)
        for reason in refused:
            report.warn(f"{reason}; the one before it is taken")
        within = f", {progress.within.step} steps of the next" if progress.within else ""
        report.say(f"resumed: {progress.epoch} of {epochs} epochs are done{within}")
    if accelerator.is_main_process:
        run.folder.truncate_results(before_epoch=progress.epoch + 1)  # rows whose checkpoint was never written

    compile_parts([student, *(teacher.detector for teacher in teachers.values() if not teacher.sharded)])
    trained, stepper, loader = accelerator.prepare(unit, optimizer, run.data.train.loader)
    evaluate_val = evaluation(run.data.val, accelerator)
    evaluate_test = evaluation(run.data.test, accelerator) if run.data.test is not run.data.val else evaluate_val
    teacher_aps = {name: evaluate_val(teacher.detector).ap for name, teacher in teachers.items()}
    teacher_ap = teacher_aps.get(best(teacher_aps))
    untouched = {name: fingerprint(teacher.detector) for name, teacher in teachers.items()}
    # what needs all processes cannot be asked by the one that draws
    shown = {teacher_title(name): teacher.detector for name, teacher in teachers.items() if not teacher.sharded}
    album = Album(run.folder, run.data, shown, accelerator, report)
    seconds: list[float] = []
    reported: set[str] = set()
    first = progress.epoch
    for epoch in range(first, epochs):
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
        plan = plan_cut(run, epoch) if starts else None
        if plan:  # it is empty where the last cut already took this one's share
            if progress.before is None:
                progress.before = describe(evaluate_test(kept), student, image_size) | {"epoch": epoch}
            uncut = size(student, image_size)
            del trained  # a distributed wrapper would hold on to the old shapes
            release(accelerator, unit)
            cut_everywhere(plan, unit, ema, optimizer)
            check_alike(accelerator, unit, ema)
            for detector in dict.fromkeys((student, kept)):
                recalibrate_batch_norms(detector, (batch.images for batch in run.calibration_batches()))
            compile_parts([student])
            trained = accelerator.prepare_model(unit)
            progress.record_cut(plan)
            within.ap_after_cut = evaluate_val(kept).ap if config.pruning.evaluate else None
            at_once = f"; AP {within.ap_after_cut:.3f} right after" if within.ap_after_cut is not None else ""
            what = f"; without {', '.join(name for name, _ in student.plans[-1].blocks)}" if plan.blocks else ""
            if run.pruner:
                what += f"; {run.pruner.left(unit):.1%} of the {BUDGETS[run.pruner.budget]} left"
                what += f", {run.pruner.due(epoch):.1%} were due" if epoch in run.pruner.epochs else ""
            report.say(f"cut before epoch {epoch + 1}: {uncut} -> {size(student, image_size)}{what}{at_once}")
        if starts and run.pruner and epoch in run.pruner.soft_epochs:
            silence_channels(plan_channels(run, unit, epoch), unit)
            share = f"{1 - run.pruner.due(epoch):.1%} of the {BUDGETS[run.pruner.budget]}"
            report.say(f"before epoch {epoch + 1} channels are set to 0, {share}; they may come back")
        if run.sparsity and (plan or epoch == first):
            run.sparsity.follow(unit, image_size)
        if run.masks:
            if starts and (epoch in run.masks.epochs or (plan and epoch > run.masks.epochs[0])):
                choose_masks(run, epoch, kept)
            run.masks.follow(student, epoch)

        def save(within: EpochProgress = within, began: float = began) -> None:
            within.seconds = time.perf_counter() - began
            save_checkpoint(run.folder.checkpoints, progress, unit, ema, optimizer, accelerator)

        if starts and unit.terms and epoch % config.guards.every == 0:
            look_at_losses(run)
            check_unchanged(teachers, untouched)

        set_epoch(loader, epoch)
        start_after(run.data.train.loader, within.step * config.data.batch_size * accelerator.num_processes)
        with report.progress(len(loader) - within.step, f"epoch {epoch + 1}/{epochs}") as bar:
            losses = train_epoch(run, trained, loader, stepper, ema, within, enter_step, save, bar)
        if found := sorted(set(within.unreadable) - reported):
            report.warn(f"{counted(len(found), 'image')} could not be read and were skipped: {', '.join(found)}")
            reported.update(found)
        result = evaluate_val(kept)

        progress.epoch, progress.within = epoch + 1, None
        seconds.append(time.perf_counter() - began)
        macs, lr = count_macs(student, image_size), optimizer.param_groups[0]["lr"]
        cost = {"macs": macs, "macs_left": macs / progress.uncut_macs, "params": count_parameters(student)}
        if run.sparsity:
            cost["small_scales"] = small_scales(student)
        if run.masks:
            cost["nonzero"] = nonzero(student)
        others = {"ap_after_cut": within.ap_after_cut} | ({"teacher_ap": teacher_ap} if teachers else {})
        results = results_row(epoch + 1, losses, cost, result, others, lr, seconds[-1])
        if accelerator.is_main_process:
            run.folder.append_result(results)
        # after the row: a run that is killed between the two writes the row again, and never misses one
        save_checkpoint(run.folder.checkpoints, progress, unit, ema, optimizer, accelerator)
        row = {"epoch": f"{epoch + 1}/{epochs}", **losses}
        row |= {"macs_left": cost["macs_left"]} if run.pruner else {}
        row |= {"AP": result.ap, "AP50": result.ap50}
        row |= {"teacher_share": result.ap / teacher_ap if teacher_ap else None} if teachers else {}
        time_left = mean(seconds[-3:]) * (epochs - epoch - 1)
        report.epoch_row(row | {"lr": lr, "epoch_time": seconds[-1], "time_left": time_left})
        log_results(accelerator, results)
        album.update(kept)

    finish(run, kept, evaluate_test, progress.before)
    album.update(kept, last=True)


def plan_cut(run: Run, epoch: int) -> Plan:
    """The cut that is due before an epoch, the same on every rank: blocks, and channels of what they leave."""
    unit, blocks, channels = run.unit, Plan(()), Plan(())
    if run.blocks and epoch in run.blocks.epochs:
        with torch.compiler.set_stance("force_eager"):  # compiled parts would not leave out what is tried without
            plan = run.blocks.plan(unit, epoch, run.teachers, run.calibration_batches())
        blocks = agree(run.accelerator, plan)
    if run.pruner and epoch in run.pruner.epochs and epoch not in run.pruner.soft_epochs:
        if blocks:
            unit = copy.deepcopy(unit)
            apply_plan([(unit, blocks)])
        channels = plan_channels(run, unit, epoch)
    return Plan(channels.cuts, channels.numbers, blocks.blocks)


def plan_channels(run: Run, unit: Distiller, epoch: int) -> Plan:
    """The channels of a unit that are due before an epoch, the same on every rank."""
    with torch.compiler.set_stance("force_eager"):  # compiled parts would not call what measures within them
        evidence = run.pruner.measure(unit, run.teachers, run.calibration_batches(16))
    is_main = run.accelerator.is_main_process
    return agree(run.accelerator, run.pruner.plan(unit, epoch, evidence) if is_main else None)


def choose_masks(run: Run, epoch: int, kept: Detector) -> None:
    """Sets to 0 what is to be held from now on, alike on every rank, in the student and its averaged copy."""
    masks = run.masks.choose(run.unit, epoch, run.teachers, run.calibration_batches(16))
    set_to_zero(agree_on(run.accelerator, masks), dict.fromkeys((run.unit.student, kept)))
    run.report.say(f"masks before epoch {epoch + 1}: {nonzero(run.unit.student):.1%} of the parameters are not 0")


def nonzero(detector: Detector) -> float:
    """Share of its parameters that are not 0."""
    return count_nonzero(detector) / count_parameters(detector)


def look_at_losses(run: Run) -> None:
    """Warns, or stops the run, where a knowledge loss teaches nothing or drowns the task."""
    batch = find_objects(run.unit, run.teachers, run.calibration_batches())
    for line in check_terms(run.unit, run.teachers, batch, run.config.guards.dominates) if batch else ():
        if run.config.guards.dominating_term == "stop":
            raise UserError(line)
        run.report.warn(line)


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
            lessons = unit.ask(run.teachers, batch.images, batch.targets)
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


def evaluation(split: build.Split, accelerator: Accelerator) -> Callable[[Detector], EvaluationResult]:
    """A function that says what a detector is worth on a split."""
    evaluator = DetectionEvaluator(split.index.to_coco(), split.index.class_names)
    loader = accelerator.prepare(split.loader)

    def evaluate(detector: Detector) -> EvaluationResult:
        share_buffers(accelerator, detector)
        return run_evaluation(detector, loader, evaluator, accelerator)

    return evaluate


def finish(
    run: Run, kept: Detector, evaluate: Callable[[Detector], EvaluationResult], before: dict[str, Any] | None
) -> None:
    """Saves the student, writes the summary and prints the table that compares it with its teachers."""
    config, image_size = run.config, run.config.data.image_size
    split, device = config.data.test or config.data.val, run.accelerator.device
    after = describe(evaluate(kept), kept, image_size)
    teachers = {
        name: describe(evaluate(teacher.detector), teacher.shape, image_size) for name, teacher in run.teachers.items()
    }
    if not run.accelerator.is_main_process:
        return
    for name, entry in teachers.items():
        teacher = run.teachers[name]
        entry["latency_ms"] = None if teacher.sharded else measure_latency(teacher.detector, image_size)
    of_student, cuts = after | {"latency_ms": measure_latency(kept, image_size)}, []
    if before:
        uncut, *cuts = measure_cuts(kept, image_size)
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
