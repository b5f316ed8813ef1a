"""A detector on disk: recipe and pruning plans as JSON, tensors as safetensors; nothing pickled."""

import json
import os
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from students.adapter import build_adapted
from students.checkpoint import read_tensors
from students.dense import DenseDetector
from students.detector import Detector
from students.plan import Plan, apply_plan
from students.shared_weights import SharedWeight, pack, unpack
from students.torchvision_families.faster_rcnn import FasterRCNNDetector, MaskRCNNDetector
from students.torchvision_families.fcos import FCOSDetector
from students.torchvision_families.retinanet import RetinaNetDetector
from students.torchvision_families.ssd import SSD300Detector, SSDLite320Detector
from students.yolo.v4 import YOLOv4Detector
from students.yolo.v5 import YOLOv5Detector
from students.yolo.v7 import YOLOv7Detector, YOLOv7TinyDetector
from students.zoo.dfine import DFINEDetector
from students.zoo.yolov9 import YOLOv9Detector
from students.zoo.yolox import YOLOXDetector

FAMILIES: dict[str, Callable[..., Detector]] = {
    "dense": DenseDetector,
    "fcos": FCOSDetector,
    "retinanet": RetinaNetDetector,
    "faster_rcnn": FasterRCNNDetector,
    "mask_rcnn": MaskRCNNDetector,
    "ssd300": SSD300Detector,
    "ssdlite320": SSDLite320Detector,
    "yolov4": YOLOv4Detector,
    "yolov5": YOLOv5Detector,
    "yolov7": YOLOv7Detector,
    "yolov7_tiny": YOLOv7TinyDetector,
    "yolox": YOLOXDetector,
    "yolov9": YOLOv9Detector,
    "dfine": DFINEDetector,
    "adapter": build_adapted,
}

RECIPE, PLANS, WEIGHTS = "detector.json", "plans.json", "model.safetensors"
_INDICES, _CODEBOOK = ".indices", ".codebook"  # endings of the two tensors that a shared weight is kept as


def build(name: str, **arguments: Any) -> Detector:
    """A new detector of a family, which remembers how it was built.

    Raises:
        ValueError: an unknown family, or settings that the family refuses.
    """
    if name not in FAMILIES:
        raise ValueError(f"detector: no family {name!r}; there is {', '.join(FAMILIES)}")
    detector = FAMILIES[name](**arguments)
    # once built, the first weights are history: a saved detector must be rebuilt without them
    detector.recipe = {"name": name, **arguments, **detector.settled, "weights": "none"}
    detector.plans, detector.info = [], {}
    return detector


def told_classes(name: str, weights: str) -> list[str]:
    """The classes that a family's weights are known to be of, in label order; empty where they do not tell.

    Args:
        name: of the family.
        weights: as for a detector of it, and of all of it.

    Raises:
        ValueError: a file that cannot be read.
    """
    family = FAMILIES[name]
    return family.told_classes(weights) if isinstance(family, type) else read_tensors(Path(weights))[1]


def save(
    detector: Detector,
    folder: str | Path,
    info: dict[str, Any] | None = None,
    shared: Mapping[str, SharedWeight] | None = None,
) -> None:
    """Writes a detector that `build` or `load` made: aside first, then moved into place in one step.

    Args:
        detector: the detector, cut or not.
        folder: where to; an older artifact there is replaced.
        info: JSON-friendly facts to keep beside it, such as the input size it was trained for.
        shared: tensors by name that are kept as indices and codebook, in place of the detector's own.
    """
    shared = shared or {}
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        staged = Path(staging)
        new = staged / "new"
        new.mkdir()
        recipe = {"recipe": detector.recipe, "info": info or {}}
        (new / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
        (new / PLANS).write_text(_as_text(detector.plans))
        plain = {key: value for key, value in detector.state_dict().items() if key not in shared}
        tensors, seen = {}, set()
        for key, value in plain.items():
            tensor, storage = value.detach().cpu().contiguous(), value.untyped_storage().data_ptr()
            # a module in two places has two names; safetensors wants each tensor apart
            tensors[key] = tensor.clone() if storage in seen else tensor
            seen.add(storage)
        for key, value in shared.items():
            tensors |= {key + _INDICES: pack(value), key + _CODEBOOK: value.codebook.detach().cpu().contiguous()}
        formats = {key: json.dumps([value.bits, list(value.indices.shape)]) for key, value in shared.items()}
        # safetensors' own files can be read by their owner alone
        (new / WEIGHTS).write_bytes(to_safetensors(tensors, formats or None))
        if folder.exists():
            os.replace(folder, staged / "older")
        os.replace(new, folder)


def load(folder: str | Path) -> Detector:
    """A working detector, in eval mode on the CPU, from a folder that `save` wrote.

    Raises:
        ValueError: the folder is not an artifact, or its parts do not belong together.
    """
    folder = Path(folder)
    missing = [name for name in (RECIPE, PLANS, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        near = folder / "student" if (folder / "student").is_dir() else "one such as runs/x/student"
        raise ValueError(f"{folder}: is no detector folder, it has no {missing[0]}; give {near}")
    try:
        content = json.loads((folder / RECIPE).read_text())
        detector = rebuild(content["recipe"], _read_plans(folder))
        detector.info = content["info"]
        detector.load_state_dict(_load_tensors(folder / WEIGHTS))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        # torch's own first line says only that something is wrong
        lines = [line.strip() for line in str(error).strip().splitlines()]
        reason = textwrap.shorten(" ".join(lines[1:3] or lines), 300, placeholder=" ...")
        raise ValueError(f"{folder}: does not hold together ({reason}); was it written by another version?") from error
    return detector.eval()


def _load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors by name; shared weights as the values they stand for."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        formats = opened.metadata() or {}
    for key, text in formats.items():
        bits, shape = json.loads(text)
        tensors[key] = unpack(tensors.pop(key + _INDICES), tensors.pop(key + _CODEBOOK), bits, tuple(shape)).weight
    return tensors


def read_info(folder: str | Path) -> dict[str, Any]:
    """The facts that were saved beside a detector."""
    return json.loads((Path(folder) / RECIPE).read_text())["info"]


def narrow(detector: Detector, folder: str | Path) -> None:
    """Cuts a new detector as the one in a folder was cut, so that it has its widths but keeps its own weights.

    Raises:
        ValueError: the folder is not an artifact, or one of another recipe.
    """
    folder = Path(folder)
    if not (folder / PLANS).is_file():
        raise ValueError(f"{folder}: is no detector folder, it has no {PLANS}; give one such as runs/x/student")
    try:
        for plan in _read_plans(folder):
            cut(detector, plan)
    except ValueError as error:
        raise ValueError(f"{folder}: was cut from a detector of another recipe ({error})") from error


def _as_text(plans: Sequence[Plan]) -> str:
    """Plans as JSON, a line for each cut, block and number, so that a person can read and compare them."""
    texts = [",\n".join(f"    {json.dumps(entry)}" for entry in plan.to_json()) for plan in plans]
    return "[\n" + ",\n".join(f"  [\n{text}\n  ]" for text in texts) + "\n]\n" if texts else "[]\n"


def _read_plans(folder: Path) -> list[Plan]:
    return [Plan.from_json(plan) for plan in json.loads((folder / PLANS).read_text())]


def rebuild(recipe: Mapping[str, Any], plans: Iterable[Plan]) -> Detector:
    """A new detector of a recipe, cut by plans; its weights are random."""
    detector = build(**recipe)
    for plan in plans:
        cut(detector, plan)
    return detector


def renew_classes(detector: Detector, class_names: Sequence[str]) -> Detector:
    """The same detector, cuts and weights included, for other classes; what goes by classes starts anew.

    Raises:
        ValueError: a family whose class layers are not known.
    """
    if not detector.class_layers:
        raise ValueError(f"new_head: the class layers of a {type(detector).__name__} are not known")
    recipe = {key: value for key, value in detector.recipe.items() if key != "head_classes"}
    renewed = rebuild(recipe | {"class_names": list(class_names)}, detector.plans)
    anew, own = set(renewed.class_tensors), renewed.state_dict()
    renewed.load_state_dict({name: own[name] if name in anew else x for name, x in detector.state_dict().items()})
    renewed.info, renewed.notes = detector.info, [*renewed.notes, "its class layers start anew"]
    return renewed


def cut(detector: Detector, plan: Plan) -> None:
    """Applies a plan to a detector alone and enters it in the detector's history."""
    apply_plan([(detector, plan)])
    detector.plans.append(plan)
