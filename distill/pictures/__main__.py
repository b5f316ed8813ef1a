"""Draws the pictures and the page of runs again, finished or not, from what lies in their folders.

python -m distill.pictures runs/bccd

A finished run that has never been looked at is, if its data and its teacher are still where its config says.
"""

import argparse
import sys
from pathlib import Path

from pydantic import ValidationError

import students
from distill.config import check_config
from distill.errors import UserError
from distill.factory import evaluation_split
from distill.pictures.folder import SCENES, draw_run, first_line, keep_scenes, keep_widths
from distill.pictures.scenes import choose_samples, look, make_scenes, with_looks
from distill.run_folder import CONFIG, RunFolder
from distill.summary import teacher_title
from students import Detector


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    args = parser.parse_args()
    try:
        for path in args.runs:
            draw(RunFolder(path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(run: RunFolder) -> None:
    """Draws one run and says where."""
    if not run.config_file.is_file():
        raise UserError(f"{run.path}: holds no run: no {CONFIG}; give the folder of a run, such as runs/bccd")
    run.pictures.mkdir(exist_ok=True)
    if run.student.is_dir() and not (run.pictures / SCENES).is_file():
        try:
            look_at(run)
        except Exception as error:
            print(f"warning: what its detectors see cannot be shown ({first_line(error)})", file=sys.stderr)
    try:
        problems = draw_run(run)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{run.config_file}: {where} is no setting of this version ({error.errors()[0]['msg']}); change it there, "
            "and draw again"
        ) from None
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(f"{run.report_file} and {len(list(run.pictures.glob('*.png')))} pictures in {run.pictures}")


def look_at(run: RunFolder) -> None:
    """Shows a few validation images to the detectors that a finished run has left."""
    config = check_config(run.config, str(run.config_file))
    student = students.load(run.student)
    samples = choose_samples(evaluation_split(config.data, config.data.val, student.class_names).loader.dataset)
    scenes = make_scenes(samples)
    detectors: dict[str, Detector] = {"student": student}
    folders = {name: Path(teacher.path or run.teacher(name)) for name, teacher in config.all_teachers.items()}
    # one that is the student's own average is not there
    teachers = {teacher_title(name): students.load(folder) for name, folder in folders.items() if folder.is_dir()}
    detectors = {**teachers, **detectors}
    for name, detector in detectors.items():
        scenes = with_looks(scenes, name, look(detector, samples))
    keep_widths(run, student)
    keep_scenes(run, scenes, student.class_names)


if __name__ == "__main__":
    sys.exit(main())
