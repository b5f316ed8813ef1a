"""Trains a student, with or without a teacher, cutting it between epochs on the way. The whole loop is in this file.

python train.py configs/quickstart.yaml
accelerate launch train.py configs/bccd.yaml data.root=PATH train.epochs=30
python train.py --resume runs/bccd
"""

import argparse
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from statistics import mean

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
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
from distill.distributed import compile_parts, on_main
from distill.ema import EMA
from distill.errors import UserError
from distill.evaluation import evaluation
from distill.faculty import Faculty, freeze, keep_published
from distill.footprint import estimate, human_bytes
from distill.guards import check_losses, look_at_losses, tell_left_out
from distill.interruption import Interruption, Stopped
from distill.measure import count_macs
from distill.optimization import build_optimizer, rate_at, set_rate
from distill.outcome import finish
from distill.pictures import Album
from distill.precision import settle_student
from distill.report import Report, StepProgress, counted, human_count
from distill.run import Run
from distill.run_folder import OF_TEACHERS, RunFolder
from distill.schema import PENALTY, Config
from distill.summary import banner_rows, cost_columns, describe, results_row, told_row
from distill.surgery import Surgery
from distill.teacher_cache import cost, open_caches, prepare_caches
from distill.tracking import build_accelerator, log_results, start_tracking, stop_tracking
from distill.trouble import in_plain_words, is_of_peer
from students import Detector
from teachers import inherit

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
            train(check_config(settings, str(run.config_file)), resume=True)
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
            teachers = freeze(config, detectors, accelerator, None, data, report)
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
        teachers = freeze(config, detectors, accelerator, folder, data, report)
        caches = prepare_caches(config, data, unit, detectors, report.warn)
        open_caches(config, caches, teachers, accelerator)
        way = settle_student(config, unit, teachers, accelerator, folder, data, report)
        start_tracking(accelerator, config)
        with Interruption(accelerator, config.train.save_minutes) as interruption:
            run = Run(
                config=config,
                data=data,
                unit=unit,
                teachers=teachers,
                pruner=pruner,
                blocks=blocks,
                sparsity=sparsity,
                masks=masks,
                guard=factory.build_guard(config),
                folder=folder,
                report=report,
                accelerator=accelerator,
                interruption=interruption,
                role=role,
                way=way,
            )
            while fit(run):  # the guard took a cut back
                accelerator.free_memory()
                run.unit = factory.build_unit(config, factory.build_student(config, data.class_names), detectors)
        stop_tracking(accelerator, config)


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
    if accelerator.is_main_process:
        run.folder.save_config(config.model_dump(mode="json"))  # a change that the checkpoint fits, no other
        run.folder.truncate_results(before_epoch=progress.epoch + 1)  # rows whose checkpoint was never written

    surgery = Surgery(run, ema, optimizer, progress)
    compile_parts([student])
    # of 1x1 convolutions in channels_last, whose weights and gradients lie alike in memory under unlike strides
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    trained, stepper, loader = accelerator.prepare(unit, optimizer, run.data.train.loader)
    evaluate_val = evaluation(run.data.val, accelerator)
    evaluate_test = evaluation(run.data.test, accelerator) if run.data.test is not run.data.val else evaluate_val
    album = Album(run.folder, run.data, accelerator, report)
    album.begin(kept, resumes)
    faculty = Faculty(run, progress, resumes, evaluate_val, album)
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
                    woken = faculty.wake(kept)
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
            faculty.check()

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
        cost = cost_columns(run, student, progress.uncut_macs)
        other_aps = {"ap_after_cut": within.ap_after_cut} | ({"teacher_ap": faculty.ap} if faculty.compares else {})
        lr = optimizer.param_groups[0]["lr"]
        row = results_row(epoch + 1, losses, cost, result, other_aps, lr, seconds[-1])
        if accelerator.is_main_process:
            run.folder.append_result(row)
        # after the row: a run that is killed between the two writes the row again, and never misses one
        save_checkpoint(run.folder.checkpoints, progress, unit, ema, optimizer, accelerator)
        time_left = mean(seconds[-3:]) * (epochs - epoch - 1)
        report.epoch_row(told_row(row, epochs, losses, bool(run.pruner), time_left))
        log_results(accelerator, row)
        album.update(kept)

    faculty.check()
    kept = surgery.result()
    before = progress.before if len(kept.plans) > earlier else None
    finish(run, kept, evaluate_test, before, earlier, faculty.compared)
    album.update(kept, last=True)
    return False


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
                norm = accelerator.clip_grad_norm_(unit.parameters(), settings.clip_norm)
                if accelerator.scaler is None:  # which itself passes over a step that overflows
                    unit.combiner.see_gradient(norm)
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
            run.interruption.stop(
                f"the epoch goes on after {counted(step + 1, 'step')}: train.py --resume {folder.outermost}"
            )
    check_losses(unit, accelerator, seen, folder.failure_file)
    for line in tell_left_out(unit, accelerator, left_out, folder.failure_file):
        run.report.warn(line)
    bring_forward(len(loader))
    return {name: value / within.step for name, value in within.sums.items()}


if __name__ == "__main__":
    sys.exit(main())
