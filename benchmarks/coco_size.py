"""Whether data of COCO's size can be worked with: opening its index, holding it in workers, scoring detections.

    python benchmarks/coco_size.py

Draws nothing: 118,287 names of one JPEG, and annotations with outlines such as COCO's (about 450 MB of JSON), are made
under --output on first use. Prints a table and writes --output/coco_size.json. Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.arms import markdown

IMAGES, BOXES, CLASSES = 118_287, 860_001, 80  # of COCO 2017's train split
SCORED, DETECTIONS = 5_000, 100
SIZE = (480, 640)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/coco_size"))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--part", choices=("open", "score"), help=argparse.SUPPRESS)  # what a process of its own does
    args = parser.parse_args()
    if args.part:
        found = open_it(args.output, args.workers) if args.part == "open" else score_it()
        print(json.dumps(found))
        return
    make(args.output)
    found = {}
    for part in ("open", "score"):  # each in a process of its own, so that memory is its own
        command = [sys.executable, __file__, "--part", part, "--output", args.output, "--workers", str(args.workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    (args.output / "coco_size.json").write_text(json.dumps(found, indent=2) + "\n")
    rows = [
        [key.rpartition("_")[0].replace("_", " "), f"{value:.1f} {key.rpartition('_')[2]}"]
        for key, value in found.items()
    ]
    print(markdown(["", ""], rows))


def make(root: Path) -> None:
    """The data set, where it is not there yet."""
    source = root / "annotations" / "instances_train.json"
    if source.exists():
        return
    chance = random.Random(0)
    images = root / "images" / "train"
    images.mkdir(parents=True, exist_ok=True)
    source.parent.mkdir(exist_ok=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    for number in range(1, IMAGES + 1):
        path = images / f"{number:012}.jpg"
        if number % 10_000 == 1:  # a file has so many names and no more
            first = path
            picture.save(path, quality=30)
        else:
            path.hardlink_to(first)
    with source.open("w") as file:
        listed = [
            {"id": n, "file_name": f"{n:012}.jpg", "height": SIZE[0], "width": SIZE[1]} for n in range(1, IMAGES + 1)
        ]
        names = [{"id": label, "name": f"class {label}"} for label in range(CLASSES)]
        file.write(f'{{"images": {json.dumps(listed)}, "categories": {json.dumps(names)}, "annotations": [')
        for number in range(1, BOXES + 1):
            x, y = chance.randrange(400), chance.randrange(300)
            outline = [round(chance.uniform(0, 640), 2) for _ in range(54)]
            entry = {
                "segmentation": [outline],
                "area": 100.0,
                "iscrowd": 0,
                "image_id": 1 + number % IMAGES,
                "bbox": [x + 0.5, y + 0.25, 100.0, 120.0],
                "category_id": chance.randrange(CLASSES),
                "id": number,
            }
            file.write((", " if number > 1 else "") + json.dumps(entry))
        file.write("]}")


def open_it(root: Path, workers: int) -> dict[str, float]:
    """Seconds to open the index, and MiB that all processes need then and while workers load."""
    from distill.data import build_loader, open_index
    from distill.data.augment import build_resize
    from distill.data.dataset import DetectionDataset

    before = memory([os.getpid()])
    began = time.perf_counter()
    index = open_index(root, "train")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    loader = build_loader(DetectionDataset(index, build_resize((128, 128))), 16, workers=workers, shuffle=True)
    for number, _ in enumerate(loader):
        if number == 100:
            break
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "imports_MiB": before,
        "opening_s": seconds,
        "peak_while_opening_MiB": peak,
        f"with_{workers}_workers_loading_MiB": memory([os.getpid(), *children]),
    }


def memory(processes: list) -> float:
    """MiB that processes hold, shared pages counted once."""
    kib = 0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


def score_it() -> dict[str, float]:
    """Seconds to score 5,000 images with 100 detections each, by every backend that is installed."""
    from distill.evaluation import BACKENDS, DetectionEvaluator
    from students import Detections

    chance = torch.Generator().manual_seed(0)
    images = [{"id": n, "height": SIZE[0], "width": SIZE[1]} for n in range(SCORED)]
    boxes = torch.rand(SCORED, 7, 4, generator=chance) * 200
    labels = torch.randint(CLASSES, (SCORED, 7), generator=chance)
    annotations = [
        {"id": 1 + 7 * n + i, "image_id": n, "category_id": int(labels[n, i]), "bbox": boxes[n, i].tolist()}
        for n in range(SCORED)
        for i in range(7)
    ]
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": str(n)} for n in range(CLASSES)],
    }
    found = {}
    for backend in BACKENDS:
        evaluator = DetectionEvaluator(truth, [str(n) for n in range(CLASSES)], backend)
        for n in range(SCORED):
            # the true boxes, moved a little, among many that are wrong
            near = boxes[n] + torch.rand(7, 4, generator=chance) * 20
            far = torch.rand(DETECTIONS - 7, 4, generator=chance) * 200
            xywh = torch.cat([near, far])
            xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
            wrong = torch.randint(CLASSES, (DETECTIONS - 7,), generator=chance)
            scores = torch.rand(DETECTIONS, generator=chance)
            evaluator.process([n], [Detections(xyxy, scores, torch.cat([labels[n], wrong]))])
        began = time.perf_counter()
        evaluator.evaluate()
        found[f"scoring_by_{backend}_s"] = time.perf_counter() - began
    return found


if __name__ == "__main__":
    main()
