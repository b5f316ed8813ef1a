"""Settings of detectors, a section a family."""

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, model_validator

from distill.schema.base import Count, Positive, Section


class DenseConfig(Section):
    """Settings of `students.dense.DenseDetector`."""

    name: Literal["dense"]
    backbone: str
    weights: str = "none"
    neck: Literal["fpn", "pan"] = "fpn"
    channels: Count = 96
    levels: list[int] = [3, 4, 5]
    head: Literal["task_aligned", "gfl", "retinanet"] = "task_aligned"
    head_depth: Count = 2


class TorchvisionConfig(Section):
    """What all of torchvision's detectors have; null leaves a choice to torchvision."""

    weights: str = "none"
    trainable_layers: Annotated[int, Field(ge=0, strict=True)] | None = (
        None  # stages of the backbone, from the coarsest
    )
    new_head: bool = False  # start the class layers anew, whatever the weights know


class FCOSConfig(TorchvisionConfig):
    name: Literal["fcos"]
    backbone: str = "resnet50"
    channels: Count = 256
    head_depth: Count = 4
    norm: Literal["batch", "frozen"] | None = None  # of the backbone


class RetinaNetConfig(TorchvisionConfig):
    name: Literal["retinanet"]
    backbone: str = "resnet50"
    version: Literal[1, 2] = 1
    channels: Count = 256
    norm: Literal["batch", "frozen"] | None = None  # of the backbone


class FasterRCNNConfig(TorchvisionConfig):
    """mask_rcnn is the same, from Mask R-CNN's checkpoints and without the masks."""

    name: Literal["faster_rcnn", "mask_rcnn"]
    backbone: str = "resnet50"
    version: Literal[1, 2] = 1
    channels: Count = 256
    norm: Literal["batch", "frozen"] | None = None  # of the backbone


class SSDConfig(TorchvisionConfig):
    name: Literal["ssd300", "ssdlite320"]


class YOLOConfig(Section):
    name: Literal["yolov4", "yolov7", "yolov7_tiny"]
    width: Positive = 1.0  # multiple of the original's channels
    depth: Positive = 1.0  # likewise of its blocks
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class YOLOv5Config(Section):
    name: Literal["yolov5"]
    size: Literal["n", "s", "m", "l", "x"] = "s"
    width: Positive | None = None  # multiple of size l's channels, in place of the size's own
    depth: Positive | None = None  # likewise of its blocks
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class ZooConfig(Section):
    """Detectors of libreyolo, of the extra [zoo]."""

    name: Literal["yolox", "yolov9", "dfine"]
    size: str = "s"
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class AdapterConfig(Section):
    """A detector of the user's own, see docs/adapters.md."""

    name: Literal["adapter"]
    code: str  # its class, as package.module:Class
    arguments: dict[str, Any] = {}
    weights: str = "none"
    new_head: bool = False  # start the class layers anew, whatever the weights know


class ArtifactConfig(Section):
    """A detector that is there already, cuts included: the student of a run, or a trained detector that is to be cut.

    A run counts from what it starts with: a pruning target is a share of what this detector costs, not of what it was
    once cut from.
    """

    name: Literal["artifact"]
    path: str
    class_map: dict[str, str | None] = {}  # the data's name for a class of its own, or null to leave that class out
    new_head: bool = False  # start the class layers anew, for whatever classes the data has

    @model_validator(mode="after")
    def _agree(self) -> "ArtifactConfig":
        if self.class_map and self.new_head:
            raise ValueError("new_head starts all class layers anew, so class_map has nothing to map; leave out one")
        return self


def _named(value: Any) -> Any:
    if not isinstance(value, dict) or "name" in value:
        return value
    if value.get("path") is None:
        return {"name": "dense", **value}
    if others := [key for key in value if key not in ArtifactConfig.model_fields]:
        raise ValueError(
            f"path is a detector that is built already, so {', '.join(others)} cannot be chosen; "
            f"leave them out: {{path: {value['path']}}}"
        )
    return {"name": "artifact", **value}


# new ones, by family
DETECTORS: tuple[type[Section], ...] = (
    DenseConfig,
    FCOSConfig,
    RetinaNetConfig,
    FasterRCNNConfig,
    SSDConfig,
    YOLOv5Config,
    YOLOConfig,
    ZooConfig,
    AdapterConfig,
)
DetectorConfig = Annotated[
    Union[(*DETECTORS, ArtifactConfig)],
    Field(discriminator="name"),
    BeforeValidator(_named),
]
