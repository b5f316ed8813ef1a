"""What each family of detectors reaches by itself, and what a teacher of another kind adds: small ones, on BCCD.

    python benchmarks/detectors.py --seeds 3 --bccd ../shared/data/bccd

Every finished run is kept under --output, and a second start goes on from there. Writes --output/detectors.json, and
docs/detectors.md from all that is in it, so parts can be measured one after the other.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # in this folder, `losses` would be a benchmark

import students
from benchmarks.arms import ROOT, markdown, points, run_arm, setting
from distill.measure import count_macs, count_parameters
from distill.report import human_count

CONFIG = "configs/bccd.yaml"
ALONE = ["teacher=null", "losses={}"]
VIEWS = "data.augment.views=4"  # of each image, for the students of pairs: a teacher is asked for each once
# all from scratch: of most families no pretrained weights are to be had without a hub
FAMILIES: dict[str, dict[str, Any]] = {
    "dense_task_aligned": {"backbone": "resnet18", "channels": 64, "head_depth": 1},
    "dense_gfl": {"backbone": "resnet18", "channels": 64, "head_depth": 1, "head": "gfl"},
    "dense_retinanet": {"backbone": "resnet18", "channels": 64, "head_depth": 1, "head": "retinanet"},
    "fcos": {"name": "fcos", "backbone": "resnet18", "channels": 64, "head_depth": 1},
    "retinanet": {"name": "retinanet", "backbone": "resnet18", "channels": 64},
    "faster_rcnn": {"name": "faster_rcnn", "backbone": "resnet18", "channels": 64},
    "ssdlite320": {"name": "ssdlite320"},
    "yolov4": {"name": "yolov4", "width": 0.25, "depth": 0.34},
    "yolov5": {"name": "yolov5", "size": "n"},
    "yolov7": {"name": "yolov7", "width": 0.25},
    "yolov7_tiny": {"name": "yolov7_tiny"},
}
HEADS = ("task_aligned", "gfl")  # of the recipe's own student
HEAD_EPOCHS = 12
LITE2 = {"backbone": "tf_efficientnet_lite2", "weights": "imagenet", "channels": 128, "head_depth": 3}


class Pair(NamedTuple):
    """A teacher of one kind and a student of another.

    Attributes:
        folder: of the teacher.
        teacher: what it is.
        epochs: that it is trained for.
        student: trained from scratch.
        losses: what is carried over.
    """

    folder: str
    teacher: dict[str, Any]
    epochs: int
    student: dict[str, Any]
    losses: dict[str, dict[str, Any]]


PAIRS = {
    "faster_rcnn teaches dense_gfl": Pair(
        "faster_rcnn",
        FAMILIES["faster_rcnn"],
        16,
        {"backbone": "resnet10t", "channels": 48, "head_depth": 1, "head": "gfl"},
        {"fgd": {"weight": 0.3, "schedule": {"shape": "cosine"}}},
    ),
    "dense_retinanet teaches yolov5": Pair(
        "lite2_retinanet_p2",
        LITE2 | {"head": "retinanet", "levels": [2, 3, 4, 5]},  # of P3's anchors the smallest is larger than a platelet
        16,
        FAMILIES["yolov5"],
        {"pseudo_label": {"weight": 1.0}},
    ),
}
# parameters in millions, and billions of FLOPs at 640 px, as their authors tell them
PUBLISHED: dict[tuple[str, ...], tuple[float, float]] = {
    # for 80 classes its authors' program tells 128.5 at 608 px: in proportion to the pixels
    ("yolov4",): (64.4, 128.5 * (640 / 608) ** 2),
    ("yolov5", "n"): (1.9, 4.5),
    ("yolov5", "s"): (7.2, 16.5),
    ("yolov5", "m"): (21.2, 49.0),
    ("yolov5", "l"): (46.5, 109.1),
    ("yolov5", "x"): (86.7, 205.7),
    ("yolov7",): (36.9, 104.7),
    ("yolov7_tiny",): (6.2, 13.8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--pairs", nargs="*", choices=PAIRS, default=list(PAIRS), metavar="PAIR")
    parser.add_argument("--heads", nargs="*", choices=HEADS, default=list(HEADS), metavar="HEAD")
    parser.add_argument("--seeds", type=int, default=3, help="of every pair and head; each family is trained once")
    parser.add_argument("--epochs", type=int, default=24, help="of every family, and of every student of a pair")
    parser.add_argument("--size", type=int, nargs=2, default=(120, 160), help="height and width of images, pixels")
    parser.add_argument("--bccd", default="../shared/data/bccd", help="folder of the BCCD data set")
    parser.add_argument("--output", type=Path, default=Path("runs/detectors"))
    args = parser.parse_args()
    base = [f"data.root={args.bccd}", f"data.image_size={list(args.size)}", "pruning=null"]
    parts = (args.families, args.heads, args.pairs)
    page = document(measure(args.output.resolve(), *parts, base, args.epochs, args.seeds), args.epochs, args.size)
    (ROOT / "docs" / "detectors.md").write_text(page)
    print(page)


def measure(
    folder: Path,
    families: Sequence[str],
    heads: Sequence[str],
    pairs: Sequence[str],
    base: Sequence[str],
    epochs: int,
    seeds: int,
) -> dict[str, dict[str, Any]]:
    """Trains what is asked for and not there yet; all results so far."""

    def train(name: str, student: dict[str, Any], epochs: int = epochs) -> dict[str, Any]:
        alone = [*base, *ALONE, setting("student", student), f"train.epochs={epochs}"]
        return run_arm(folder / name, CONFIG, alone)["student"]

    file = folder / "detectors.json"
    results = json.loads(file.read_text()) if file.is_file() else {"families": {}, "heads": {}, "pairs": {}}
    for name in families:
        results["families"][name] = train(name, FAMILIES[name])
    for head in heads:
        results["heads"][head] = train_head(folder / "heads", head, base, seeds)
    for name in pairs:
        taught_by = {"teacher": train(*PAIRS[name][:3])["ap"]}
        results["pairs"][name] = taught_by | compare(folder, name, [*base, f"train.epochs={epochs}"], seeds)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def train_head(folder: Path, head: str, base: Sequence[str], seeds: int) -> dict[str, Any]:
    """What the recipe's student costs with a head, and its AP, a seed each."""
    runs = [
        run_arm(
            folder / f"{head}{seed}",
            CONFIG,
            [*base, *ALONE, f"student.head={head}", f"train.epochs={HEAD_EPOCHS}", f"seed={seed}"],
        )["student"]
        for seed in range(seeds)
    ]
    return {"params": runs[0]["params"], "macs": runs[0]["macs"], "ap": [run["ap"] for run in runs]}


def compare(folder: Path, pair: str, base: Sequence[str], seeds: int) -> dict[str, list[float]]:
    """AP of a pair's student, plain and taught, a seed each."""
    teacher, _, _, student, settings = PAIRS[pair]
    losses = {name: {"name": name, **of_loss} for name, of_loss in settings.items()}
    found: dict[str, list[float]] = {"plain": [], "taught": []}
    for seed in range(seeds):
        place = folder / pair.replace(" ", "_")
        teaching = {"path": str(folder / teacher / "student"), "cache": str(place / f"cache{seed}")}
        taught = [setting("teacher", teaching), setting("losses", losses), "balance=gradient"]
        for way, overrides in (("plain", ALONE), ("taught", taught)):
            settings = [*base, VIEWS, setting("student", student), *overrides, f"seed={seed}"]
            found[way].append(run_arm(place / f"{way}{seed}", CONFIG, settings)["student"]["ap"])
    return found


def costs_as_published(network: tuple[str, ...]) -> tuple[int, int]:
    """Parameters, and FLOPs of an image of 640x640 px (two for a MAC), of a key of `PUBLISHED`: of 80 classes, in the
    form for use, with convolutions of several branches merged."""
    family, *size = network
    with torch.device("meta"):
        detector = students.build(
            family, class_names=[f"class {number}" for number in range(80)], **({"size": size[0]} if size else {})
        ).deployed()
    return count_parameters(detector), 2 * count_macs(detector, (640, 640))


def document(results: dict[str, dict[str, Any]], epochs: int, size: Sequence[int]) -> str:
    """docs/detectors.md, of what was measured so far."""
    rows = [
        [
            f"`{name}`",
            f"`{json.dumps(settings)}`",
            human_count(run["params"]),
            human_count(run["macs"]),
            f"{100 * run['ap']:.1f}",
            f"{100 * run['ap50']:.1f}",
        ]
        for name, settings in FAMILIES.items()
        if (run := results["families"].get(name))
    ]
    text = f"""# What each family reaches

Written by `python benchmarks/detectors.py`. BCCD at {size[1]}x{size[0]} px with `configs/bccd.yaml`'s augmentation and
rates, {epochs} epochs of 205 photographs, everything from scratch, seed 0, AP in points on `test`. The rates suit the
dense detectors and no other was tuned, so this shows that a family learns, not which is best. (Mask R-CNN is not here:
its boxes alone are learnt, which makes it this Faster R-CNN. Nor is SSD300, which takes no image below 300 px.)

{markdown(["", "student", "parameters", "MACs", "AP", "AP50"], rows)}
## Which head

The recipe's own student (ImageNet weights), {HEAD_EPOCHS} epochs, mean over the seeds and its 95% interval. A GFL head
would have been the default had it won.

"""
    heads = results["heads"].items()
    rows = [
        [f"`{head}`", human_count(run["params"]), human_count(run["macs"]), points(run["ap"])] for head, run in heads
    ]
    text += markdown(["head", "parameters", "MACs", "AP"], rows)
    text += """
## Unlike pairs

A teacher of another kind, students from scratch. A teacher must know more than its student comes to alone, so the
RetinaNet is one on ImageNet weights of the `[weights]` extra. Mean over the seeds and its 95% interval; the last column
compares seed by seed. A weight is a share of the task's gradient; at a share of 1 throughout, `fgd` cost students of
this size AP: 0.6 points with the first pair (3 seeds), 3.3 with the second (1 seed).

"""
    rows = []
    for name, found in results["pairs"].items():
        said = (f"`{json.dumps(settings)}`" for settings in (PAIRS[name].teacher, PAIRS[name].student))
        gain = [taught - plain for taught, plain in zip(found["taught"], found["plain"])]
        aps = (points(found["plain"]), points(found["taught"]), points(gain))
        losses = f"`{json.dumps(PAIRS[name].losses)}`"
        rows.append([name, *said, losses, f"{100 * found['teacher']:.1f}", *aps])
    header = ["", "teacher", "student", "losses", "AP of the teacher", "plain", "taught", "taught - plain"]
    text += markdown(header, rows)
    text += """
## Sizes

The YOLO detectors against what is published of them, for 80 classes at 640x640 px; a multiply-accumulate is two FLOPs.
YOLOv7 is counted in the form for use, its branches merged. What is published of YOLOv4 is for 608 px, and was taken in
proportion to the pixels; the 1.9M parameters of YOLOv5n are 1.87M, rounded.

"""
    rows = []
    for network, (millions, billions) in PUBLISHED.items():
        params, flops = costs_as_published(network)
        costs = (f"{params / 1e6:.2f}M", f"{millions:.1f}M", f"{flops / 1e9:.1f}G", f"{billions:.1f}G")
        rows.append([f"`{''.join(network)}`", *costs])
    return text + markdown(["", "parameters", "published", "FLOPs", "published"], rows)


if __name__ == "__main__":
    main()
