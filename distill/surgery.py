"""What is taken from a student between two epochs - channels, blocks, single weights - and what is taken back."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.optim import Optimizer

import students
from distill.checkpoint import BEFORE_CUT, Progress, go_back, save_checkpoint
from distill.distiller import Distiller
from distill.distributed import compile_parts, on_main, release, together
from distill.ema import EMA
from distill.evaluation import EvaluationResult
from distill.guards import check_alike
from distill.measure import share_nonzero
from distill.pruning.folding import add_offsets, measure_offsets
from distill.pruning.masks import agree_on, set_to_zero
from distill.pruning.pruner import agree, cut_everywhere
from distill.pruning.recalibrate import recalibrate_batch_norms, share_statistics
from distill.pruning.soft import silence_channels
from distill.report import human_ap
from distill.run import Run
from distill.summary import size
from students import Detector, Plan
from students.plan import apply_plan

WITHIN = 1.02  # of a target, that a measured cost may be


class Surgery:
    """Cuts a student that is being trained, and all that follows its shape.

    Every process has to call every method; each acts before or after the epoch that `progress` stands at.

    Args:
        run: what is to be cut by what.
        ema: the student's averaged copy.
        optimizer: of the unit's parameters.
        progress: where the run stands; cuts are entered here.
    """

    def __init__(self, run: Run, ema: EMA | None, optimizer: Optimizer, progress: Progress):
        self.run, self.unit, self.ema, self.optimizer, self.progress = run, run.unit, ema, optimizer, progress
        self.kept: Detector = ema.module if ema else run.unit.student  # the weights that are evaluated and saved
        self._groups: list[dict[str, Any]] = []  # what the plan takes from each, on the main process
        self._blocks: list[dict[str, Any]] = []  # and which it takes, likewise
        self._due: float | None = None  # share of the cost that the plan may leave
        if run.sparsity:
            run.sparsity.follow(run.unit, run.config.data.image_size)
        self._write_down()

    def plan(self) -> Plan:
        """The cut that is due, the same on every rank: blocks, and channels of what they leave.

        It is empty where none is planned, or the last cut already took this one's share.
        """
        run, guard, epoch, cut_epoch = self.run, self.run.guard, self.progress.epoch, self.progress.cut_epoch
        blocks = channels = Plan(())
        step = guard.step(epoch, self.progress.retreats) if guard else 1.0
        again = guard is not None and guard.tries_again(epoch, cut_epoch, self.progress.retreats)
        if step == 0:
            run.report.say(f"nothing is cut before epoch {epoch + 1}: smaller and smaller cuts failed there")
            return Plan(())
        if run.blocks and (again or epoch in run.blocks.epochs):
            with torch.compiler.set_stance("force_eager"):  # compiled parts would not leave out what is tried without
                plan = run.blocks.plan(self.unit, epoch, run.teachers, run.calibration_batches(), step)
            blocks = agree(run.accelerator, plan)
            if not blocks and step < 1:
                run.report.say(f"no block goes before epoch {epoch + 1}: {step:g} of what was due is less than one")
        self._groups, self._blocks, self._due = [], [], None
        if blocks and run.accelerator.is_main_process:
            self._blocks = run.blocks.explain(self.unit, blocks)
        behind = again and run.pruner.is_behind(epoch, self.progress.left)
        if run.pruner and (behind or run.pruner.cuts_before(epoch)):
            unit = self.unit
            if blocks:
                unit = copy.deepcopy(unit)
                apply_plan([(unit, blocks)])
            channels, self._groups = self._plan_channels(unit, step)
        return Plan(channels.cuts, channels.numbers, blocks.blocks)

    def cut(self, plan: Plan, evaluate: Callable[[Detector], EvaluationResult]) -> nn.Module:
        """Makes a cut that `plan` gave; no reference to the wrapped unit may be left, as it holds on to old shapes.

        Args:
            plan: which is not empty.
            evaluate: on val.

        Returns:
            The unit, wrapped anew.

        Raises:
            UserError: it failed, here or in another process; nothing is cut then.
        """
        run, unit, progress, epoch = self.run, self.unit, self.progress, self.progress.epoch
        image_size, accelerator = run.config.data.image_size, run.accelerator
        if run.guard:
            save_checkpoint(run.folder.checkpoints, progress, unit, self.ema, self.optimizer, accelerator, BEFORE_CUT)
        uncut = size(unit.student, image_size)
        failed = f"pruning: the cut before epoch {epoch + 1} failed and nothing was cut"
        way_out = f"mend that, and go on from the last checkpoint: train.py --resume {run.folder.outermost}"
        # compiled parts would not call what measures within them
        with torch.compiler.set_stance("force_eager"), together(accelerator, failed, way_out):
            offsets, trial = self._rehearse(plan)
        release(accelerator, unit)
        with together(accelerator, failed, way_out):
            cut_everywhere(plan, unit, self.ema, self.optimizer)
        check_alike(accelerator, unit, self.ema)  # or what is shared next would not fit
        offsets = broadcast(offsets)
        for detector in dict.fromkeys((unit.student, self.kept)):
            add_offsets(detector, plan.below("student."), offsets)
            share_statistics(trial, detector)
        del trial
        compile_parts([unit.student])
        trained = accelerator.prepare_model(unit)
        if run.sparsity:
            run.sparsity.follow(unit, image_size)
        # what is measured differs from process to process, what follows from it must not
        left = run.pruner.left(unit) if run.pruner and accelerator.is_main_process else None
        (left,) = broadcast_object_list([left])
        progress.record_cut(plan, self._due, left, self._blocks, self._groups)
        self._write_down()
        if self._due is not None and run.pruner.budget == "latency" and abs(left / self._due - 1) > WITHIN - 1:
            run.report.warn(
                f"pruning.budget: measured again after the cut, {left:.1%} of the latency are left where "
                f"{self._due:.1%} were due; timings scatter here: give the machine to it alone, or budget MACs"
            )
        what = f"; without {', '.join(name for name, _ in unit.student.plans[-1].blocks)}" if plan.blocks else ""
        if run.pruner:
            what += f"; {left:.1%} of the {run.pruner.counted_in} left"
            what += f", {self._due:.1%} were due" if self._due is not None else ""
        if run.config.pruning.evaluate:
            progress.within.ap_after_cut = evaluate(self.kept).ap
            what += f"; AP {progress.within.ap_after_cut:.3f} right after"
        run.report.say(f"cut before epoch {epoch + 1}: {uncut} -> {size(unit.student, image_size)}{what}")
        return trained

    def set_to_zero(self, was_cut: bool) -> None:
        """Sets to 0 what is due besides: channels that may come back, and weights that are held there."""
        run, epoch = self.run, self.progress.epoch
        if run.pruner and epoch in run.pruner.soft_epochs:
            silence_channels(self._plan_channels(self.unit)[0], self.unit)
            share = f"{1 - run.pruner.due(epoch):.1%} of the {run.pruner.counted_in}"
            run.report.say(f"before epoch {epoch + 1} channels are set to 0, {share}; they may come back")
        if run.masks and (epoch in run.masks.epochs or (was_cut and epoch > run.masks.epochs[0])):
            masks = run.masks.choose(self.unit, epoch, run.teachers, run.calibration_batches(16))
            set_to_zero(agree_on(run.accelerator, masks), dict.fromkeys((self.unit.student, self.kept)))
            share = f"{share_nonzero(self.unit.student):.1%}"
            run.report.say(f"masks before epoch {epoch + 1}: {share} of the parameters are not 0")

    def takes_back(self, ap: float | None, loss: float) -> bool:
        """Whether the guard, after an epoch, takes the last cut back: the last checkpoint is then the one before it.

        Args:
            ap: on val.
            loss: the task's, mean over the epoch.
        """
        run, guard, progress = self.run, self.run.guard, self.progress
        cut, done = progress.cut_epoch, progress.epoch + 1
        if not guard or not guard.judges(done, cut):
            return False
        objection = guard.objection(ap, loss)
        if not objection:
            run.report.say(f"the cut before epoch {cut + 1} stays: AP {human_ap(ap)}")
            return False
        retreat = {"epoch": cut, "until": done, "left": progress.left, "objection": objection}
        go_back(run.folder.checkpoints, retreat, run.accelerator)
        then = guard.step(cut, [*progress.retreats, retreat])
        goes_on = f"{then:g} of what was due goes there now" if then else "nothing is cut there now"
        run.report.warn(f"guard: after epoch {done}, {objection}; back to before the cut at epoch {cut + 1}, {goes_on}")
        return True

    def keep_best(self, ap: float | None) -> None:
        """With a guard, saves a student within the budget that is better on val than those before it."""
        run, progress, done = self.run, self.progress, self.progress.epoch + 1
        if not run.guard or not run.guard.is_through(done, progress.cut_epoch):
            return
        within = (progress.left or 1.0) <= WITHIN * run.pruner.target
        if within and (progress.best is None or (ap or 0.0) > progress.best["ap"]):
            progress.best = {"epoch": done, "ap": ap or 0.0}
            on_main(run.accelerator, lambda: students.save(self.kept, run.folder.best))

    def result(self) -> Detector:
        """The student that the run has come to: with a guard the best one within the budget, without one the last."""
        run, best = self.run, self.progress.best
        if not run.guard:
            return self.kept
        if best is None:
            budget = f"{run.pruner.target:.1%} of the {run.pruner.counted_in}"
            run.report.warn(
                f"no student came within the budget, {budget}, and over the guard's floor; the last one is saved, with "
                f"{self.progress.left or 1.0:.1%}"
            )
            return self.kept
        run.report.say(f"the best student within the budget is saved, that of epoch {best['epoch']}")
        return students.load(run.folder.best).to(run.accelerator.device, memory_format=torch.channels_last)

    def _rehearse(self, plan: Plan) -> tuple[dict[str, Tensor], Detector]:
        """What is to be added in place of what goes, and a copy of the kept weights to which all that was done.

        Whatever can fail for want of memory or of readable images does so here, where nothing has been touched.
        """
        of_student = plan.below("student.")
        offsets = measure_offsets(self.kept, of_student, self.run.calibration_images())
        trial = copy.deepcopy(self.kept)
        apply_plan([(trial, of_student)])
        add_offsets(trial, of_student, offsets)
        recalibrate_batch_norms(trial, self.run.calibration_images())
        return offsets, trial

    def _plan_channels(self, unit: Distiller, step: float = 1.0) -> tuple[Plan, list[dict[str, Any]]]:
        """The channels of a unit that are due, the same on every rank; on the main one what it takes by groups, too."""
        run, epoch = self.run, self.progress.epoch
        with torch.compiler.set_stance("force_eager"):  # compiled parts would not call what measures within them
            evidence = run.pruner.measure(unit, run.teachers, run.calibration_batches(16))
        plan, groups = None, []
        left = 1.0 if self.progress.left is None else self.progress.left
        self._due = run.pruner.due(epoch, step, left)
        if run.accelerator.is_main_process:
            plan = run.pruner.plan(unit, epoch, evidence, step, left)
            groups = run.pruner.explain(unit, plan, evidence)
        return agree(run.accelerator, plan), groups

    def _write_down(self) -> None:
        """What was cut so far, and what cannot be."""
        run = self.run
        if not (run.pruner or run.blocks) or not run.accelerator.is_main_process:
            return
        content: dict[str, Any] = {"cuts": self.progress.cuts, "retreats": self.progress.retreats}
        if run.blocks:
            content["blocks"] = run.blocks.may_go
        if run.pruner:
            content |= {"budget": run.pruner.budget, "target": run.pruner.target, "whole": run.pruner.whole}
            content["groups"] = [{"layers": layers, "width": width} for layers, width in run.pruner.uncut_groups]
        run.folder.write_pruning(content)
