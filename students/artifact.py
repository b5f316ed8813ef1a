"""A detector on disk: recipe and pruning plans as JSON, tensors as safetensors; nothing pickled."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from students.dense import DenseDetector
from students.detector import Detector
from students.plan import Plan, apply_plan
from students.torchvision_families.faster_rcnn import FasterRCNNDetector, MaskRCNNDetector
from students.torchvision_families.fcos import FCOSDetector
from students.torchvision_families.retinanet import RetinaNetDetector
from students.torchvision_families.ssd import SSD300Detector, SSDLite320Detector

FAMILIES: dict[str, type[Detector]] = {
    "dense": DenseDetector,
    "fcos": FCOSDetector,
    "retinanet": RetinaNetDetector,
    "faster_rcnn": FasterRCNNDetector,
    "mask_rcnn": MaskRCNNDetector,
    "ssd300": SSD300Detector,
    "ssdlite320": SSDLite320Detector,
}

RECIPE, PLANS, WEIGHTS = "detector.json", "plans.json", "model.safetensors"


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


def save(detector: Detector, folder: str | Path, info: dict[str, Any] | None = None) -> None:
    """Writes a detector that `build` or `load` made: aside first, then moved into place in one step.

    Args:
        detector: the detector, cut or not.
        folder: where to; an older artifact there is replaced.
        info: JSON-friendly facts to keep beside it, such as the input size it was trained for.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        staged = Path(staging)
        new = staged / "new"
        new.mkdir()
        recipe = {"recipe": detector.recipe, "info": info or {}}
        (new / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
        (new / PLANS).write_text(json.dumps([plan.to_json() for plan in detector.plans]) + "\n")
        tensors = {key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}
        (new / WEIGHTS).write_bytes(to_safetensors(tensors))  # safetensors' own files can be read by their owner alone
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
        plans = [Plan.from_json(plan) for plan in json.loads((folder / PLANS).read_text())]
        detector = rebuild(content["recipe"], plans)
        detector.info = content["info"]
        detector.load_state_dict(load_file(folder / WEIGHTS))
    except (KeyError, IndexError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: does not hold together ({reason}); was it written by another version?") from error
    return detector.eval()


def read_info(folder: str | Path) -> dict[str, Any]:
    """The facts that were saved beside a detector."""
    return json.loads((Path(folder) / RECIPE).read_text())["info"]


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
