"""Do importances find the channels that matter? Each criterion against what removing a channel really costs.

    python benchmarks/importance.py --seeds 3

Trains the quickstart's student plainly for a few epochs, takes channels away one at a time from a sample of every
group, and measures the loss on the validation images; the criteria see training images only. Prints Spearman's
correlation of each criterion with the loss that removal adds, and writes --output/importance.json. Trained students
are kept under --output.
"""

import argparse
import copy
import json
import random
import sys
from itertools import chain
from pathlib import Path
from statistics import mean

import torch
from scipy.stats import spearmanr

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import students
from benchmarks.arms import interval, markdown, run_arm
from distill import factory
from distill.config import check_config, read_yaml
from distill.data import Batch
from distill.distiller import Distiller
from distill.measure import eval_mode
from distill.pruning.budget import make_plan
from distill.pruning.graph import ChannelGroup, find_groups
from distill.pruning.importance import IMPORTANCES
from distill.pruning.recalibrate import calibration_batches
from distill.pruning.saliency import trained_loss
from students.plan import apply_plan, named_tensors

PLAIN = ["teacher=null", "losses={}", "pruning=null"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--channels", type=int, default=12, help="sampled from each group")
    parser.add_argument("--batches", type=int, default=16, help="of training images, for criteria that measure")
    parser.add_argument("--output", type=Path, default=Path("runs/importance"))
    args = parser.parse_args()
    output = args.output.resolve()
    results: dict[str, dict[str, list[float]]] = {name: {"within": [], "across": []} for name in IMPORTANCES}
    for seed in range(args.seeds):
        folder = output / f"seed{seed}"
        run_arm(folder, args.config, [*PLAIN, f"train.epochs={args.epochs}", f"seed={seed}"])
        for name, correlations in correlate(folder, args.channels, args.batches, seed).items():
            for kind, value in correlations.items():
                results[name][kind].append(value)
    (output / "importance.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def correlate(folder: Path, channels: int, batches: int, seed: int) -> dict[str, dict[str, float]]:
    """Spearman's correlation of every criterion with the truth, for one trained student.

    Returns:
        By criterion, `within`: the mean over groups of the correlation between channels of one group; `across`: the
        correlation over the channels of all groups together, as global ranking compares them.
    """
    config = check_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    data = factory.build_data(config.data.model_copy(update={"workers": 0}), config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unit = Distiller(students.load(folder / "student")).to(device)
    groups = find_groups(unit, config.data.image_size)
    picker = random.Random(seed)
    sample = [sorted(picker.sample(range(g.width), min(channels, g.width))) for g in groups]
    images = [batch._replace(images=batch.images.to(device)) for batch in data.val.loader]
    before = task_loss(unit, images)
    truth = [[added_loss(unit, group, c, images, before) for c in chosen] for group, chosen in zip(groups, sample)]
    shown = list(calibration_batches(data.train.loader.dataset, config.data.batch_size, device, batches))

    correlations = {}
    for name, importance in IMPORTANCES.items():
        loss = lambda batch: trained_loss(unit, {}, batch)  # noqa: E731
        evidence = importance.measure(unit, groups, shown, loss) if importance.measure else None
        scores = [importance.score(group, named_tensors(unit), evidence) for group in groups]
        guesses = [score[chosen].tolist() for score, chosen in zip(scores, sample)]
        # where all channels score alike, as with ranks of maps of one pixel, nothing is known of them
        within = [spearman(guess, true) for guess, true in zip(guesses, truth)]
        correlations[name] = {"within": mean(within), "across": spearman([*chain(*guesses)], [*chain(*truth)])}
    return correlations


def spearman(guess: list[float], truth: list[float]) -> float:
    """Spearman's rank correlation; 0 where either is constant."""
    if len(set(guess)) < 2 or len(set(truth)) < 2:
        return 0.0
    return float(spearmanr(guess, truth).statistic)


def added_loss(unit: Distiller, group: ChannelGroup, channel: int, batches: list[Batch], before: float) -> float:
    """How much the task's loss grows when one channel is cut, without any training or new statistics."""
    score = torch.ones(group.width)
    score[channel] = 0
    trial = copy.deepcopy(unit)
    apply_plan([(trial, make_plan([group], [score], [group.width - 1], named_tensors(unit)))])
    return task_loss(trial, batches) - before


@torch.no_grad()
def task_loss(unit: Distiller, batches: list[Batch]) -> float:
    """The mean of the task's loss over batches, in eval mode."""
    with eval_mode(unit):
        return mean(float(trained_loss(unit, {}, batch)) for batch in batches)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """The criteria, best within a group first."""
    rows = []
    for name, kinds in sorted(results.items(), key=lambda item: -mean(item[1]["within"])):
        cells = [interval(kinds[kind]) for kind in ("within", "across")]
        rows.append([f"`{name}`", *(f"{value:.2f} +- {spread:.2f}" for value, spread in cells)])
    return markdown(["importance", "within a group", "over all groups"], rows)


if __name__ == "__main__":
    main()
