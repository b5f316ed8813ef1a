"""FCOS (arXiv 1904.01355), by torchvision."""

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FCOS_ResNet50_FPN_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from losses.normalizer import share_normalizer
from students.torchvision_families.backbone import build_fpn_backbone, imagenet_weights, settle_norm, settle_trainable
from students.torchvision_families.one_stage import PyramidDetector
from students.torchvision_families.soft_losses import have_scores, objects_of, soft_fcos_losses
from students.torchvision_families.weights import FirstWeights


class Head(FCOSHead):
    """torchvision's, with losses that count the objects of all ranks, and soft ones for objects with scores."""

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        if have_scores(targets):
            losses = soft_fcos_losses(self, objects_of(targets, matched_idxs), head_outputs, anchors)
        else:
            losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        return share_normalizer(losses, sum(int((match >= 0).sum()) for match in matched_idxs))


class FCOSDetector(PyramidDetector):
    """torchvision's FCOS: one box a location, and how central the location lies in it.

    Args:
        class_names: the classes, in label order.
        backbone: a torchvision ResNet.
        weights: see `FirstWeights`.
        channels: width of the pyramid and the head; a multiple of 32, the head's groups.
        head_depth: convolutions in each of the head's two towers.
        norm: of the backbone, `batch` or `frozen`; torchvision's choice, frozen where there are weights, if None.
        trainable_layers: the backbone's stages that are trained, 0 to 5, from the coarsest; torchvision's choice, 3
            where there are weights, else all, if None.
        new_head: start the class layers anew, whatever the weights know.
        head_classes: see `FirstWeights`.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    anchors = 1

    def __init__(
        self,
        class_names: list[str],
        backbone: str = "resnet50",
        weights: str = "none",
        channels: int = 256,
        head_depth: int = 4,
        norm: str | None = None,
        trainable_layers: int | None = None,
        new_head: bool = False,
        head_classes: int | None = None,
    ):
        if channels % 32:
            raise ValueError(f"channels: {channels} is no multiple of 32, the number of groups in FCOS' head")
        published = (backbone, channels, head_depth) == ("resnet50", 256, 4)
        coco = FCOS_ResNet50_FPN_Weights.COCO_V1 if published else None
        first = FirstWeights(weights, coco, imagenet_weights(backbone), class_names, new_head, head_classes)
        norm = settle_norm(norm, 1, first.trained)
        trainable_layers = settle_trainable(trainable_layers, first.trained, most=5)
        body = build_fpn_backbone(
            backbone, first, channels, norm, trainable_layers, [2, 3, 4], lambda _: LastLevelP6P7(channels, channels)
        )
        sizes = tuple((stride,) for stride in self.strides)
        model = FCOS(
            body,
            first.head_classes,
            anchor_generator=AnchorGenerator(sizes, ((1.0,),) * len(sizes)),
            head=Head(channels, 1, first.head_classes, head_depth),
        )
        super().__init__(class_names, model, first, ("head.classification_head.cls_logits.",))
        self.settled = {"norm": norm, "trainable_layers": trainable_layers, "head_classes": first.head_classes}

    def run_head(self, features):
        classes, boxes = self.model.head.classification_head, self.model.head.regression_head
        logits = tuple(classes.cls_logits(classes.conv(level)) for level in features)
        towers = [boxes.conv(level) for level in features]
        distances = tuple(nn.functional.relu(boxes.bbox_reg(tower)) for tower in towers)
        return logits, distances, tuple(boxes.bbox_ctrness(tower) for tower in towers)

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode(encoded, anchors)

    def compute_loss(self, targets, predictions, anchors, levels):
        return self.model.compute_loss(targets, predictions, anchors, levels)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        head = self.model.head
        return (head.classification_head.cls_logits, head.regression_head.bbox_reg, head.regression_head.bbox_ctrness)
