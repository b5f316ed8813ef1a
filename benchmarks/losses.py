"""What each knowledge loss is worth: one student, one budget, each loss alone, combined, and none.

    python benchmarks/losses.py --sets scenes bccd --seeds 3 --epochs 6 --bccd PATH

Every finished arm is kept under --output, and a second start goes on from there. Losses are balanced by gradient: a
loss alone pulls as strongly as the task, several each by a weight of its own. Writes --output/losses.json and, for each
set and number of epochs, a section of docs/losses.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in this folder, `losses` would be this file

from benchmarks.arms import ROOT, interval, markdown, points, replace_section, run_arm, setting
from distill import factory
from distill.combiner import Combiner
from distill.config import check_config, override, read_yaml
from distill.data import Batch
from distill.optimization import build_optimizer
from distill.report import counted
from distill.schema import Config
from distill.terms import TERMS
from teachers import Teacher

VIEWS = "data.augment.views=4"  # of each image, so that the teacher is asked for each once, see teacher.cache
SCENES = ["data.root=runs/scenes1000", "data.synthetic.train=1000"]
BCCD = ["data.image_size=[120,160]"]
GFL = ["student.head=gfl", "teacher.detector.head=gfl"]
COMBINED = (
    {"dense_sigmoid": 1.0, "box_mimic": 1.0},
    {"dense_sigmoid": 1.0, "box_mimic": 1.0, "pkd": 1.0},
    {"dense_sigmoid": 1.0, "box_mimic": 1.0, "mgd": 1.0},
    {"dense_sigmoid": 1.0, "box_mimic": 1.0, "fgd": 1.0},
    {"cross_kd": 1.0, "box_mimic": 1.0, "fgd": 1.0},
    {"ld": 1.0, "dense_sigmoid": 1.0, "fgd": 1.0},
    {"ld": 1.0, "cross_kd": 1.0, "fgd": 1.0},
)
# what an arm learns from: weights of losses; roi_kd needs two stages, which none of these recipes has
ARMS: dict[str, dict[str, float]] = {
    "plain": {},
    **{name: {name: 1.0} for name in TERMS if name != "roi_kd"},
    **{" + ".join(f"{weight:g} {name}" for name, weight in weights.items()): weights for weights in COMBINED},
}
SETS = {
    "scenes": ("Drawn scenes (`configs/quickstart.yaml`, 1000 images)", "configs/quickstart.yaml", SCENES),
    "bccd": ("BCCD (`configs/bccd.yaml` at 160x120 px)", "configs/bccd.yaml", BCCD),
    "bccd_gfl": ("BCCD, GFL heads (likewise, `head: gfl`)", "configs/bccd.yaml", [*BCCD, *GFL]),
    "bccd_recipe": ("BCCD (`configs/bccd.yaml` as it is)", "configs/bccd.yaml", []),  # four times the pixels
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["scenes", "bccd", "bccd_gfl"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=9, help="of every student")
    parser.add_argument("--bccd", default="../shared/data/bccd", help="folder of the BCCD data set")
    parser.add_argument("--output", type=Path, default=Path("runs/losses"))
    args = parser.parse_args()
    file = args.output / "losses.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for name in args.sets:
        _, config, base = SETS[name]
        overrides = base if name == "scenes" else [*base, f"data.root={args.bccd}"]
        folder, fitting = args.output / name, [arm for arm in ARMS if fits(arm, name)]
        arms = [
            arm
            for arm in fitting
            if arm in ("plain", *args.arms)
            # what was trained before stays in the table
            or all((place(folder, arm, args.epochs, seed) / "summary.json").is_file() for seed in range(args.seeds))
        ]
        cached = sorted({loss for arm in fitting for loss in ARMS[arm]})
        result = compare(folder, config, overrides, arms, args.seeds, args.epochs, cached)
        result |= {"set": name, "epochs": args.epochs, "seeds": args.seeds}
        results[f"{name}, {args.epochs}"] = result
        args.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
        write_down(result)
        print(table(result))


def place(folder: Path, arm: str, epochs: int, seed: int) -> Path:
    """Where an arm's run is kept."""
    return folder / f"{epochs}_epochs" / arm.replace(" ", "") / f"seed{seed}"


def fits(arm: str, name: str) -> bool:
    """Whether an arm belongs on a set: with GFL heads those that are about boxes or heads, elsewhere all but LD."""
    if name == "bccd_gfl":
        return bool({"ld", "cross_kd", "box_mimic"} & {*ARMS[arm]})
    return "ld" not in ARMS[arm]


def compare(
    folder: Path, config: str, base: list[str], arms: list[str], seeds: int, epochs: int, cached: list[str]
) -> dict[str, Any]:
    """Trains the teacher and all arms on one data set, and measures a step of each.

    Arms of a seed share a cache of what the teacher says, which has what the losses `cached` need.
    """
    folder = folder.resolve()
    as_student = override(read_yaml(ROOT / config), base)["teacher"]
    teacher = [setting("student", as_student["detector"]), setting("train", as_student["train"])]
    taught_by = run_arm(folder / "teacher", config, [*base, *overrides_of({}, folder), *teacher])["student"]
    changes = {arm: [*base, VIEWS, *overrides_of(ARMS[arm], folder), f"train.epochs={epochs}"] for arm in arms}
    entries = {arm: {"ap": [], "ap50": []} for arm in arms}
    for seed in range(seeds):  # a seed of all arms before the next, so that what is done so far can be compared
        cache = [f"teacher.cache={folder / f'cache{seed}'}"]
        every = overrides_of(dict.fromkeys(cached, 1.0), folder)
        first = [*base, VIEWS, *every, "train.epochs=1", f"seed={seed}", *cache]
        run_arm(folder / "cached" / f"seed{seed}", config, first)
        for arm in arms:
            own = [*changes[arm], f"seed={seed}", *(cache if ARMS[arm] else [])]
            run = run_arm(place(folder, arm, epochs, seed), config, own)["student"]
            for key, values in entries[arm].items():
                values.append(run[key])
    checked = {arm: check_config(override(read_yaml(ROOT / config), changes[arm]), config) for arm in arms}
    for arm, cost in measure_steps(checked).items():
        entries[arm] |= cost
    return {"teacher": {key: taught_by[key] for key in ("ap", "ap50")}, "arms": entries}


def overrides_of(weights: dict[str, float], folder: Path) -> list[str]:
    """What an arm changes of the recipe."""
    if not weights:
        return ["teacher=null", "losses={}", "pruning=null"]
    losses = {name: {"name": name, "weight": weight} for name, weight in weights.items()}
    teacher = setting("teacher", {"path": str(folder / "teacher" / "student")})
    return [teacher, setting("losses", losses), "balance=gradient", "pruning=null"]


def measure_steps(configs: dict[str, Config], repeats: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of a training step, teacher included, and MiB that it keeps for the way back, for each arm.

    The arms take turns, so that whatever else the machine does slows all of them alike. A turn is as many steps as lie
    between two measurements of gradients (`balance: gradient`), so that these count as often as in training.
    """
    steps = {arm: Step(config) for arm, config in configs.items()}
    for step in steps.values():
        step()  # the first one warms up
        step.unit.combiner.step = Combiner.EAGER
    seconds = {arm: [] for arm in steps}
    for _ in range(repeats):
        for arm, step in steps.items():
            began = time.perf_counter()
            for _ in range(Combiner.EVERY):
                step()
            seconds[arm].append((time.perf_counter() - began) / Combiner.EVERY)
    return {
        arm: {"seconds": median(seconds[arm]), "kept_mib": step.kept_bytes() / 2**20} for arm, step in steps.items()
    }


class Step:
    """One training step on one batch, again and again."""

    def __init__(self, config: Config):
        data = factory.build_data(config.data, config.seed)
        student = factory.build_student(config, data.class_names)
        detectors = factory.build_teachers(config, data.class_names, student)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.unit = factory.build_unit(config, student, detectors)
        self.unit.to(self.device, memory_format=torch.channels_last).train()
        self.teachers = {name: Teacher(detector, self.device) for name, detector in detectors.items()}
        self.unit.bind(detectors)
        self.optimizer = build_optimizer(self.unit, 1e-4, 1.0, 0.05)
        batch: Batch = next(iter(data.train.loader))
        self.batch = batch._replace(images=batch.images.to(self.device))

    def loss(self) -> torch.Tensor:
        lessons = self.unit.ask(self.teachers, self.batch.images, self.batch.targets)
        return self.unit(self.batch.images, self.batch.targets, lessons)[0]

    def __call__(self) -> None:
        self.unit.combiner.step += 1
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def kept_bytes(self) -> int:
        """Bytes of all tensors that the backward pass needs, each storage once; parameters left out."""
        own = {p.untyped_storage().data_ptr() for p in self.unit.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        del loss
        return sum(kept.values())


def table(result: dict[str, Any]) -> str:
    """The arms of one data set, best first; the gap is that between the plain student and the teacher."""
    arms, teacher = result["arms"], result["teacher"]["ap"]
    plain = arms["plain"]
    plain_ap, _ = interval(plain["ap"])
    rows = [["teacher", f"{100 * teacher:.1f}", f"{100 * result['teacher']['ap50']:.1f}", "", "", ""]]
    for arm, entry in sorted(arms.items(), key=lambda item: -interval(item[1]["ap"])[0]):
        closed = (interval(entry["ap"])[0] - plain_ap) / (teacher - plain_ap) if teacher > plain_ap else None
        rows.append(
            [
                arm,
                points(entry["ap"]),
                f"{100 * mean(entry['ap50']):.1f}",
                "" if entry is plain or closed is None else f"{round(closed, 2) + 0.0:.0%}",  # and never -0%
                f"{entry['seconds'] / plain['seconds']:.2f}x",
                f"{entry['kept_mib'] / plain['kept_mib']:.2f}x",
            ]
        )
    return markdown(["", "AP", "AP50", "gap closed", "time a step", "memory a step"], rows)


def write_down(result: dict[str, Any]) -> None:
    """Replaces a comparison's section of docs/losses.md; it comes last where there was none."""
    title, epochs, seeds = SETS[result["set"]][0], counted(result["epochs"], "epoch"), counted(result["seeds"], "seed")
    options = f"--sets {result['set']} --seeds {result['seeds']} --epochs {result['epochs']}"
    body = f"{seeds}; `benchmarks/losses.py {options}`\n\n{table(result)}"
    file = ROOT / "docs" / "losses.md"
    file.write_text(replace_section(file.read_text(), f"{title}, {epochs}", body))


if __name__ == "__main__":
    main()
