"""What detectors cost in time, measured alike: artifact folders and exported files in turns, on the device at hand.

python -m distill.latency runs/x/student runs/y/student --threads 2 --runtime eager compiled onnx
python -m distill.latency runs/x/student runs/x/student.onnx --outputs detections --batch 1 8
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from distill.artifact import input_size, open_detector
from distill.errors import UserError, exit_status
from distill.exported import OUTPUTS, DeployedDetector, ExportedDetector, run_in_onnx
from distill.measure import time_in_turns
from distill.report import Report, counted

RUNTIMES = ("eager", "compiled", "onnx")


@dataclass
class Candidate:
    """What is timed.

    Attributes:
        title: names it in the table.
        model: takes images (B, 3, H, W) on `device`.
        image_size: (height, width) in pixels.
        device: where it runs.
    """

    title: str
    model: Callable[[torch.Tensor], object]
    image_size: tuple[int, int]
    device: torch.device


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detectors", nargs="+", type=Path, metavar="DETECTOR", help="artifact folders, .onnx, .pt2")
    parser.add_argument("--runtime", nargs="+", choices=RUNTIMES, default=["eager"], help="of folders; eager otherwise")
    parser.add_argument("--outputs", choices=OUTPUTS, default="network", help="of folders; the network alone otherwise")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="N", help="images in a pass; 1 otherwise")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; all cores otherwise")
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="passes that count; 50 otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file")
    args = parser.parse_args()
    return exit_status(lambda: measure(args))


def measure(args: argparse.Namespace) -> None:
    """Times all candidates in turns, batch size by batch size, and prints the table."""
    for name, values in (
        ("batch", args.batch),
        ("repeats", [args.repeats]),
        ("threads", [1 if args.threads is None else args.threads]),
    ):
        if min(values) < 1:
            raise UserError(f"--{name}: found {min(values)}; at least 1 is needed")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json: there is no folder {args.json.parent}; make it first")
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    entries = []
    for batch in args.batch:
        candidates = [
            candidate
            for path in args.detectors
            for candidate in build(path, args.runtime, args.outputs, batch, threads)
        ]
        entries += run(candidates, batch, args.repeats)
    machine = {"processor": _processor(), "threads": threads, "torch": torch.__version__}
    outputs = "the network alone" if args.outputs == "network" else f"folders with {args.outputs} outputs"
    Report().table(
        f"milliseconds on {machine['processor']}, {counted(threads, 'thread')}; {outputs}; "
        f"{args.repeats} passes of each in turns",
        ("", "device", "batch", "median", "fastest", "slowest tenth", "images/s", "speed"),
        [_row(entry, entries) for entry in entries],
    )
    if args.json:
        results = {**machine, "outputs": args.outputs, "repeats": args.repeats, "results": entries}
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def build(path: Path, runtimes: list[str], outputs: str, batch: int, threads: int) -> list[Candidate]:
    """The candidates that a path stands for: a file is itself, a folder one of each runtime.

    Args:
        path: an artifact folder, or an exported file.
        runtimes: of `RUNTIMES`.
        outputs: how much of the decoding a folder's graph holds, as in `DeployedDetector`.
        batch: images in a pass.
        threads: of the CPU.

    Raises:
        UserError: the path is neither, a file was made for another batch, or something does not compile.
    """
    detector = open_detector(path, threads)
    image_size, cpu = input_size(detector), torch.device("cpu")
    if isinstance(detector, ExportedDetector):
        if detector.info["batch"] not in (None, batch):
            made = detector.info["batch"]
            raise UserError(
                f"{path}: was made for batches of {made}; export it with --batch {batch} or --dynamic batch"
            )
        return [Candidate(str(path), detector, image_size, detector.device)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deployed = DeployedDetector(detector, outputs).eval()
    candidates = []
    for runtime in runtimes:
        title = f"{path} {runtime}"
        if runtime == "onnx":
            exported = run_in_onnx(deployed.to(cpu), image_size, batch, threads)
            candidates.append(Candidate(title, exported, image_size, exported.device))
        elif runtime == "compiled":
            candidates.append(Candidate(title, torch.compile(deployed), image_size, device))
        else:
            candidates.append(Candidate(title, deployed, image_size, device))
    deployed.to(device)
    return candidates


def run(candidates: list[Candidate], batch: int, repeats: int) -> list[dict[str, Any]]:
    """An entry a candidate: all its milliseconds, and what the table shows of them."""
    device = next((c.device for c in candidates if c.device.type != "cpu"), torch.device("cpu"))
    with torch.inference_mode():
        passes = [_first_pass(candidate, batch) for candidate in candidates]
        times = time_in_turns(passes, 10, repeats, device)
    return [
        {
            "title": candidate.title,
            "device": str(candidate.device),
            "batch": batch,
            "image_size": list(candidate.image_size),
            "median_ms": median(taken),
            "fastest_ms": min(taken),
            "slowest_tenth_ms": quantiles(taken, n=10)[-1] if len(taken) > 1 else taken[0],
            "milliseconds": taken,
        }
        for candidate, taken in zip(candidates, times)
    ]


def _first_pass(candidate: Candidate, batch: int) -> Callable[[], object]:
    """The pass that is timed, after it ran once, which is when a compiler works."""
    # noise, so that nothing is zero that is not zero in use
    images = torch.rand(batch, 3, *candidate.image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(candidate.device)
    try:
        candidate.model(images)
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{candidate.title}: does not run here ({reason})") from error
    return lambda: candidate.model(images)


def _row(entry: dict[str, Any], entries: list[dict[str, Any]]) -> list[str]:
    first = next(other for other in entries if other["batch"] == entry["batch"])
    numbers = [f"{entry[key]:.2f}" for key in ("median_ms", "fastest_ms", "slowest_tenth_ms")]
    speed = f"{first['median_ms'] / entry['median_ms']:.2f}x"
    images = f"{1000 * entry['batch'] / entry['median_ms']:.1f}"
    return [entry["title"], entry["device"], str(entry["batch"]), *numbers, images, speed]


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
