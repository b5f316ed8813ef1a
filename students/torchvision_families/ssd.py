"""SSD (arXiv 1512.02325) and SSDLite (arXiv 1801.04381, on MobileNetV3, 1905.02244), by torchvision."""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights, VGG16_Weights, mobilenet_v3_large
from torchvision.models.detection import (
    SSD300_VGG16_Weights,
    SSDLite320_MobileNet_V3_Large_Weights,
    ssd300_vgg16,
)
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor, _normal_init

from losses.normalizer import share_normalizer
from students.torchvision_families.backbone import settle_trainable
from students.torchvision_families.one_stage import OneStageDetector
from students.torchvision_families.soft_losses import have_scores, match, objects_of, soft_ssd_losses
from students.torchvision_families.weights import FirstWeights


class SSDDetector(OneStageDetector):
    """A head of its own for every level, with a softmax over the classes and the background.

    torchvision makes all images as large as the network's first ones were, 300 or 320 pixels square; here they are
    taken as they come, and the anchors grow and shrink with them.
    """

    def run_head(self, features):
        classes, boxes = self.model.head.classification_head, self.model.head.regression_head
        logits = tuple(layer(level) for layer, level in zip(classes.module_list, features))
        return logits, tuple(layer(level) for layer, level in zip(boxes.module_list, features)), ()

    def make_anchors(self, features, image_size):
        # the generator reads shapes off the images, and the precision off the features
        images = ImageList(torch.empty(1, 3, *image_size, device="meta"), [image_size])
        generator = self.model.anchor_generator
        boxes = generator(images, [level.detach().float() for level in features])[0]
        counts = generator.num_anchors_per_location()
        return boxes.split([level.shape[2] * level.shape[3] * n for level, n in zip(features, counts)])

    def decode_boxes(self, encoded: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode_single(encoded, anchors)

    def compute_loss(self, targets, predictions, anchors, levels):
        matched = match(self.model.proposal_matcher, targets, anchors)
        if have_scores(targets):
            losses = soft_ssd_losses(self.model, objects_of(targets, matched), predictions, anchors)
        else:
            losses = self.model.compute_loss(targets, predictions, anchors, matched)
        return share_normalizer(losses, sum(int((match >= 0).sum()) for match in matched))

    def postprocess(self, predictions, anchors, image_sizes):
        joined = {name: torch.cat(levels, dim=1) for name, levels in predictions.items()}
        return self.model.postprocess_detections(joined, [torch.cat(anchors)] * len(image_sizes), image_sizes)

    def to_sigmoid(self, logits: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(dim=2)
        return log_p - (-log_p.expm1()).clamp(min=1e-7).log()

    @property
    def head_classes(self) -> int:
        return self.model.head.classification_head.num_columns

    def widen_head(self, classes: int) -> None:
        super().widen_head(classes)
        self.model.head.classification_head.num_columns = classes


class SSD300Detector(SSDDetector):
    """torchvision's SSD300 on VGG-16, for images of at least 268 pixels a side.

    Levels have 4 or 6 anchors a location, so `anchors` is 0: losses between dense heads do not know such.

    Args:
        class_names: the classes, in label order.
        weights: see `FirstWeights`.
        trainable_layers: VGG's stages that are trained, 0 to 5, from the coarsest; torchvision's choice, 4 where there
            are weights, else all, if None.
        new_head: start the class layers anew, whatever the weights know.
        head_classes: see `FirstWeights`.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    def __init__(
        self,
        class_names: list[str],
        weights: str = "none",
        trainable_layers: int | None = None,
        new_head: bool = False,
        head_classes: int | None = None,
    ):
        coco, imagenet = SSD300_VGG16_Weights.COCO_V1, VGG16_Weights.IMAGENET1K_FEATURES
        first = FirstWeights(weights, coco, imagenet, class_names, new_head, head_classes)
        trainable_layers = settle_trainable(trainable_layers, first.trained, most=5, default=4)
        model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=first.head_classes)
        # VGG's own layers, which the extractor has dealt out, without the last pooling
        trunk = nn.Sequential(*model.backbone.features, *model.backbone.extra[0][:-1])
        first.load_backbone(trunk, prefix="features.")
        stages = [0, *(i for i, layer in enumerate(trunk) if isinstance(layer, nn.MaxPool2d)), len(trunk)]
        trunk[: stages[5 - trainable_layers]].requires_grad_(False)
        super().__init__(class_names, model, first, ("head.classification_head.",))
        self.settled = {"trainable_layers": trainable_layers, "head_classes": first.head_classes}

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.model.anchor_generator.steps)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        backbone = self.model.backbone
        return (len(backbone.scale_weight), *(last_convolution(block).out_channels for block in backbone.extra))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        head = self.model.head
        return (*head.classification_head.module_list, *head.regression_head.module_list)


class SSDLite320Detector(SSDDetector):
    """torchvision's SSDLite320 on MobileNetV3-Large.

    Args:
        class_names: the classes, in label order.
        weights: see `FirstWeights`.
        trainable_layers: the MobileNet's stages that are trained, 0 to 6, from the coarsest; all if None.
        new_head: start the class layers anew, whatever the weights know.
        head_classes: see `FirstWeights`.
        reduced_tail: halve the MobileNet's last stage; torchvision's choice, yes but for a classifier's weights, if
            None.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    anchors = 6

    def __init__(
        self,
        class_names: list[str],
        weights: str = "none",
        trainable_layers: int | None = None,
        new_head: bool = False,
        head_classes: int | None = None,
        reduced_tail: bool | None = None,
    ):
        coco, imagenet = SSDLite320_MobileNet_V3_Large_Weights.COCO_V1, MobileNet_V3_Large_Weights.IMAGENET1K_V1
        first = FirstWeights(weights, coco, imagenet, class_names, new_head, head_classes)
        trainable_layers = settle_trainable(trainable_layers, first.trained, most=6, default=6)
        reduced_tail = not first.classifier if reduced_tail is None else reduced_tail
        # as torchvision's builder goes on, which has a whole tail with weights from the hub only
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
        trunk = mobilenet_v3_large(norm_layer=norm, reduced_tail=reduced_tail)
        _normal_init(trunk)
        first.load_backbone(trunk.features, prefix="features.")
        body = _mobilenet_extractor(trunk, trainable_layers, norm)
        generator = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
        widths, anchors = retrieve_out_channels(body, (320, 320)), generator.num_anchors_per_location()
        model = SSD(
            body,
            generator,
            (320, 320),
            first.head_classes,
            head=SSDLiteHead(widths, anchors, first.head_classes, norm),
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            score_thresh=0.001,
            nms_thresh=0.55,
            detections_per_img=300,
            topk_candidates=300,
        )
        super().__init__(class_names, model, first, ("head.classification_head.",))
        self.settled = {
            "trainable_layers": trainable_layers,
            "head_classes": first.head_classes,
            "reduced_tail": reduced_tail,
        }

    @property
    def strides(self) -> tuple[int, ...]:
        return (16, 32, 64, 128, 256, 512)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        backbone = self.model.backbone
        return tuple(last_convolution(block).out_channels for block in (*backbone.features, *backbone.extra))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        head = self.model.head
        return tuple(b[-1] for b in (*head.classification_head.module_list, *head.regression_head.module_list))


def last_convolution(block: nn.Module) -> nn.Conv2d:
    """The convolution whose output is the block's."""
    return [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)][-1]
