"""What a finished run leaves: the student, a summary, a model card and the table that compares it with its teachers."""

from collections.abc import Callable, Sequence
from typing import Any

import students
from distill.evaluation import EvaluationResult
from distill.measure import measure_cuts, measure_latency
from distill.model_card import write_model_card
from distill.run import Run
from distill.schema import TEACHER
from distill.summary import describe, summary_table
from students import Detector


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
        run.report.say(f"latency uncut and after each cut, in eager mode: {times} ms")
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
