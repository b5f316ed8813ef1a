"""Tries every loss between every two families, at the smallest size: does it run, or what is its user told?

    python benchmarks/pairs.py

One pass of each pair through all losses, backwards too. Writes docs/pairs.md, which a test holds against the code. It
takes libreyolo for its families, see docs/adapters.md.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(OMP_NUM_THREADS="1")  # before torch is imported

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
from pydantic import TypeAdapter
from torch import Tensor

import students
from benchmarks.arms import ROOT, markdown
from distill import factory
from distill.errors import UserError
from distill.schema import LossConfig
from distill.terms import TERMS
from students import Detector
from teachers import FeatureTeacher

DENSE = {"name": "dense", "backbone": "test_resnet", "channels": 16, "head_depth": 1}
SMALL_RESNET = {"backbone": "resnet18", "channels": 32}
# the smallest of each family
MEMBERS: dict[str, dict[str, Any]] = {
    "task_aligned": DENSE,
    "gfl": {**DENSE, "head": "gfl"},
    "retinanet head": {**DENSE, "head": "retinanet"},
    "fcos": {"name": "fcos", **SMALL_RESNET, "head_depth": 1},
    "retinanet": {"name": "retinanet", **SMALL_RESNET},
    "faster_rcnn": {"name": "faster_rcnn", **SMALL_RESNET},
    "mask_rcnn": {"name": "mask_rcnn", **SMALL_RESNET},
    "ssd300": {"name": "ssd300"},
    "ssdlite320": {"name": "ssdlite320"},
    "yolov4": {"name": "yolov4", "width": 0.125, "depth": 0.2},
    "yolov5": {"name": "yolov5", "size": "n", "width": 0.125},
    "yolov7": {"name": "yolov7", "width": 0.125},
    "yolov7_tiny": {"name": "yolov7_tiny", "width": 0.25},
    "yolox": {"name": "yolox", "size": "n"},
    "yolov9": {"name": "yolov9", "size": "t"},
    "dfine": {"name": "dfine", "size": "n"},
}
OF_THE_ZOO = ("yolox", "yolov9", "dfine")
FEATURES = {"timm features": "test_resnet", "ViT features": "test_vit"}  # networks that only teach, by their features
LETTERS = {
    "dense_sigmoid": "S", "box_mimic": "B", "ld": "L", "cross_kd": "C", "pseudo_label": "P", "roi_kd": "R",
    "score_weighted_mimic": "W",
}  # fmt: skip
OVER_FEATURES = [name for name in TERMS if name not in LETTERS]
SIZE, LEAST_OF_SSD = (64, 64), (288, 288)  # ssd300 takes no smaller images
CLASSES = ["a", "b"]
RAN = ""


class Met(NamedTuple):
    """What became of a pair.

    Attributes:
        losses: for each loss what its user is told where it is refused; `RAN` where it ran.
    """

    losses: dict[str, str]

    @property
    def cell(self) -> str:
        """F for all losses over features, then the letters of the others that ran."""
        ran = {name for name, reason in self.losses.items() if reason == RAN}
        letters = [letter for name, letter in LETTERS.items() if name in ran]
        features = [name for name in OVER_FEATURES if name in ran]
        assert len(features) in (0, len(OVER_FEATURES)), f"only {features} of the losses over features ran"
        return "".join(["F"] * bool(features) + letters) or "-"


def available() -> dict[str, dict[str, Any]]:
    """The families that can be built here."""
    there = importlib.util.find_spec("libreyolo") is not None
    return {name: recipe for name, recipe in MEMBERS.items() if there or name not in OF_THE_ZOO}


def build_teacher(name: str, folder: Path) -> Detector:
    """A fresh one, frozen; features come from a file of random weights that is written first."""
    torch.manual_seed(1)
    if name not in FEATURES:
        detector = students.build(class_names=CLASSES, **MEMBERS[name]).eval().requires_grad_(False)
        for layer in detector.output_layers:
            layer.bias.zero_()  # by which a fresh one finds nothing anywhere
        return detector
    path = folder / f"{FEATURES[name]}.pth"
    torch.save(timm.create_model(FEATURES[name]).state_dict(), path)
    return FeatureTeacher(FEATURES[name], str(path)).eval().requires_grad_(False)


def meet(students_: Iterable[str], teachers: Iterable[str], folder: Path) -> dict[tuple[str, str], Met]:
    """What became of each pair (teacher, student).

    Args:
        students_: names of `MEMBERS`.
        teachers: likewise, or of `FEATURES`.
        folder: for files on the way.

    Raises:
        AssertionError: a loss that was not refused is no finite number, or does not reach the student.
    """
    targets = [
        {"boxes": torch.tensor([[4.0, 4, 40, 44], [30, 20, 62, 60]]), "labels": torch.tensor([0, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    experts = {name: build_teacher(name, folder) for name in teachers}
    lessons: dict[tuple[str, tuple[int, int]], NamedTuple] = {}
    met = {}
    for name in students_:
        torch.manual_seed(0)
        student = students.build(class_names=CLASSES, **MEMBERS[name])
        if not student.learns:
            continue
        said = {}
        for teacher, expert in experts.items():
            size = LEAST_OF_SSD if "ssd300" in (name, teacher) else SIZE
            images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
            if size not in said:
                said[size] = student.train()(images)
            if (teacher, size) not in lessons:
                with torch.no_grad():
                    lessons[teacher, size] = expert(images)
            heard = (student, said[size], expert, lessons[teacher, size], targets, size)
            met[teacher, name] = Met({loss: try_loss(loss, *heard) for loss in TERMS})
    return met


def try_loss(
    loss: str,
    student: Detector,
    said: NamedTuple,
    teacher: Detector,
    lesson: NamedTuple,
    targets: list[dict[str, Tensor]],
    size: tuple[int, int],
) -> str:
    """`RAN`, or why the loss is refused."""
    settings = {"score_threshold": 0.0} if loss == "pseudo_label" else {}
    config = TypeAdapter(LossConfig).validate_python({"name": loss, **settings})
    try:
        term = factory.build_term(config, student, teacher, "it")
    except UserError as error:
        return str(error)
    # what the student said, cut off from its network, so that each loss goes back to there alone
    leaves = type(said)(*(tuple(x.detach().requires_grad_() for x in levels) for levels in said))
    student.zero_grad()
    value = term(leaves, lesson, targets, size)
    value.backward()
    reached = [x.grad for levels in leaves for x in levels if x.grad is not None]
    reached += [p.grad for p in student.parameters() if p.grad is not None]
    assert value.isfinite(), f"{loss}, {teacher.title} to {student.title}: is {value}"
    assert any(grad.abs().sum() > 0 for grad in reached), (
        f"{loss}, {teacher.title} to {student.title}: does not reach the student"
    )
    return RAN


def page(met: Mapping[tuple[str, str], Met]) -> str:
    """docs/pairs.md."""
    teachers, learners = (list(dict.fromkeys(names)) for names in zip(*met))
    table = markdown(
        ["teacher \\ student", *learners],
        [[teacher, *(met[teacher, student].cell for student in learners)] for teacher in teachers],
    )
    letters = markdown(
        ["", "losses"],
        [["F", ", ".join(f"`{name}`" for name in OVER_FEATURES)], *([v, f"`{k}`"] for k, v in LETTERS.items())],
    )
    usual, of_ssd = (f"{width}x{height}" for height, width in (SIZE, LEAST_OF_SSD))
    return f"""# Who can teach whom

Every family as teacher of every other, by each loss, as `python benchmarks/pairs.py` found them: one step of the
smallest member of each, with fresh weights, at {usual} pixels (`ssd300`: {of_ssd}), forwards and backwards. A letter
stands for losses that ran; what is not there is refused when a run starts, in one line, as listed below. A test does
the same and compares.

{letters}
{table}
Features meet in all pairs, also where strides are up to a factor of 2 apart. An adapter of your own
([adapters.md](adapters.md)) is like `yolox` if it returns a `DenseOutput` with one prediction a location, like `dfine`
if it returns a `DetectedOutput`. `dfine` only teaches, and so do `timm features` (any timm network with maps) and `ViT
features` (with patch tokens).

`pseudo_label` fits all pairs since it goes by detections: those that the teacher's NMS leaves, of a score of
`score_threshold` (0.3) or more, each with its top class only. The student's own assigner places them, and its own loss
asks there for the score in place of 1: sigmoids in focal loss or cross-entropy, softmaxes with the rest on the
background, objectness likewise. Boxes count by the score; those of `task_aligned`, `gfl` and `retinanet head` in full.

## What the others are told

{reasons(met)}"""


def reasons(met: Mapping[tuple[str, str], Met]) -> str:
    """The first of each loss's refusals that differ in more than who is named in them."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for pair in met.values():
        for loss, reason in pair.losses.items():
            if reason != RAN:
                kind = (loss, reason.split(";")[0].split(",")[0][:60])
                number, first = found.get(kind, (0, reason))
                found[kind] = (number + 1, first)
    rows = [[f"`{loss}`", str(number), f"`{first}`"] for (loss, _), (number, first) in sorted(found.items())]
    return markdown(["loss", "pairs", "such as"], rows).replace(":-- | --: | --:", ":-- | --: | :--")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pairs.md")
    output = parser.parse_args().output
    missing = MEMBERS.keys() - available().keys()
    if missing:
        sys.exit(f"{', '.join(sorted(missing))}: are libreyolo's; python -m pip install -e '.[zoo]'")
    with tempfile.TemporaryDirectory() as folder:
        output.write_text(page(meet(MEMBERS, [*MEMBERS, *FEATURES], Path(folder))))
    print(f"{output} is written")


if __name__ == "__main__":
    main()
