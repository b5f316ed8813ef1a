"""Writes a trained detector as one file for other runtimes, and says how far that file agrees with it.

python -m distill.export runs/x/student --format onnx
python -m distill.export runs/x/student --format pt2 --outputs boxes --dynamic batch size
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from distill.artifact import data_settings, images_for, input_size, open_folder
from distill.errors import UserError, exit_status
from distill.evaluation import DetectionEvaluator, EvaluationResult, run_evaluation
from distill.exported import (
    OUTPUTS,
    SUFFIXES,
    DeployedDetector,
    ExportedDetector,
    check_onnx,
    is_ours,
    trace,
    write_onnx,
    write_pt2,
)
from distill.factory import Split
from distill.measure import time_in_turns
from distill.parity import compare_detections, compare_tensors
from distill.report import Report, counted, human_ap
from students.torchvision_families.one_stage import OneStageDetector

RUNTIMES = {"onnx": "ONNX Runtime", "pt2": "torch.export"}
_WORTH_A_WARNING = 0.001  # of AP


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an artifact folder, such as runs/x/student")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data settings to change: data.root=PATH")
    parser.add_argument("--format", choices=SUFFIXES, default="onnx")
    parser.add_argument("--outputs", choices=OUTPUTS, default=OUTPUTS[0], help="how much of the decoding is inside")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images in each batch")
    parser.add_argument("--dynamic", nargs="+", choices=("batch", "size"), default=[], help="what may vary in use")
    parser.add_argument("--opset", type=int, help="of ONNX; what its exporter prefers otherwise")
    parser.add_argument("--output", type=Path, metavar="FILE", help="FOLDER.onnx or FOLDER.pt2 otherwise")
    parser.add_argument("--config", help="whose data to measure AP on; the config.yaml beside the folder otherwise")
    args = parser.parse_intermixed_args()
    return exit_status(lambda: export(args))


def export(args: argparse.Namespace) -> None:
    """Writes the file, then measures it beside the detector that it was made from."""
    if args.batch < 1:
        raise UserError(f"--batch: found {args.batch}; at least 1 is needed")
    if args.opset is not None and args.format != "onnx":
        raise UserError(f"--opset: is ONNX's; leave it out with --format {args.format}")
    if args.format == "onnx":
        check_onnx(args.opset)
    detector = open_folder(args.folder)
    file = args.output or args.folder.parent / f"{args.folder.resolve().name}{SUFFIXES[args.format]}"
    check_free(file, args.format)
    report = Report()
    stride = max(detector.strides) if "size" in args.dynamic else 1
    config, split = None, None
    try:
        config = data_settings(args.folder, args.config, args.overrides)
        split = images_for(detector, config, multiple_of(stride, input_size(detector, config)))
    except UserError as error:
        if args.config or args.overrides:
            raise
        report.warn(f"AP is not measured: {error}")
    image_size = multiple_of(stride, input_size(detector, config))

    deployed = DeployedDetector(detector, args.outputs)
    if args.outputs == "raw" and isinstance(detector, OneStageDetector):
        raise UserError(f"--outputs raw: {detector.title} has more than scores and distances; say detections or boxes")
    info = {
        "class_names": detector.class_names,
        "image_size": list(image_size),
        "resize": detector.info.get("resize", config.data.resize if config else "letterbox"),
        "input": "RGB in [0, 1], float32; the graph normalises",
        "outputs": args.outputs,
        "batch": None if "batch" in args.dynamic else args.batch,
        "dynamic": args.dynamic,
        "limits": list(detector.limits),
    }
    write(deployed, file, args.format, info, args.opset)
    report.banner(f"{args.folder} -> {file}", _describe(deployed, info))
    exported = ExportedDetector(file, detector=detector)
    compare(deployed, exported, RUNTIMES[args.format], (args.folder, file), split, report)


def multiple_of(stride: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """The nearest size whose sides the stride divides; at least two strides, for a side of one never changes."""
    height, width = (max(round(side / stride), 2) * stride for side in image_size)
    return height, width


def write(deployed: DeployedDetector, file: Path, format: str, info: dict[str, Any], opset: int | None = None) -> None:
    """Writes a detector to a file that appears whole or not at all; what can go wrong is a UserError.

    Args:
        deployed: in eval mode on the CPU.
        file: where to; another of its kind is replaced.
        format: 'onnx' or 'pt2'.
        info: what the file is to say of itself; `image_size`, `batch` and `dynamic` say how it is traced.
        opset: of ONNX; what its exporter prefers otherwise.
    """
    program = trace(deployed, tuple(info["image_size"]), info["batch"] or 1, tuple(info["dynamic"]))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as staging:
            staged = Path(staging) / file.name
            if format == "onnx":
                write_onnx(program, staged, info, deployed.names, opset)
            else:
                write_pt2(program, staged, info)
            staged.replace(file)
    except OSError as error:
        raise UserError(f"--output: cannot write {file} ({error.strerror}); choose another one") from error


def check_free(file: Path, format: str) -> None:
    """Raises a UserError where an export would take the place of something else."""
    if file.suffix != SUFFIXES[format]:
        raise UserError(f"--output: {file} does not end in {SUFFIXES[format]}, as --format {format} needs")
    if file.is_dir():
        raise UserError(f"--output: {file} is a folder; choose another one")
    if file.exists() and not is_ours(file):
        raise UserError(f"--output: {file} exists and was not made by distill.export; choose another one")


def compare(
    deployed: DeployedDetector,
    exported: ExportedDetector,
    runtime: str,
    paths: tuple[Path, Path],
    split: Split | None,
    report: Report,
) -> None:
    """Prints how far the file's outputs are from the detector's, and AP, size and latency of both."""
    info = exported.info
    shape = (info["batch"] or 1, 3, *info["image_size"])
    samples = {"random images": torch.rand(shape, generator=torch.Generator().manual_seed(0))}
    if split:
        samples["real images"] = next(iter(split.loader)).images[:8]
    for name, images in samples.items():
        with torch.inference_mode():
            ours, theirs = deployed(images), exported(images)
        if info["outputs"] == "detections":
            whole = [tuple(info["image_size"])] * len(images)
            far = compare_detections(exported.decode(ours, whole), exported.decode(theirs, whole))
        else:
            far = compare_tensors(deployed.names, ours, theirs)
        report.say(f"{name} ({len(images)}): largest difference of {far}")

    results: list[EvaluationResult | None] = [None, None]
    if split:
        evaluator = DetectionEvaluator(split.index.to_coco(), exported.class_names)
        results = [run_evaluation(d, split.loader, evaluator) for d in (deployed.detector, exported)]
    images = samples.get("real images", samples["random images"])[: shape[0]].contiguous()
    with torch.inference_mode():
        times = time_in_turns([lambda: deployed(images), lambda: exported(images)], 5, 30, images.device)
    folder, file = paths
    sizes = [sum(entry.stat().st_size for entry in folder.iterdir()), file.stat().st_size]
    rows = [
        [title, human_ap(r and r.ap), human_ap(r and r.ap50), f"{size / 1e6:.2f} MB", f"{median(t):.1f} ms"]
        for title, r, size, t in zip(("PyTorch, eager", runtime), results, sizes, times)
    ]
    where = f"AP on {len(split.index)} images of {split.index.split}, " if split else ""
    latency = f"latency of {counted(len(images), 'image')} with {info['outputs']}"
    report.table(
        f"{where}{latency}, {counted(torch.get_num_threads(), 'thread')}", ("", "AP", "AP50", "size", "latency"), rows
    )
    if split and abs((results[0].ap or 0) - (results[1].ap or 0)) > _WORTH_A_WARNING:
        report.warn(
            f"AP changes by {results[1].ap - results[0].ap:+.4f}; inside the graph boxes are clipped to the input, "
            "not to the part of it that a letterboxed image fills; --outputs boxes leaves that to its user"
        )


def _describe(deployed: DeployedDetector, info: dict[str, Any]) -> dict[str, str]:
    with torch.inference_mode():
        outputs = deployed(torch.zeros(info["batch"] or 1, 3, *info["image_size"]))
    height, width = info["image_size"]
    first, free = info["batch"] or "any", "size" in info["dynamic"]
    sides = f"multiples of {max(deployed.detector.strides)}" if free else f"{height}, {width}"
    shapes = [", ".join(map(str, (first, *output.shape[1:]))) for output in outputs]
    at = f", at {width}x{height} px" if free else ""
    return {
        "Input": f"images ({first}, 3, {sides}): {info['input']}",
        "Outputs": ", ".join(f"{name} ({shape})" for name, shape in zip(deployed.names, shapes)) + at,
    }


if __name__ == "__main__":
    sys.exit(main())
