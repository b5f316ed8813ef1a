"""How much faster half the MACs are: detectors before and after one cut, timed in turns in ONNX Runtime.

python benchmarks/latency.py --output latency.json
python benchmarks/latency.py --detectors retinanet --ways uniform --round-to 8 16 32 --threads 2

Nothing is trained, as time does not ask for accuracy: a cut of `uniform` widths is the same for all weights; what is
ranked over the whole network goes by the L1 norm of ImageNet's weights where a package brings them.
"""

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import students
from distill.distiller import Distiller
from distill.errors import exit_status
from distill.export import write
from distill.exported import DeployedDetector, ExportedDetector
from distill.measure import count_macs, time_in_turns
from distill.pruning.pruner import Pruner
from distill.report import Report, counted, human_macs
from students import Detector, apply_plan

CLASSES = [f"class{n}" for n in range(3)]
# by name: how it is built, and the height and width of its images
DETECTORS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "bccd": (
        {"name": "dense", "backbone": "tf_efficientnet_lite0", "weights": "imagenet", "channels": 96, "head_depth": 2},
        (240, 320),
    ),
    "retinanet": ({"name": "retinanet", "backbone": "resnet50"}, (640, 640)),
}
# by name: settings of `pruning`
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"ranking": "uniform"},
    "per_macs": {"ranking": "global", "per": "macs", "floor": 0.25},
    "per_memory": {"ranking": "global", "per": "memory", "floor": 0.25},
    "latency": {"ranking": "global", "per": "memory", "floor": 0.25, "budget": "latency"},
}


class Arm(NamedTuple):
    """One cut: which detector, by which of `WAYS`, and what widths are multiples of."""

    detector: str
    way: str
    round_to: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["uniform", "per_macs", "per_memory"])
    parser.add_argument("--round-to", nargs="+", type=int, default=[8], metavar="N", help="multiples; 8 otherwise")
    parser.add_argument("--target", type=float, default=0.5, help="share that is left; 0.5 otherwise")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of ONNX Runtime; 2 otherwise")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="passes that count; 15 otherwise")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    return exit_status(lambda: compare(args))


def compare(args: argparse.Namespace) -> None:
    """Times each detector with all its cuts in turns, and prints a table."""
    torch.manual_seed(0)
    entries = []
    for name in args.detectors:
        recipe, image_size = DETECTORS[name]
        uncut = students.build(class_names=CLASSES, **recipe).eval()
        arms = [Arm(name, way, round_to) for way in args.ways for round_to in args.round_to]
        entries += time_arms(uncut, image_size, arms, args)
    rows = [
        [
            entry["detector"],
            entry["way"],
            str(entry["round_to"]),
            human_macs(entry["macs"]),
            f"{entry['macs_left']:.1%}",
            f"{entry['uncut_ms']:.1f} ms",
            f"{entry['ms']:.1f} ms",
            f"{entry['speed']:.2f}x",
            f"{entry['speed_slow']:.2f} to {entry['speed_fast']:.2f}",
        ]
        for entry in entries
    ]
    load = os.getloadavg()[0]
    Report().table(
        f"ONNX Runtime, {counted(args.threads, 'thread')}, 1 image, without decoding; {args.repeats} passes in turns; "
        f"load of the machine {load:.1f}",
        ("", "way", "widths", "MACs", "left", "uncut", "cut", "speed", "middle half"),
        rows,
    )
    if args.output:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": load}
        settings = {"target": args.target, "threads": args.threads, "repeats": args.repeats}
        args.output.write_text(json.dumps({**machine, **settings, "results": entries}, indent=2) + "\n")


def time_arms(
    uncut: Detector, image_size: tuple[int, int], arms: list[Arm], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """An entry an arm; its speed is the median over the rounds of the uncut detector's time by its own."""
    macs = count_macs(uncut, image_size)
    smaller = [cut(uncut, image_size, arm, args.target) for arm in arms]
    images = torch.rand(1, 3, *image_size)
    passes = [to_pass(detector, image_size, args.threads, images) for detector in (uncut, *smaller)]
    before, *after = time_in_turns(passes, 2, args.repeats, images.device)
    entries = []
    for arm, detector, taken in zip(arms, smaller, after):
        speeds = sorted(whole / part for whole, part in zip(before, taken))
        left = count_macs(detector, image_size)
        entries.append(
            {
                **arm._asdict(),
                "macs": left,
                "macs_left": left / macs,
                "uncut_ms": median(before),
                "ms": median(taken),
                "speed": median(speeds),
                "speed_slow": speeds[len(speeds) // 4],
                "speed_fast": speeds[-1 - len(speeds) // 4],
                "milliseconds": taken,
                "uncut_milliseconds": before,
            }
        )
    return entries


def cut(uncut: Detector, image_size: tuple[int, int], arm: Arm, target: float) -> Detector:
    """A copy after one cut to a share of its cost."""
    detector = copy.deepcopy(uncut)
    unit = Distiller(detector)
    settings = {"importance": "group_l1", "round_to": arm.round_to, **WAYS[arm.way]}
    pruner = Pruner(image_size, target=target, epochs=[0], **settings)
    pruner.check(unit)
    apply_plan([(detector, pruner.plan(unit, 0).below("student."))])
    return detector.eval()


def to_pass(
    detector: Detector, image_size: tuple[int, int], threads: int, images: torch.Tensor
) -> Callable[[], object]:
    """A pass of the detector in ONNX Runtime."""
    deployed = DeployedDetector(detector, "network")
    info = {"class_names": CLASSES, "image_size": list(image_size), "batch": 1, "dynamic": []}
    info["outputs"] = deployed.outputs
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "detector.onnx"
        write(deployed, file, "onnx", info)
        exported = ExportedDetector(file, threads)
    return lambda: exported(images)


if __name__ == "__main__":
    sys.exit(main())
