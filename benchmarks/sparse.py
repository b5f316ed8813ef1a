"""Is network slimming lossless? A YOLOv5n trained sparse and one that was not, right after a cut, without fine-tuning.

    python benchmarks/sparse.py --seeds 2

Every trained student is kept under --output, and a second start goes on from there. Writes --output/sparse.json.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in this folder, `losses` would be a benchmark

import students
from benchmarks.arms import markdown, run_arm, setting
from benchmarks.cut import cut
from distill import factory
from distill.config import check_config, read_yaml
from distill.distiller import Distiller
from distill.pruning.folding import measure_offsets
from distill.pruning.pruner import Pruner
from distill.pruning.recalibrate import batches_needed, calibration_batches
from distill.pruning.sparsity import small_scales
from distill.sensitivity import worth_by_ap

SCENES = ["data.root=runs/scenes_1000", "data.synthetic.train=1000", "data.synthetic.val=200", "data.workers=0"]
YOLO = [setting("student", {"name": "yolov5", "size": "n"}), "train.optimizer.lr=4e-3"]
PLAIN = ["teacher=null", "losses={}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.005], help="of sparsity.scales")
    parser.add_argument("--removed", nargs="+", type=int, default=[30, 50, 70], metavar="PERCENT", help="of the MACs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path("runs/sparse"))
    args = parser.parse_args()
    output, results = args.output.resolve(), {f"{rate:g}": [] for rate in args.rates}
    shared = [*SCENES, *YOLO, f"train.epochs={args.epochs}"]
    for seed in range(args.seeds):  # a seed of all rates before the next, so that they can be compared early
        for rate, found in results.items():
            folder = output / f"scales_{rate}" / f"seed{seed}"
            run_arm(folder, args.config, [*shared, *overrides_of(float(rate)), f"seed={seed}"])
            found.append(cut_after(folder, args.removed))
        (output / "sparse.json").write_text(json.dumps(results, indent=2) + "\n")
        print(table(results, args.removed), flush=True)


def overrides_of(rate: float) -> list[str]:
    """What plain training with a rate of `sparsity.scales` changes of a recipe; it lasts to the end."""
    sparsity = {"scales": rate, "spare_shortcuts": True}
    return [*PLAIN, setting("pruning", {"sparsity": sparsity}) if rate else "pruning=null"]


def cut_after(folder: Path, removed: Sequence[int]) -> dict[str, Any]:
    """What the student of a finished run is worth on val, and right after cuts by its batch norms' scales.

    Each cut is made of the uncut student, as in training: what went is folded into what is left, and statistics are
    measured again.
    """
    config = check_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    data, size = factory.build_data(config.data, config.seed), config.data.image_size
    dataset, batch_size = data.train.loader.dataset, config.data.batch_size
    number = batches_needed(batch_size, size)
    images = [batch.images for batch in calibration_batches(dataset, batch_size, torch.device("cpu"), number)]
    unit, worth = Distiller(students.load(folder / "student")), worth_by_ap(data.val)
    found = {"ap": worth(unit.student), "small": small_scales(unit.student), "ap_after": {}, "left": {}}
    for percent in removed:
        pruner = Pruner(size, 1 - percent / 100, [0], importance="bn_scale", ranking="global", floor=0.1)
        pruner.check(unit)
        plan, trial = pruner.plan(unit, 0), copy.deepcopy(unit)
        cut(trial, plan, measure_offsets(unit.student, plan.below("student."), images), images)
        found["ap_after"][f"{percent}"], found["left"][f"{percent}"] = worth(trial.student), pruner.left(trial)
    return found


def table(results: dict[str, list[dict[str, Any]]], removed: Sequence[int]) -> str:
    """A row a rate, AP in points; of every seed, as two or three have no spread to speak of."""
    rows = []
    for rate, seeds in results.items():
        uncut, *after = (
            ", ".join(f"{100 * ap:.1f}" for ap in aps)
            for aps in zip(*([run["ap"], *(run["ap_after"][f"{percent}"] for percent in removed)] for run in seeds))
        )
        small = ", ".join(f"{run['small']:.0%}" for run in seeds)
        rows.append(["none" if rate == "0" else rate, small, uncut, *after])
    cuts = [f"-{percent}% MACs" for percent in removed]
    return markdown(["`sparsity.scales`", "scales below 0.01", "AP uncut", *cuts], rows)


if __name__ == "__main__":
    main()
