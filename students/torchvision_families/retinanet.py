"""RetinaNet (arXiv 1708.02002), by torchvision."""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    RetinaNet,
    RetinaNet_ResNet50_FPN_V2_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from students.torchvision_families.backbone import build_fpn_backbone, imagenet_weights, settle_norm, settle_trainable
from students.torchvision_families.one_stage import PyramidDetector
from students.torchvision_families.soft_losses import have_scores, objects_of, soft_retinanet_losses
from students.torchvision_families.weights import FirstWeights

COCO = {1: RetinaNet_ResNet50_FPN_Weights.COCO_V1, 2: RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1}


class Head(RetinaNetHead):
    """torchvision's, with soft losses for objects with scores."""

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        if not have_scores(targets):
            return super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        counted = torch.stack(matched_idxs) != self.classification_head.BETWEEN_THRESHOLDS
        return soft_retinanet_losses(self, objects_of(targets, matched_idxs), counted, head_outputs, anchors)


class RetinaNetDetector(PyramidDetector):
    """torchvision's RetinaNet: nine anchors a location.

    Args:
        class_names: the classes, in label order.
        backbone: a torchvision ResNet.
        weights: see `FirstWeights`.
        version: 1, or torchvision's improved 2: group norms in the head, GIoU, P6 from the backbone.
        channels: width of the pyramid and the head; for version 2 a multiple of 32, the head's groups.
        norm: of the backbone, `batch` or `frozen`; torchvision's choice, frozen in version 1 where there are weights,
            if None.
        trainable_layers: see `FCOSDetector`, and so the last two.
        new_head: start the class layers anew, whatever the weights know.
        head_classes: see `FirstWeights`.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    anchors = 9

    def __init__(
        self,
        class_names: list[str],
        backbone: str = "resnet50",
        weights: str = "none",
        version: int = 1,
        channels: int = 256,
        norm: str | None = None,
        trainable_layers: int | None = None,
        new_head: bool = False,
        head_classes: int | None = None,
    ):
        if version not in COCO:
            raise ValueError(f"version: {version} does not exist; choose 1 or 2")
        if version == 2 and channels % 32:
            raise ValueError(f"channels: {channels} is no multiple of 32, the number of groups in version 2's head")
        coco = COCO[version] if (backbone, channels) == ("resnet50", 256) else None
        first = FirstWeights(weights, coco, imagenet_weights(backbone), class_names, new_head, head_classes)
        norm = settle_norm(norm, version, first.trained)
        trainable_layers = settle_trainable(trainable_layers, first.trained, most=5)
        body = build_fpn_backbone(
            backbone,
            first,
            channels,
            norm,
            trainable_layers,
            [2, 3, 4],
            lambda width: LastLevelP6P7(width if version == 2 else channels, channels),
        )
        norm_layer = partial(nn.GroupNorm, 32) if version == 2 else None
        head = Head(channels, self.anchors, first.head_classes, norm_layer=norm_layer)
        if version == 2:
            head.regression_head._loss_type = "giou"
        model = RetinaNet(body, first.head_classes, head=head)
        super().__init__(class_names, model, first, ("head.classification_head.cls_logits.",))
        self.settled = {"norm": norm, "trainable_layers": trainable_layers, "head_classes": first.head_classes}

    def run_head(self, features):
        classes, boxes = self.model.head.classification_head, self.model.head.regression_head
        logits = tuple(classes.cls_logits(classes.conv(level)) for level in features)
        return logits, tuple(boxes.bbox_reg(boxes.conv(level)) for level in features), ()

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode_single(encoded, anchors)

    def compute_loss(self, targets, predictions, anchors, levels):
        return self.model.compute_loss(targets, predictions, anchors)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.model.head.classification_head.cls_logits, self.model.head.regression_head.bbox_reg)
