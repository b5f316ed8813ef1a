"""What detectors are worth, side by side: AP, parameters, MACs and latency of artifact folders and exported files.

python eval.py runs/bccd/student runs/bccd/teacher
python eval.py runs/bccd/student runs/bccd/compressed/qat.onnx --config runs/bccd/config.yaml
python eval.py runs/bccd/student --split val --per-class data.root=PATH
"""

import argparse
import sys
from pathlib import Path

import torch

from distill.artifact import data_settings, images_for, input_size, open_detector
from distill.errors import UserError
from distill.evaluation import DetectionEvaluator, run_evaluation
from distill.exported import ExportedDetector
from distill.measure import measure_latency
from distill.report import Report, human_ap
from distill.run_folder import to_json, write_file
from distill.schema import Config
from distill.summary import comparison, describe
from students import Detector


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="artifact folders, .onnx, .pt2, the teacher last; and key=value"
    )
    parser.add_argument("--config", help="whose data section to use; the config.yaml beside the first folder otherwise")
    parser.add_argument("--split", help="data.test otherwise, or data.val where there is no test split")
    parser.add_argument("--per-class", action="store_true", help="also AP of each class")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file")
    args = parser.parse_intermixed_args()
    overrides = [item for item in args.folders if "=" in item]
    folders = [Path(item) for item in args.folders if "=" not in item]
    try:
        if not folders:
            raise UserError("name a folder to evaluate, such as runs/bccd/student")
        if args.json and not Path(args.json).parent.is_dir():
            raise UserError(f"--json: there is no folder {Path(args.json).parent}; make it first")
        detectors = {folder: open_detector(folder) for folder in folders}
        entries = evaluate(detectors, data_settings(folders[0], args.config, overrides), args.split, args.per_class)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        write_file(Path(args.json), to_json(entries))
    return 0


def evaluate(
    detectors: dict[Path, Detector | ExportedDetector], config: Config, split: str | None, per_class: bool
) -> dict[str, dict]:
    """Prints the table and returns its numbers, by folder."""
    report = Report()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    split = split or config.data.test or config.data.val
    entries = {}
    folders = list(detectors)
    for folder, detector in detectors.items():
        detector.to(device)
        image_size = input_size(detector, config)
        images = images_for(detector, config, image_size, split)
        for note in images.index.notes.summary() if folder == folders[0] else ():
            report.warn(f"{config.data.root}, {split}: {note}")
        evaluator = DetectionEvaluator(images.index.to_coco(), detector.class_names)
        result = run_evaluation(detector, images.loader, evaluator)
        entries[str(folder)] = describe(result, detector, image_size) | {
            "latency_ms": measure_latency(detector, image_size)
        }
    title = f"{config.data.root}, {split}: {len(images.index)} images; latency of one image on {device}"
    report.table(title, *comparison(entries, reference=str(folders[-1]) if len(folders) > 1 else None))
    sizes = ("ap_small", "ap_medium", "ap_large")
    report.table("AP by size", ("", *sizes), [[name, *(human_ap(e[s]) for s in sizes)] for name, e in entries.items()])
    if per_class:
        names = list(next(iter(entries.values()))["per_class"])
        rows = [[name, *(human_ap(e["per_class"].get(name)) for e in entries.values())] for name in names]
        report.table("AP by class", ("", *entries), rows)
    return entries


if __name__ == "__main__":
    sys.exit(main())
