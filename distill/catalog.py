"""What there is to choose from, as `train.py --list` prints it."""

from pathlib import Path

from distill.pruning.importance import IMPORTANCES
from distill.schema import LOSSES
from students.artifact import FAMILIES
from students.backbone import WEIGHT_PACKAGES
from students.dense import HEADS
from students.pyramid import NECKS
from students.torchvision_families.backbone import MOBILENET, MOBILENET_320, RESNETS


def catalog() -> dict[str, list[str]]:
    """Everything that a config can name, by heading."""
    return {
        "configs": sorted(f"{path}  {summary_line(path)}" for path in Path("configs").glob("*.yaml")),
        "detectors (student.name)": sorted(FAMILIES),
        "a detector that is there already (student.path)": ["PATH  the folder of one, such as runs/x/student"],
        "necks (student.neck)": sorted(NECKS),
        "heads (student.head)": sorted(HEADS),
        "backbones (student.backbone)": [
            "any timm model with feature maps at the strides of student.levels",
            f"of torchvision's detectors: {', '.join(RESNETS)}; of faster_rcnn also {MOBILENET}, {MOBILENET_320}",
        ],
        "weights (student.weights)": [
            "none",
            "imagenet  from timm's hub; " + ", ".join(sorted(WEIGHT_PACKAGES)) + " from the [weights] extra, offline; "
            "of torchvision's detectors from torchvision's",
            "coco  of torchvision's detectors, from its hub",
            "PATH  a .pth or .safetensors file with timm's or torchvision's names; of the others their authors': of "
            "yolov4 a Darknet .weights, else a .pt",
        ],
        "teachers (teacher)": [
            "path  the folder of a detector",
            "detector, train  one that is trained first",
            "detector  one that is as its published weights are",
            "features  any timm model with maps, transformers too, for losses over features and attention",
            "original  the student before its first cut",
            "ema  the student's own average",
        ],
        "losses (losses.*.name)": [
            f"{name}  {family}"
            for family, models in LOSSES.items()
            for model in models
            for name in model.model_fields["name"].annotation.__args__
        ],
        "importance (pruning.importance)": sorted(IMPORTANCES),
    }


def summary_line(config: Path) -> str:
    """A config's first comment line."""
    first = config.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def print_catalog() -> None:
    for heading, entries in catalog().items():
        print(f"{heading}:")
        for entry in entries:
            print(f"  {entry}")
