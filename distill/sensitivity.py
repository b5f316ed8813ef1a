"""Which layers bear a cut: cuts each group of channels alone by 10 to 90%, and writes what harm that does.

python -m distill.sensitivity runs/x/student
python -m distill.sensitivity configs/bccd.yaml data.root=PATH --output runs/bccd_sensitivity

The first scans a trained detector on the val split of its run, the second the student of a config as it starts.
Leaves sensitivity.csv, which pruning.sensitivity takes, and sensitivity.png.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch

import students
from distill import factory
from distill.config import check_config, load_config, override, read_yaml
from distill.distiller import Distiller
from distill.errors import UserError
from distill.evaluation import DetectionEvaluator, run_evaluation
from distill.measure import eval_mode
from distill.pruning.graph import find_groups
from distill.pruning.importance import IMPORTANCES
from distill.pruning.recalibrate import calibration_batches
from distill.pruning.saliency import trained_loss
from distill.pruning.sensitivity import Sensitivity, scan, write_sensitivities
from distill.report import Report
from distill.run_folder import CONFIG
from distill.schema import Config
from students import Detector
from students.plan import named_tensors

matplotlib.use("Agg")
from matplotlib import pyplot

SHARES = tuple(n / 10 for n in range(1, 10))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a detector's folder, or a config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as data.root=PATH")
    parser.add_argument("--harm", choices=("loss", "ap"), default="loss", help="what is looked at on the val split")
    parser.add_argument("--importance", choices=sorted(IMPORTANCES), default="group_l1", help="which channels go first")
    parser.add_argument("--output", type=Path, help="folder for the two files; that of the source otherwise")
    args = parser.parse_intermixed_args()
    try:
        source = Path(args.source)
        detector, config = load(source, args.overrides)
        output = args.output or source.parent
        output.mkdir(parents=True, exist_ok=True)
        rows = measure(detector, config, args.harm, args.importance)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_sensitivities(output / "sensitivity.csv", rows)
    draw(output / "sensitivity.png", rows, {"loss": "loss added", "ap": "AP lost"}[args.harm])
    print(f"wrote {output / 'sensitivity.csv'} and {output / 'sensitivity.png'}")
    return 0


def load(source: Path, overrides: Sequence[str]) -> tuple[Detector, Config]:
    """A trained detector with the settings of its run, or the student of a config."""
    if source.is_dir():
        try:
            detector = students.load(source)
        except ValueError as error:
            raise UserError(str(error)) from None
        settings = source.resolve().parent / CONFIG
        if not settings.is_file():
            raise UserError(f"{settings}: no such file; a run's student is needed, such as runs/x/student, or a config")
        return detector, check_config(override(read_yaml(settings), list(overrides)), str(settings))
    if not source.exists():
        raise UserError(
            f"{source}: no such folder or file; give a detector's folder, such as runs/x/student, or a config"
        )
    config = load_config(source, list(overrides))
    factory.draw_data(config.data)
    names = list(factory.open_split(config.data, config.data.train, config.data.classes).class_names)
    return factory.build_student(config, names), config


def measure(detector: Detector, config: Config, kind: str, importance: str) -> list[Sensitivity]:
    """Scans a detector.

    Args:
        detector: stays as it is.
        config: whose data is used.
        kind: `loss`, the task's, or `ap`.
        importance: by which channels of a group are ordered.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unit = Distiller(detector.to(device))
    # labels in the detector's order
    data = factory.build_data(config.data.model_copy(update={"classes": detector.class_names}), config.seed)
    groups, criterion = find_groups(unit, config.data.image_size), IMPORTANCES[importance]
    try:
        evidence = None
        if criterion.measure:
            batches = calibration_batches(data.train.loader.dataset, config.data.batch_size, device, 16)
            evidence = criterion.measure(unit, groups, batches, lambda batch: trained_loss(unit, {}, batch))
        scores = [criterion.score(group, named_tensors(unit), evidence) for group in groups]
    except ValueError as error:
        raise UserError(f"--importance: {error}") from None
    worth = worth_by_ap(data.val) if kind == "ap" else worth_by_loss(data.val, device)
    uncut = worth(unit.student)
    if uncut == -math.inf:
        raise UserError("the detector's loss on val is no number before any cut; give one that was trained well")
    rows = []
    with Report().progress(len(groups), "groups") as bar:
        for row in scan(unit, groups, scores, lambda trial: uncut - worth(trial), SHARES):
            if not rows or rows[-1].layer != row.layer:
                bar.advance(None)
            rows.append(row)
    return rows


def worth_by_loss(split: factory.Split, device: torch.device) -> Callable[[Detector], float]:
    """Less the mean loss over a split's batches; minus infinity where that is no number."""
    batches = [batch._replace(images=batch.images.to(device)) for batch in split.loader if len(batch.images)]

    @torch.no_grad()
    def worth(detector: Detector) -> float:
        with eval_mode(detector):
            losses = [sum(detector.loss(detector(batch.images), batch.targets).values()) for batch in batches]
        loss = float(torch.stack(losses).mean())
        return -loss if math.isfinite(loss) else -math.inf

    return worth


def worth_by_ap(split: factory.Split) -> Callable[[Detector], float]:
    """AP on a split; 0 where it cannot be measured."""
    evaluator = DetectionEvaluator(split.index.to_coco(), split.index.class_names)
    return lambda detector: run_evaluation(detector, split.loader, evaluator).ap or 0.0


def draw(path: Path, rows: Sequence[Sensitivity], label: str) -> None:
    """A line for each group, the tenderest named first."""
    curves: dict[str, list[Sensitivity]] = {}
    for row in rows:
        curves.setdefault(f"{row.layer} ({row.width})", []).append(row)
    figure, axes = pyplot.subplots(figsize=(11, max(4, 0.22 * len(curves))), layout="constrained")
    tender = sorted(curves.items(), key=lambda item: -sum(row.harm for row in item[1]) / len(item[1]))
    colours = pyplot.colormaps["turbo_r"]
    for number, (title, curve) in enumerate(tender):
        colour = colours(number / max(1, len(tender) - 1))
        axes.plot([0, *(100 * row.cut for row in curve)], [0, *(row.harm for row in curve)], label=title, color=colour)
    axes.set(xlabel="channels of one group cut, %", ylabel=label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
