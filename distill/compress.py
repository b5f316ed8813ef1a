"""Makes a trained student's file smaller and faster by fewer bits, and says what that costs: one table, side by side.

python -m distill.compress runs/x/student
python -m distill.compress runs/x/student --methods static qat --epochs 5 --calibration mse
python -m distill.compress runs/x/student --methods shared --bits 4

weights: int8 weights, computed with in float
dynamic: the same, and activations are rounded by the range of each pass, so that nothing is calibrated
static: the same, but the ranges are those of training images
qat: as static, but trained on with the run's own teachers and losses while rounded
shared: a few values a layer, trained on likewise; the folder is smaller, what runs is as before
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from distill.artifact import data_settings, images_for, input_size, open_folder
from distill.compression.fake_quant import CALIBRATIONS, calibrate
from distill.compression.finetune import FineTuning
from distill.compression.onnx_dynamic import round_inputs
from distill.compression.processor import sums_in_16_bits
from distill.compression.quantized import QuantizedDetector, to_integers
from distill.compression.weight_sharing import share_weights, take_apart
from distill.data import collate_samples
from distill.errors import UserError, exit_status
from distill.evaluation import DetectionEvaluator, run_evaluation
from distill.export import check_free, write
from distill.exported import DeployedDetector, ExportedDetector, check_onnx
from distill.factory import Split
from distill.measure import time_in_turns
from distill.report import Report, counted, human_ap
from distill.run_folder import to_json, write_file
from distill.schema import Config
from students import Detector, save
from students.artifact import RECIPE

METHODS = ("weights", "dynamic", "static", "qat", "shared")
DEFAULTS = ("dynamic", "static", "qat")
FLOAT, TABLE = "float", "compression.json"
KEPT = ("image_size", "resize")  # what a folder of shared weights is told of the one it comes from
SETTINGS = ("images", "calibration", "keep", "weight_bits", "bits", "epochs", "rate", "threads")
REPEATS = 50
_BATCH = 8  # images that are calibrated at once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an artifact folder, such as runs/x/student")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change: data.root=PATH")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=DEFAULTS, help=f"{' '.join(DEFAULTS)} otherwise"
    )
    parser.add_argument(
        "--images", type=int, default=64, metavar="N", help="of data.train, to calibrate on; 64 otherwise"
    )
    parser.add_argument("--calibration", choices=CALIBRATIONS, default=CALIBRATIONS[0], help="minmax otherwise")
    parser.add_argument(
        "--keep", nargs="*", metavar="PATTERN", help="layers that stay in float; the last ones otherwise"
    )
    parser.add_argument(
        "--weight-bits", type=int, choices=(7, 8), default=7, help="8 for processors with VNNI alone; 7 otherwise"
    )
    parser.add_argument(
        "--bits", type=int, default=4, metavar="N", help="of a shared weight's index, 1 to 8; 4 otherwise"
    )
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of qat and shared; 3 otherwise")
    parser.add_argument("--rate", type=float, default=0.1, help="share of the run's learning rate; 0.1 otherwise")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="that latency is measured on; 1 otherwise")
    parser.add_argument("--output", type=Path, metavar="DIR", help="compressed/ beside the folder otherwise")
    parser.add_argument(
        "--config", help="whose data, teachers and losses to use; config.yaml beside the folder otherwise"
    )
    args = parser.parse_intermixed_args()
    return exit_status(lambda: compress(args))


def compress(args: argparse.Namespace) -> None:
    """Writes a file a method, and measures all of them beside the float one."""
    check(args)
    detector, report = open_folder(args.folder), Report()
    config = data_settings(args.folder, args.config, args.overrides)
    output = args.output or args.folder.parent / "compressed"
    methods = [method for method in METHODS if method in args.methods]
    files = {method: output / f"{method}.onnx" for method in (FLOAT, *methods) if method != "shared"}
    for file in files.values():
        check_free(file, "onnx")
    folder = output / "shared"
    if "shared" in methods and folder.exists() and not (folder / RECIPE).is_file():
        raise UserError(f"--output: {folder} is no detector's folder, and would be replaced; choose another one")
    image_size = input_size(detector, config)
    work = Compression(args, detector, config, image_size, report)
    info = {
        "class_names": detector.class_names,
        "image_size": list(image_size),
        "resize": detector.info.get("resize", config.data.resize),
        "input": "RGB in [0, 1], float32; the graph normalises",
        "outputs": "detections",
        "batch": 1,
        "dynamic": [],
    }
    # all of them before the first file, so that nothing is written where one is refused
    deployed = {method: DeployedDetector(getattr(work, method)(), "detections") for method in files}
    for method, file in files.items():
        write(deployed[method], file, "onnx", info | {"quantization": method})
        if method == "dynamic":
            round_inputs(file)
    shared = work.shared(folder) if "shared" in methods else None

    split = images_for(detector, config, image_size)
    entries = measure(files, split, args.threads)
    if shared is not None:
        entries["shared"] = worth(shared, split) | {"size": folder_size(folder), "latency_ms": None}
    settings = {key: getattr(args, key) for key in SETTINGS}
    results = {"folder": str(args.folder), **settings, "split": split.index.split, "results": entries}
    write_file(output / TABLE, to_json(results))
    show(entries, folder_size(args.folder), split, args.threads, report)
    report.say(f"wrote {', '.join(path.name for path in sorted(output.iterdir()))} to {output}")


def check(args: argparse.Namespace) -> None:
    """Raises a UserError for numbers that mean nothing."""
    check_onnx()
    for name, least in (("images", 1), ("bits", 1), ("epochs", 0), ("threads", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: found {getattr(args, name)}; at least {least} is needed")
    if args.bits > 8:
        raise UserError(f"--bits: found {args.bits}; an index has at most 8")
    if args.rate <= 0:
        raise UserError(f"--rate: found {args.rate:g}; a share above 0 is needed")


@dataclass
class Compression:
    """The methods, each giving the detector that its file is made of; `detector` stays as it is."""

    args: argparse.Namespace
    detector: Detector
    config: Config
    image_size: tuple[int, int]
    report: Report

    def float(self) -> Detector:
        return self.detector

    def weights(self) -> Detector:
        return to_integers(self.quantize(copy.deepcopy(self.detector).deployed(), calibrated=False), activations=False)

    dynamic = weights  # until its file is written

    def static(self) -> Detector:
        return to_integers(self.quantize(copy.deepcopy(self.detector).deployed()))

    def qat(self) -> Detector:
        return to_integers(self.train("qat", self.quantize))

    def shared(self, folder: Path) -> Detector:
        """Also writes the folder."""

        def share(student: Detector) -> Detector:
            share_weights(student, self.args.bits)
            return student

        student = self.train("shared", share)
        parts = take_apart(student)
        save(student, folder, {key: self.detector.info[key] for key in KEPT if key in self.detector.info}, parts)
        return student

    def quantize(self, student: Detector, calibrated: bool = True) -> QuantizedDetector:
        """The student, rounded, to the ranges that calibration finds."""
        keep = layer_names(student) if self.args.keep is None else self.args.keep
        try:
            rounded = QuantizedDetector(student.eval(), self.image_size, keep, self.args.weight_bits)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        if self.args.weight_bits == 8 and sums_in_16_bits():
            self.report.warn(
                "--weight-bits 8: this processor has no VNNI and adds products in 16 bits, which overflow; what is "
                "measured here is worse than on one that has it"
            )
        if calibrated:
            device = next(student.parameters()).device
            images = [batch.to(device) for batch in self.calibration_images]
            calibrate(rounded.eval(), images, self.args.calibration)
        return rounded.eval()

    def train(self, method: str, restrain: Callable[[Detector], Detector]) -> Detector:
        losses = ", ".join(["task", *self.config.losses])
        self.report.say(f"{method}: {counted(self.args.epochs, 'epoch')} of training with the losses {losses}")
        return self.tuning.train(restrain, self.args.epochs, self.args.rate)

    @cached_property
    def tuning(self) -> FineTuning:
        return FineTuning(self.args.folder.parent, self.config, self.detector, self.report)

    @cached_property
    def calibration_images(self) -> list[Tensor]:
        """Batches of training images, without augmentation, spread over the split.

        Raises:
            UserError: there are none.
        """
        if self.config.data.train is None:
            raise UserError("data.train: is null, and its images are what is calibrated on; name a split")
        dataset = images_for(self.detector, self.config, self.image_size, self.config.data.train).loader.dataset
        number = min(self.args.images, len(dataset))
        if not number:
            raise UserError(
                f"data.train: {self.config.data.root}, {self.config.data.train}: has no images to calibrate on"
            )
        samples = [dataset[address] for address in dataset.spread(number)]
        return list(collate_samples(samples, self.image_size).images.split(_BATCH))


def layer_names(detector: Detector) -> list[str]:
    """The last layers, which tell scores and boxes, by name."""
    return [name for name, layer in detector.named_modules() if layer in detector.output_layers]


def measure(files: dict[str, Path], split: Split, threads: int) -> dict[str, dict[str, Any]]:
    """AP, size and latency of each file, by method."""
    exported = {method: ExportedDetector(file, threads) for method, file in files.items()}
    entries = {method: worth(detector, split) for method, detector in exported.items()}
    images = next(iter(split.loader)).images[:1].contiguous()
    passes = [lambda detector=detector: detector(images) for detector in exported.values()]
    times = time_in_turns(passes, 5, REPEATS, images.device)
    for (method, file), taken in zip(files.items(), times):
        entries[method] |= {"size": file.stat().st_size, "latency_ms": median(taken)}
    return entries


def worth(detector: Detector | ExportedDetector, split: Split) -> dict[str, float | None]:
    evaluator = DetectionEvaluator(split.index.to_coco(), detector.class_names)
    result = run_evaluation(detector, split.loader, evaluator)
    return {"ap": result.ap, "ap50": result.ap50}


def show(entries: dict[str, dict[str, Any]], folder: int, split: Split, threads: int, report: Report) -> None:
    """The table; `folder` is the size of the float folder, which a shared one is compared with."""
    of_float, rows = entries[FLOAT], []
    for method, entry in entries.items():
        change = (
            "" if method == FLOAT or None in (entry["ap"], of_float["ap"]) else f"{entry['ap'] - of_float['ap']:+.3f}"
        )
        whole = folder if method == "shared" else of_float["size"]
        size = f"{entry['size'] / 1e6:.2f} MB", f"{entry['size'] / whole:.0%}"
        time = entry["latency_ms"]
        speed = ("as float", "") if time is None else (f"{time:.1f} ms", f"{of_float['latency_ms'] / time:.2f}x")
        rows.append([method, human_ap(entry["ap"]), change, human_ap(entry["ap50"]), *size, *speed])
    report.table(
        f"AP on {len(split.index)} images of {split.index.split}; latency of 1 image with detections in ONNX Runtime, "
        f"{counted(threads, 'thread')}",
        ("", "AP", "change", "AP50", "size", "", "latency", "speed"),
        rows,
    )


def folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    sys.exit(main())
