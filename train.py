"""Trains a student, with or without a teacher, cutting it between epochs on the way. The whole loop is in this file.

python train.py configs/quickstart.yaml
accelerate launch train.py configs/bccd.yaml data.root=PATH train.epochs=30
python train.py --resume runs/bccd
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import students
from distill import build
from distill.catalog import print_catalog
from distill.checkpoint import Progress, load_checkpoint, save_checkpoint
from distill.config import check_config, load_config, override
from distill.data import set_epoch
from distill.distiller import Distiller
from distill.distributed import on_main, release, share_buffers
from distill.ema import EMA
from distill.errors import UserError
from distill.evaluation import DetectionEvaluator, EvaluationResult, run_evaluation
from distill.guards import check_losses, check_terms, check_unchanged, fingerprint
from distill.measure import count_macs, count_parameters, measure_latency
from distill.model_card import write_model_card
from distill.optimization import build_optimizer, rate_at, set_rate
from distill.pictures import Album
from distill.pruning.pruner import Pruner, agree, cut_everywhere
from distill.pruning.recalibrate import calibration_batches, recalibrate_batch_norms
from distill.pruning.saliency import measure_saliency
from distill.report import Report, StepProgress, human_count
from distill.run_folder import RunFolder
from distill.schema import Config
from distill.summary import banner_rows, comparison, describe, size
from distill.tracking import build_accelerator, log_results, start_tracking, stop_tracking
from students import Detector
from teachers import Teacher, inherit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.epochs=20")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an interrupted run from its last whole epoch, with key=value changed",
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
    except KeyboardInterrupt:
        print(
            "interrupted; its whole epochs are kept: go on with train.py --resume and its output_dir", file=sys.stderr
        )
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def train(config: Config, resume: bool = False, dry_run: bool = False, role: str = "student") -> None:
    """One run, from settings to the last table; a teacher that must be trained first is a run of its own."""
    accelerator = build_accelerator(config)
    on_main(accelerator, lambda: build.draw_data(config.data))
    data = build.build_data(config.data, config.seed)
    set_seed(config.seed)
    teacher = build.build_teacher(config, data.class_names)
    unit = build.build_unit(config, data.class_names, teacher)
    pruner = build.build_pruner(config, unit)

    run = RunFolder(config.output_dir)
    if not resume:
        settings = config.model_dump(mode="json")
        trains_teacher = config.teacher is not None and config.teacher.path is None
        kept = [run.teacher.name, run.teacher_run.name] if trains_teacher else []
        if dry_run:
            run.check_free(config.overwrite, kept)
        else:
            on_main(accelerator, lambda: RunFolder.create(run.path, settings, overwrite=config.overwrite, keep=kept))
    report = Report(None if dry_run else run.log_file, enabled=accelerator.is_main_process)
    report.banner(f"distill · {run.path}", banner_rows(config, data, unit, teacher, pruner, accelerator, role))
    for split in {id(s): s for s in (data.train, data.val, data.test)}.values():
        for note in split.index.notes.summary():
            report.warn(f"{config.data.root}, {split.index.split}: {note}")
    if dry_run:
        report.say("dry run: everything was built and fits together; nothing was trained, no run folder written")
        return

    if config.teacher is not None and config.teacher.path is None:
        teacher = train_teacher(config, run, report, accelerator)
    start_tracking(accelerator, config)
    fit(config, data, unit, pruner, teacher, run, report, accelerator, role)
    stop_tracking(accelerator, config)


def train_teacher(config: Config, run: RunFolder, report: Report, accelerator: Accelerator) -> Detector:
    """The run's own teacher: trained by the same loop, once; a finished one with the same settings is reused."""
    training = RunFolder(run.teacher_run)
    settings = build.teacher_run_config(config, training.path)
    same = training.config_file.is_file() and build.trains_alike(
        check_config(training.config, str(training.config_file)), settings
    )
    if same and training.is_finished:
        report.say(f"teacher: {training.path} is finished and has the same settings; it is reused")
    else:
        report.say(f"teacher: is trained first, in {training.path}")
        train(settings, resume=same, role="teacher")
        accelerator.wait_for_everyone()  # until the main process has saved it
        report.say(f"teacher: is trained; now the student, in {run.path}")
    teacher = students.load(training.student)
    if accelerator.is_main_process:
        students.save(teacher, run.teacher, students.read_info(training.student))
    return teacher


def fit(
    config: Config,
    data: build.Data,
    unit: Distiller,
    pruner: Pruner | None,
    teacher_detector: Detector | None,
    run: RunFolder,
    report: Report,
    accelerator: Accelerator,
    role: str,
) -> None:
    """Trains the unit, from its last checkpoint if there is one, and writes what it was worth."""
    settings, image_size = config.train.optimizer, config.data.image_size
    student = unit.to(accelerator.device, memory_format=torch.channels_last).student
    teacher = Teacher(teacher_detector, accelerator.device, config.teacher.precision) if teacher_detector else None
    if teacher:
        unit.bind(teacher.detector)
    resumes = any(run.checkpoints.glob("epoch_*.pt"))
    if config.inherit and not resumes:
        taken = inherit(student, teacher.detector, config.inherit)
        parts = (f"{human_count(n)} of the {human_count(of)} values of its {part}" for part, (n, of) in taken.items())
        report.say(f"the student inherits {' and '.join(parts)}")
    optimizer = build_optimizer(unit, settings.lr, settings.backbone_lr, settings.weight_decay)
    ema = EMA(student, settings.ema) if settings.ema else None
    kept = ema.module if ema else student  # the weights that are evaluated and saved
    progress = Progress(uncut_macs=count_macs(student, image_size))
    if resumes:
        progress = load_checkpoint(run.checkpoints, unit, ema, optimizer, accelerator)
        report.say(f"resumed: {progress.epoch} of {config.train.epochs} epochs are done")
    if accelerator.is_main_process:
        run.truncate_results(before_epoch=progress.epoch + 1)  # rows whose checkpoint was never written

    trained, stepper, loader = accelerator.prepare(unit, optimizer, data.train.loader)
    evaluate_val = evaluation(data.val, accelerator)
    evaluate_test = evaluation(data.test, accelerator) if data.test is not data.val else evaluate_val
    teacher_ap = evaluate_val(teacher.detector).ap if teacher else None
    untouched = fingerprint(teacher.detector) if teacher else ""
    album = Album(run, data, {"teacher": teacher.detector} if teacher else {}, accelerator, report)
    seconds: list[float] = []
    unreadable: set[str] = set()
    reported: set[str] = set()
    for epoch in range(progress.epoch, config.train.epochs):
        began = time.perf_counter()
        # every epoch draws from a seed of its own, so that a resumed run goes on alike without any saved random state
        set_seed((config.seed * 100_003 + epoch) % 2**31, device_specific=True)

        plan, ap_after_cut = None, None
        if pruner and epoch in pruner.epochs:
            batches = calibration_batches(data.train.loader.dataset, config.data.batch_size, accelerator.device, 16)
            saliency = measure_saliency(unit, teacher, batches) if pruner.needs_saliency else None
            plan = agree(accelerator, pruner.plan(unit, epoch, saliency) if accelerator.is_main_process else None)
        if plan:  # it is empty where the last cut already took this one's share
            if progress.before is None:
                progress.before = describe(evaluate_test(kept), student, image_size) | {"epoch": epoch}
            uncut = size(student, image_size)
            del trained  # a distributed wrapper would hold on to the old shapes
            release(accelerator, unit)
            cut_everywhere(plan, unit, ema, optimizer)
            for detector in dict.fromkeys((student, kept)):
                batches = calibration_batches(data.train.loader.dataset, config.data.batch_size, accelerator.device)
                recalibrate_batch_norms(detector, (batch.images for batch in batches))
            trained = accelerator.prepare_model(unit)
            progress.record_cut(plan, step=epoch * len(loader))
            ap_after_cut = evaluate_val(kept).ap if config.pruning.evaluate else None
            at_once = f"; AP {ap_after_cut:.3f} right after" if ap_after_cut is not None else ""
            report.say(f"cut before epoch {epoch + 1}: {uncut} -> {size(student, image_size)}{at_once}")

        def enter_step(step: int, epoch: int = epoch) -> None:
            rate = rate_at(
                epoch * len(loader) + step,
                total=config.train.epochs * len(loader),
                warmup=round(settings.warmup_epochs * len(loader)),
                final=settings.final,
                cut_step=progress.cut_step,
                rewarm=min(config.pruning.warmup_steps, len(loader)) if config.pruning else 0,
            )
            set_rate(optimizer, rate)
            unit.combiner.step = epoch * len(loader) + step
            unit.combiner.epoch = epoch + step / len(loader)

        if unit.terms and epoch % config.guards.every == 0:
            enter_step(0)
            batches = calibration_batches(data.train.loader.dataset, config.data.batch_size, accelerator.device)
            # some losses are silent, and rightly so, where there is no object
            batch = next((b for b in batches if any(len(target["labels"]) for target in b.targets)), None)
            for line in check_terms(unit, teacher, batch, config.guards.dominates) if batch else ():
                if config.guards.dominating_term == "stop":
                    raise UserError(line)
                report.warn(line)
            check_unchanged(teacher, untouched)

        set_epoch(loader, epoch)
        with report.progress(len(loader), f"epoch {epoch + 1}/{config.train.epochs}") as bar:
            losses = train_epoch(
                trained, unit, teacher, loader, stepper, ema, enter_step, bar, unreadable, accelerator, config
            )
        if unit.skipped:
            times = ", ".join(f"{name} {count} times" for name, count in unit.skipped.items())
            report.warn(f"losses that were no numbers and were left out so far: {times}")
        if unreadable - reported:
            report.warn(f"{len(unreadable)} images could not be read and were skipped: {', '.join(sorted(unreadable))}")
            reported |= unreadable
        result = evaluate_val(kept)

        progress.epoch = epoch + 1
        seconds.append(time.perf_counter() - began)
        macs, lr = count_macs(student, image_size), optimizer.param_groups[0]["lr"]
        scores = {"ap": result.ap, "ap50": result.ap50, "ap75": result.ap75, "ap_after_cut": ap_after_cut}
        scores |= {"teacher_ap": teacher_ap} if teacher else {}
        cost = {"macs": macs, "macs_left": macs / progress.uncut_macs, "params": count_parameters(student)}
        per_class = {f"ap_{name}": ap for name, ap in result.per_class.items()}
        results = {"epoch": epoch + 1, **losses, **cost, **scores, "lr": lr, "seconds": seconds[-1], **per_class}
        if accelerator.is_main_process:
            run.append_result(results)
        # after the row: a run that is killed between the two writes the row again, and never misses one
        save_checkpoint(run.checkpoints, progress, unit, ema, optimizer, accelerator)
        recent = seconds[-3:]
        row = {"epoch": f"{epoch + 1}/{config.train.epochs}", **losses, "macs_left": macs / progress.uncut_macs}
        row |= {"AP": result.ap, "AP50": result.ap50}
        row |= {"teacher_share": result.ap / teacher_ap if teacher_ap else None} if teacher else {}
        row |= {"lr": lr, "epoch_time": seconds[-1]}
        row |= {"time_left": sum(recent) / len(recent) * (config.train.epochs - epoch - 1)}
        report.epoch_row(row if pruner else {key: value for key, value in row.items() if key != "macs_left"})
        log_results(accelerator, results)
        album.update(kept)

    finish(config, kept, teacher, evaluate_test, progress, run, report, accelerator, role)
    album.update(kept, last=True)


def train_epoch(
    trained: torch.nn.Module,
    unit: Distiller,
    teacher: Teacher | None,
    loader,
    optimizer,
    ema: EMA | None,
    enter_step: Callable[[int], None],
    bar: StepProgress,
    unreadable: set[str],
    accelerator: Accelerator,
    config: Config,
) -> dict[str, float]:
    """One pass over the training data; the mean of each weighted loss over all processes.

    Files that could not be read are added to `unreadable`.

    Raises:
        UserError: a loss is no longer a number.
    """
    trained.train()
    sums: dict[str, torch.Tensor] = {}
    steps = 0
    for step, batch in enumerate(loader):
        unreadable.update(batch.unreadable)
        if not len(batch.images):  # every image of the batch was unreadable, and the settings say to skip such
            continue
        enter_step(step)
        with accelerator.accumulate(trained):
            taught = teacher(batch.images) if teacher and unit.terms else None
            loss, parts = trained(batch.images, batch.targets, taught)
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.train.optimizer.clip_norm:
                accelerator.clip_grad_norm_(unit.parameters(), config.train.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        if ema and accelerator.sync_gradients:
            ema.update(unit.student)
        steps += 1
        sums = {name: value + sums.get(name, 0) for name, value in parts.items()}
        # reading a loss makes a GPU wait, so that is done only now and then
        bar.advance({name: float(value) for name, value in parts.items()} if step % 10 == 0 else None)
        if step % 10 == 0:
            check_losses(unit)
    check_losses(unit)
    if not steps:
        raise UserError(f"{config.data.root}: not one training image could be read; mend the files")
    reduced = accelerator.reduce(torch.stack(list(sums.values())) / steps, "mean").tolist()
    return dict(zip(sums, reduced))


def evaluation(split: build.Split, accelerator: Accelerator) -> Callable[[Detector], EvaluationResult]:
    """A function that says what a detector is worth on a split."""
    evaluator = DetectionEvaluator(split.index.to_coco(), split.index.class_names)
    loader = accelerator.prepare(split.loader)

    def evaluate(detector: Detector) -> EvaluationResult:
        share_buffers(accelerator, detector)
        return run_evaluation(detector, loader, evaluator, accelerator)

    return evaluate


def finish(
    config: Config,
    kept: Detector,
    teacher: Teacher | None,
    evaluate: Callable[[Detector], EvaluationResult],
    progress: Progress,
    run: RunFolder,
    report: Report,
    accelerator: Accelerator,
    role: str,
) -> None:
    """Saves the student, writes the summary and prints the table that compares it with its teacher."""
    image_size = config.data.image_size
    after = describe(evaluate(kept), kept, image_size)
    of_teacher = describe(evaluate(teacher.detector), teacher.detector, image_size) if teacher else None
    if not accelerator.is_main_process:
        return
    detectors = {"teacher": teacher.detector if teacher else None, "student": kept, "student_before": None}
    if progress.plans:
        detectors["student_before"] = students.build(**kept.recipe).to(accelerator.device)  # for its shape alone
    latency = {name: measure_latency(d, image_size) for name, d in detectors.items() if d is not None}
    entries = {"teacher": of_teacher, "student_before": progress.before, "student": after}
    entries = {name: entry | {"latency_ms": latency[name]} if entry else None for name, entry in entries.items()}
    info = {"image_size": list(image_size), "resize": config.data.resize, "epochs": config.train.epochs}
    facts = {key: value for key, value in after.items() if key != "precision"}
    students.save(kept, run.student, info | {"split": config.data.test or config.data.val, **facts})
    run.write_summary({**entries, "split": config.data.test or config.data.val, "epochs": config.train.epochs})
    write_model_card(run)
    before = f"student before cutting, epoch {progress.before['epoch']}" if progress.before else ""
    titles = {"teacher": "teacher", "student_before": before, "student": role}
    split = config.data.test or config.data.val
    report.table(
        f"{run.path} on {split}, {image_size[1]}x{image_size[0]} px, latency of one image on {accelerator.device.type}",
        *comparison({title: entries[name] for name, title in titles.items()}, "teacher" if teacher else None),
    )


if __name__ == "__main__":
    sys.exit(main())
