"""Backbones with a feature pyramid, as torchvision builds them, in any width."""

from collections.abc import Callable

import torchvision
from torch import nn
from torchvision.models import WeightsEnum
from torchvision.models.detection.backbone_utils import BackboneWithFPN, mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

from students.torchvision_families.weights import FirstWeights

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
MOBILENET = "mobilenet_v3_large"
MOBILENET_320 = f"{MOBILENET}_320"  # the same network, in a detector made for images of 320 pixels
NORMS = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


def imagenet_weights(backbone: str) -> WeightsEnum:
    """The ImageNet weights that torchvision's detectors start from.

    Raises:
        ValueError: no such backbone.
    """
    if backbone not in (*RESNETS, MOBILENET):
        raise ValueError(
            f"backbone: {backbone!r} is none of torchvision's: {', '.join((*RESNETS, MOBILENET))}; faster_rcnn also "
            f"takes {MOBILENET_320}"
        )
    return torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]


def settle_norm(norm: str | None, version: int, trained: bool) -> str:
    """torchvision's own norm of the backbone, where none is chosen: frozen where it is trained, but in version 2.

    Raises:
        ValueError: another norm.
    """
    norm = norm or ("frozen" if trained and version == 1 else "batch")
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r} is not allowed; choose {', '.join(NORMS)}")
    return norm


def settle_trainable(trainable_layers: int | None, trained: bool, most: int, default: int = 3) -> int:
    """How many of the backbone's stages torchvision trains, where that is not chosen: all that there are, `most`, where
    it has no first weights.

    Raises:
        ValueError: more stages than there are.
    """
    if trainable_layers is None:
        return default if trained else most
    if not 0 <= trainable_layers <= most:
        raise ValueError(f"trainable_layers: {trainable_layers} is not allowed; choose 0 to {most}")
    return trainable_layers


def build_fpn_backbone(
    name: str,
    first: FirstWeights,
    channels: int,
    norm: str,
    trainable_layers: int,
    returned_layers: list[int] | None = None,
    extra_blocks: Callable[[int], ExtraFPNBlock] = lambda _: LastLevelMaxPool(),
    fpn_norm: Callable[[int], nn.Module] | None = None,
) -> BackboneWithFPN:
    """A ResNet or MobileNet and a pyramid on top.

    Args:
        name: one of `RESNETS`, or `mobilenet_v3_large`.
        first: fills it, if it has a classifier's tensors.
        channels: width of the pyramid; torchvision's own have 256.
        norm: of the backbone, a key of `NORMS`.
        trainable_layers: stages that are trained, counted from the coarsest.
        returned_layers: the ResNet's stages that the pyramid stands on; all four if None.
        extra_blocks: makes the levels beyond, given the channels of the backbone's coarsest map.
        fpn_norm: of the pyramid.
    """
    settings = {"backbone_name": name, "weights": None, "norm_layer": NORMS[norm], "trainable_layers": trainable_layers}
    if name == MOBILENET:
        backbone = mobilenet_backbone(fpn=True, **settings)
        first.load_backbone(backbone.body, prefix="features.")
    else:
        backbone = resnet_fpn_backbone(returned_layers=returned_layers, **settings)
        first.load_backbone(backbone.body)
    widths = [block[0].in_channels for block in backbone.fpn.inner_blocks]
    # torchvision's builders have one width and no norm
    backbone.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks(widths[-1]), fpn_norm)
    backbone.out_channels = channels
    return backbone


def pyramid_channels(fpn: FeaturePyramidNetwork) -> tuple[int, ...]:
    """Channels of each level that a pyramid gives, read from the live weights."""
    widths = [block[0].out_channels for block in fpn.layer_blocks]
    extra = [layer.out_channels for layer in fpn.extra_blocks.children()]
    return (*widths, *(extra or widths[-1:]))  # the last level is pooled where no convolution makes it
