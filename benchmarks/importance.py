"""Do importances find the channels that matter? Each against what removing a channel really costs.

    python benchmarks/importance.py --seeds 3

Trains the quickstart's teacher once, and its student with that teacher for a few epochs; takes channels away one at a
time from a sample of every group, and measures on the validation images what that adds to the task's loss, and to the
loss that was trained, knowledge terms included. The importances see training images only. Every finished seed is kept
under --output, and a second start goes on from there. Writes --output/importance.json and the section of
docs/pruning.md.
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from scipy.stats import spearmanr

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.arms import ROOT, interval, markdown, replace_section, run_arm, setting
from distill import factory
from distill.checkpoint import find_checkpoints
from distill.config import check_config, read_yaml
from distill.data import Batch
from distill.distiller import Distiller, Lesson
from distill.measure import eval_mode
from distill.pruning.budget import make_plan
from distill.pruning.cost import Cost
from distill.pruning.graph import ChannelGroup, find_groups
from distill.pruning.importance import IMPORTANCES
from distill.pruning.recalibrate import calibration_batches
from distill.pruning.saliency import trained_loss
from distill.report import counted
from distill.run_folder import RunFolder
from distill.schema.pruning import BY_GRADIENTS
from students.plan import apply_plan, named_tensors
from teachers import Teacher

TITLE = "Do they find the channels that matter?"
SCENES = ["data.root=runs/scenes1000", "data.synthetic.train=1000"]
TASK_ALONE = ", task alone"  # of an importance with `knowledge: false`
# by row of the tables: the importance, and whether its gradients are those of the knowledge terms too
ROWS = {name: (name, True) for name in IMPORTANCES} | {f"{name}{TASK_ALONE}": (name, False) for name in BY_GRADIENTS}
PER = {"macs": "MACs", "memory": "activations"}


class Loss(NamedTuple):
    """What a unit's loss is: the task's, and what is trained."""

    task: float
    trained: float


class Trials(NamedTuple):
    """What was found out about some channels of one group; all lists are in their order.

    Attributes:
        group: its name.
        channels: that were taken out one at a time.
        task: what each added to the task's loss.
        trained: what each added to the loss that is trained.
        costs: what goes with each, by currency.
        scores: what importances say of each, by row.
    """

    group: str
    channels: list[int]
    task: list[float]
    trained: list[float]
    costs: dict[str, list[float]]
    scores: dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of every student")
    parser.add_argument("--channels", type=int, default=8, help="sampled from each group")
    parser.add_argument("--batches", type=int, default=16, help="of training images, for importances that measure")
    parser.add_argument("--output", type=Path, default=Path("runs/importance"))
    args = parser.parse_args()
    output, results = args.output.resolve(), []
    for seed in range(args.seeds):
        folder = distil(output, args.config, SCENES, args.epochs, seed)
        results.append(correlate(kept_trials(folder, args.channels, args.batches, seed)))
        (output / "importance.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"{seed + 1} of {counted(args.seeds, 'seed')}\n{table(results)}\n{table_per(results)}", flush=True)
    file = ROOT / "docs" / "pruning.md"
    file.write_text(replace_section(file.read_text(), TITLE, section(results, args)))


def distil(output: Path, config: str, base: Sequence[str], epochs: int, seed: int) -> Path:
    """The run folder of a student that learnt from the recipe's teacher; both are trained where they are not there."""
    as_student = read_yaml(ROOT / config)["teacher"]
    alone = [setting("student", as_student["detector"]), setting("train", as_student["train"])]
    run_arm(output / "teacher", config, [*base, "teacher=null", "losses={}", "pruning=null", *alone])
    teacher = setting("teacher", {"path": str(output / "teacher" / "student")})
    folder = output / f"seed{seed}"
    run_arm(folder, config, [*base, teacher, "pruning=null", f"train.epochs={epochs}", f"seed={seed}"])
    return folder


def kept_trials(folder: Path, channels: int, batches: int, seed: int) -> list[Trials]:
    """What `try_channels` finds, from the run's folder where it was found with these settings before."""
    file, asked = folder / "trials.json", {"channels": channels, "batches": batches, "seed": seed}
    kept = json.loads(file.read_text()) if file.is_file() else {}
    if kept.get("asked") != asked:
        found = try_channels(folder, channels, batches, seed)
        kept = {"asked": asked, "trials": [trials._asdict() for trials in found]}
        file.write_text(json.dumps(kept) + "\n")
    return [Trials(**trials) for trials in kept["trials"]]


def try_channels(folder: Path, channels: int, batches: int, seed: int) -> list[Trials]:
    """Takes channels out of the student of a finished run, and asks every importance about them.

    Args:
        folder: the run's.
        channels: sampled from each group.
        batches: of training images that importances are measured on.
        seed: of the sample.
    """
    config = check_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    data = factory.build_data(config.data.model_copy(update={"workers": 0}), config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unit, teachers = restore(RunFolder(folder), data.class_names, device)
    groups, tensors = find_groups(unit, config.data.image_size), named_tensors(unit)
    shown = list(calibration_batches(data.train.loader.dataset, config.data.batch_size, device, batches))
    scores = {}
    for row, (name, knowledge) in ROWS.items():
        importance = IMPORTANCES[name]
        loss = lambda batch, knowledge=knowledge: trained_loss(unit, teachers, batch, knowledge)  # noqa: E731
        evidence = importance.measure(unit, groups, shown, loss) if importance.measure else None
        scores[row] = [importance.score(group, tensors, evidence) for group in groups]
    costs = {currency: Cost(unit, currency, config.data.image_size) for currency in PER}

    picker = random.Random(seed)
    images = [batch._replace(images=batch.images.to(device)) for batch in data.val.loader]
    lessons = [unit.ask(teachers, batch.images, batch.targets) for batch in images]
    before, found = mean_loss(unit, images, lessons), []
    for number, group in enumerate(groups):
        chosen = sorted(picker.sample(range(group.width), min(channels, group.width)))
        after = [mean_loss(without(unit, group, channel), images, lessons) for channel in chosen]
        found.append(
            Trials(
                group.name,
                chosen,
                [loss.task - before.task for loss in after],
                [loss.trained - before.trained for loss in after],
                {currency: cost.by_channel(group)[chosen].tolist() for currency, cost in costs.items()},
                {row: of_groups[number][chosen].tolist() for row, of_groups in scores.items()},
            )
        )
    return found


def restore(run: RunFolder, class_names: list[str], device: torch.device) -> tuple[Distiller, dict[str, Teacher]]:
    """The student of a run with its knowledge terms, as its last checkpoint has them, and its teachers."""
    config = check_config(run.config, str(run.config_file))
    student = factory.build_student(config, class_names)
    detectors = factory.build_teachers(config, class_names, student)
    unit = factory.build_unit(config, student, detectors).to(device)
    state = torch.load(find_checkpoints(run.checkpoints)[-1], map_location=device, weights_only=True)
    unit.load_state_dict(state["unit"])
    unit.combiner.epoch = state["progress"]["epoch"]  # terms count what they do in the end
    teachers = {name: Teacher(detector, device) for name, detector in detectors.items()}
    unit.bind({name: teacher.detector for name, teacher in teachers.items()})
    return unit, teachers


def without(unit: Distiller, group: ChannelGroup, channel: int) -> Distiller:
    """A copy of a unit that one channel was cut from, without any training or new statistics."""
    score = torch.ones(group.width)
    score[channel] = 0
    trial = copy.deepcopy(unit)
    apply_plan([(trial, make_plan([group], [score], [group.width - 1], named_tensors(unit)))])
    return trial


@torch.no_grad()
def mean_loss(unit: Distiller, batches: Sequence[Batch], lessons: Sequence[Mapping[str, Lesson]] = ()) -> Loss:
    """The mean of a unit's loss over batches, in eval mode; where it has terms, `lessons` are those of the batches."""
    with eval_mode(unit):
        found = [unit(batch.images, batch.targets, lesson) for batch, lesson in zip_longest(batches, lessons)]
    return Loss(mean(float(parts["task"]) for _, parts in found), mean(float(total) for total, _ in found))


def correlate(trials: Sequence[Trials]) -> dict[str, dict[str, float]]:
    """Spearman's correlation of every row with the truth, for one trained student.

    Returns:
        By row, `within`: the mean over groups of the correlation between channels of one group; `across`: the
        correlation over the channels of all groups together, as global ranking compares them; `trained`: likewise, with
        what is added to the loss that is trained; `macs` and `memory`: likewise, of scores for what a channel costs
        with what is added to the task's loss for that; `undivided_macs` and `undivided_memory`: of scores as they are.
    """
    task, trained = ([*chain(*values)] for values in zip(*((group.task, group.trained) for group in trials)))
    costs = {currency: [max(1.0, cost) for group in trials for cost in group.costs[currency]] for currency in PER}
    correlations = {}
    for row in trials[0].scores:
        guesses = [*chain(*(group.scores[row] for group in trials))]
        # where all channels score alike, as with ranks of maps of one pixel, nothing is known of them
        within = mean(spearman(group.scores[row], group.task) for group in trials)
        correlations[row] = {"within": within, "across": spearman(guesses, task), "trained": spearman(guesses, trained)}
        for currency, of_channels in costs.items():
            truth = over(task, of_channels)
            correlations[row][currency] = spearman(over(guesses, of_channels), truth)
            correlations[row][f"undivided_{currency}"] = spearman(guesses, truth)
    return correlations


def over(values: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Each value divided by its cost."""
    return [value / cost for value, cost in zip(values, costs)]


def spearman(guess: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where either is constant."""
    if len(set(guess)) < 2 or len(set(truth)) < 2:
        return 0.0
    return float(spearmanr(guess, truth).statistic)


def spread(results: Sequence[dict[str, dict[str, float]]], row: str, kind: str) -> str:
    """The mean of one correlation over seeds, and its 95% interval where there are several."""
    middle, half = interval([seed[row][kind] for seed in results])
    return f"{middle:.2f}" + (f" +- {half:.2f}" if len(results) > 1 else "")


def named(row: str) -> str:
    """A row's first cell."""
    name, alone, _ = row.partition(TASK_ALONE)
    return f"`{name}`{alone}"


def table(results: Sequence[dict[str, dict[str, float]]]) -> str:
    """All rows, that of the best within a group first."""
    ordered = sorted(results[0], key=lambda row: -mean(seed[row]["within"] for seed in results))
    rows = [[named(row), *(spread(results, row, kind) for kind in ("within", "across", "trained"))] for row in ordered]
    return markdown(["importance", "within a group", "over all groups", "task and knowledge"], rows)


def table_per(results: Sequence[dict[str, dict[str, float]]]) -> str:
    """Group Fisher for what a channel costs, as it is, and the control."""
    fisher = ("group_fisher", f"group_fisher{TASK_ALONE}")
    rows = [[f"{named(row)}, divided", *(spread(results, row, currency) for currency in PER)] for row in fisher]
    rows += [[f"{named(row)}, not divided", *(spread(results, row, f"undivided_{x}") for x in PER)] for row in fisher]
    rows.append(["`random`, divided", *(spread(results, "random", currency) for currency in PER)])
    return markdown(["importance", *(f"for the {name} freed" for name in PER.values())], rows)


def section(results: Sequence[dict[str, dict[str, float]]], args: argparse.Namespace) -> str:
    """The section of docs/pruning.md."""
    seeds = counted(len(results), "seed")
    taught = f"{counted(args.epochs, 'epoch')} on 1000 scenes"
    return f"""Spearman's correlation with the loss that is really added, on 80 validation images, when one channel is
cut. The quickstart's student learnt from the quickstart's teacher for {taught}; {args.channels} channels of
each of its groups were taken out, one at a time. *Within a group* is the mean over groups; *over all groups* compares
all channels at once, as `ranking: global` does; both with the task's loss. *Task and knowledge* is over all groups,
too, with the loss that was trained. Gradients are those of that loss, or, where it says *task alone*, those of
`knowledge: false`. Mean over {seeds} and its 95% interval:

{table(results)}
With `per`, both are divided by what goes with a channel: the score, and what is added to the task's loss. That alone
may make them alike; `random` shows how much. Over all groups:

{table_per(results)}
```
python benchmarks/importance.py --seeds {len(results)} --epochs {args.epochs} --channels {args.channels}
```
"""


if __name__ == "__main__":
    main()
