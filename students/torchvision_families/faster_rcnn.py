"""Faster R-CNN (arXiv 1506.01497) with a feature pyramid, by torchvision; and Mask R-CNN without its masks."""

import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum, detection
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import roi_align
from torchvision.ops.poolers import initLevelMapper

from students.assignment import pad_targets
from students.detector import Detections, Limits, replace_rows
from students.nms import clip
from students.torchvision_families.backbone import (
    MOBILENET,
    MOBILENET_320,
    build_fpn_backbone,
    imagenet_weights,
    pyramid_channels,
    settle_norm,
    settle_trainable,
)
from students.torchvision_families.base import TorchvisionDetector, grid_anchors
from students.torchvision_families.proposals import pool_padded, propose_padded
from students.torchvision_families.soft_losses import (
    have_scores,
    match,
    objects_of,
    soft_proposal_losses,
    soft_roi_losses,
)
from students.torchvision_families.weights import FirstWeights
from students.two_stage import RoiOutput, RoiSamples, TwoStageDetector, TwoStageOutput


class FasterRCNNDetector(TorchvisionDetector, TwoStageDetector):
    """torchvision's Faster R-CNN.

    Args:
        class_names: the classes, in label order.
        backbone: a torchvision ResNet, `mobilenet_v3_large`, or `mobilenet_v3_large_320`, with coco weights of its own
            and 150 proposals instead of 1000.
        weights: see `FirstWeights`.
        version: 1, or torchvision's improved 2 for ResNets: batch norms throughout, and convolutions in the ROI head.
        channels: width of the pyramid and the proposal network.
        norm: of the backbone, `batch` or `frozen`; torchvision's choice, frozen in version 1 where there are weights,
            if None.
        trainable_layers: the backbone's stages that are trained, from the coarsest, 0 to 5, 6 of a MobileNet;
            torchvision's choice, 3 where there are weights, else all, if None.
        new_head: start the class layers anew, whatever the weights know.
        head_classes: see `FirstWeights`.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    weights_of = "fasterrcnn"  # torchvision's builders of the checkpoints that fit start so

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
        trunk = MOBILENET if backbone == MOBILENET_320 else backbone
        if version not in (1, 2) or (version == 2 and trunk == MOBILENET):
            raise ValueError(f"version: there is no version {version} with {backbone}; choose 1, or 2 with a ResNet")
        coco = self._coco(backbone, version) if channels == 256 else None
        first = FirstWeights(weights, coco, imagenet_weights(trunk), class_names, new_head, head_classes)
        norm = settle_norm(norm, version, first.trained)
        trainable_layers = settle_trainable(trainable_layers, first.trained, most=6 if trunk == MOBILENET else 5)
        fpn_norm = nn.BatchNorm2d if version == 2 else None
        body = build_fpn_backbone(trunk, first, channels, norm, trainable_layers, fpn_norm=fpn_norm)
        settings = {}
        if trunk == MOBILENET:
            # torchvision puts all sizes on every level here
            sizes = ((32, 64, 128, 256, 512),) * 3
            settings["rpn_anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3)
            settings["rpn_score_thresh"] = 0.05
        if backbone == MOBILENET_320:
            settings |= {"rpn_pre_nms_top_n_test": 150, "rpn_post_nms_top_n_test": 150}
        if version == 2:
            settings["rpn_head"] = RPNHead(channels, 3, conv_depth=2)
            settings["box_head"] = FastRCNNConvFCHead(
                (channels, 7, 7), [256, 256, 256, 256], [1024], norm_layer=nn.BatchNorm2d
            )
        model = FasterRCNN(body, first.head_classes, **settings)
        super().__init__(class_names, model, first, ("roi_heads.box_predictor.",), unused=("roi_heads.mask_",))
        # set here, since torchvision would take them from the first image that comes
        pool = model.roi_heads.box_roi_pool
        pool.scales = [1 / stride for stride in self.strides[:-1]]
        levels = [int(math.log2(stride)) for stride in (self.strides[0], self.strides[-2])]
        pool.map_levels = initLevelMapper(
            *levels, canonical_scale=pool.canonical_scale, canonical_level=pool.canonical_level
        )
        self.settled = {"norm": norm, "trainable_layers": trainable_layers, "head_classes": first.head_classes}

    @classmethod
    def _coco(cls, backbone: str, version: int) -> WeightsEnum | None:
        builder = f"{cls.weights_of}_{backbone}_fpn{'_v2' if version == 2 else ''}"
        there = torchvision.models.list_models(module=detection)
        return torchvision.models.get_model_weights(builder)["COCO_V1"] if builder in there else None

    def forward(self, images: Tensor) -> TwoStageOutput:
        features = self.pyramid(images)
        objectness, box_deltas = self.model.rpn.head(list(features))
        anchor_boxes = grid_anchors(self.model.rpn.anchor_generator, features, images.shape[-2:])
        return TwoStageOutput(features, tuple(objectness), tuple(box_deltas), anchor_boxes)

    def loss(self, output: TwoStageOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """torchvision's own losses of proposals and ROI head; where targets have `scores`, those of `soft_losses` in
        their place.

        Anchors and proposals are sampled at random. Proposals are clipped to the pyramid's extent, which is the image's
        where 32 divides its sides.
        """
        targets = self.to_head_targets(targets)
        size = self._image_size(output.features)
        objectness_loss, proposal_loss = self._proposal_losses(output, targets)
        proposals = self.propose(output, [size] * len(targets))
        boxes, numbers, labels, wanted = self.model.roi_heads.select_training_samples(proposals, targets)
        said = self._run_roi_head(output.features, boxes)
        if have_scores(targets):
            of_objects = pad_targets(targets, said[0].device).scores
            scores = torch.cat([row[number] for row, number in zip(of_objects, numbers)])
            class_loss, box_loss = soft_roi_losses(*said, torch.cat(labels), torch.cat(wanted), scores)
        else:
            class_loss, box_loss = fastrcnn_loss(*said, labels, wanted)
        return {
            "loss_classifier": class_loss,
            "loss_box_reg": box_loss,
            "loss_objectness": objectness_loss,
            "loss_rpn_box_reg": proposal_loss,
        }

    @torch.no_grad()
    def decode(self, output: TwoStageOutput, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        """torchvision's own post-processing, with its thresholds; see `Detector.decode`."""
        proposals = self.propose(output, image_sizes)
        if not sum(map(len, proposals)):  # torchvision cannot decode nothing
            empty = {"boxes": proposals[0], "scores": proposals[0][:, 0], "labels": proposals[0][:, 0].long()}
            return self.to_detections([empty] * len(image_sizes))
        logits, deltas = self._run_roi_head(output.features, proposals)
        found = self.model.roi_heads.postprocess_detections(logits, deltas, proposals, image_sizes)
        return self.to_detections([dict(zip(("boxes", "scores", "labels"), image)) for image in zip(*found)])

    def candidates(self, output: TwoStageOutput, image_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """See `TwoStageDetector.candidates`."""
        size, heads = image_size or self._image_size(output.features), self.model.roi_heads
        proposals, found = propose_padded(self.model.rpn, output, size)
        pooled = pool_padded(heads.box_roi_pool, output.features[:-1], proposals)
        logits, deltas = heads.box_predictor(heads.box_head(pooled.to(output.features[0].dtype)))
        rows = proposals.flatten(0, 1)
        boxes = heads.box_coder.decode_single(deltas.float(), rows).unflatten(1, (-1, 4))
        boxes = clip(boxes.index_select(1, self.class_channels), size)
        scores = logits.float().softmax(dim=1).index_select(1, self.class_channels)
        large = (boxes[..., 2:] - boxes[..., :2] >= 0.01).all(dim=-1)  # as torchvision's post-processing asks
        scores = scores * (large & found.flatten()[:, None])
        return boxes.unflatten(0, found.shape), scores.unflatten(0, found.shape)

    @property
    def limits(self) -> Limits:
        """torchvision's own, but that no more than four classes of each proposal on average enter the NMS."""
        heads = self.model.roi_heads
        most = 4 * self.model.rpn._post_nms_top_n["testing"]
        return Limits(heads.score_thresh, heads.nms_thresh, most, heads.detections_per_img)

    @torch.no_grad()
    def propose(self, output: TwoStageOutput, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        rpn, batch = self.model.rpn, len(image_sizes)
        objectness, deltas = self._proposal_outputs(output)
        boxes = rpn.box_coder.decode(deltas, [torch.cat(output.anchor_boxes)] * batch).view(batch, -1, 4)
        counts = [len(level) for level in output.anchor_boxes]
        return rpn.filter_proposals(boxes, objectness, image_sizes, counts)[0]

    @torch.no_grad()
    def sample(self, proposals: Sequence[Tensor], targets: list[dict[str, Tensor]]) -> RoiSamples:
        heads = self.model.roi_heads
        boxes, _, labels, deltas = heads.select_training_samples(list(proposals), self.to_head_targets(targets))
        labels, deltas = self.to_labels(torch.cat(labels)), torch.cat(deltas)
        # on an image without objects they are infinite
        deltas[labels == len(self.class_channels)] = 0
        return RoiSamples(boxes, labels, deltas)

    def roi(self, features: tuple[Tensor, ...], boxes: Sequence[Tensor]) -> RoiOutput:
        logits, deltas = self._run_roi_head(features, boxes)
        background = torch.zeros_like(self.class_channels[:1])
        by_class = deltas.unflatten(1, (-1, 4)).index_select(1, self.class_channels)
        return RoiOutput(logits.index_select(1, torch.cat((self.class_channels, background))), by_class.flatten(1))

    def traced(self, output: TwoStageOutput, num_boxes: int | None = None) -> list[Tensor]:
        """With the ROI head on `num_boxes` boxes of an image; as many as are proposed at most in evaluation if None.

        The boxes are spread evenly over the levels that the head looks at, so that none of it depends on the data.
        """
        heads, rpn = self.model.roi_heads, self.model.rpn
        if num_boxes is None:
            candidates = sum(min(len(level), rpn._pre_nms_top_n["testing"]) for level in output.anchor_boxes)
            num_boxes = min(candidates, rpn._post_nms_top_n["testing"])
        levels, size = output.features[:-1], heads.box_roi_pool.output_size
        total = len(levels[0]) * num_boxes
        pooled = []
        for number, (level, stride) in enumerate(zip(levels, self.strides)):
            here = len(range(number, total, len(levels)))
            boxes = level.new_tensor([0.0, 0, 0, stride, stride]).expand(here, 5)  # on the first image
            pooled.append(roi_align(level, boxes, size, 1 / stride, 2))
        return [
            *output.features,
            *output.objectness,
            *output.box_deltas,
            *heads.box_predictor(heads.box_head(torch.cat(pooled))),
        ]

    @property
    def head_classes(self) -> int:
        return self.model.roi_heads.box_predictor.cls_score.out_features

    def widen_head(self, classes: int) -> None:
        predictor, old = self.model.roi_heads.box_predictor, self.head_classes
        replace_rows(predictor.cls_score, old, classes, range(old), range(old))
        replace_rows(predictor.bbox_pred, old, classes, range(old), range(old), columns=4, empty=0.0)

    @property
    def strides(self) -> tuple[int, ...]:
        if len(self.model.rpn.anchor_generator.sizes) == 3:  # both maps of a MobileNet are as coarse
            return (32, 32, 64)
        return (4, 8, 16, 32, 64)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return pyramid_channels(self.model.backbone.fpn)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        proposals, predictor = self.model.rpn.head, self.model.roi_heads.box_predictor
        return (proposals.cls_logits, proposals.bbox_pred, predictor.cls_score, predictor.bbox_pred)

    def _proposal_losses(self, output: TwoStageOutput, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Of objectness and boxes, on anchors sampled at random."""
        rpn, anchors = self.model.rpn, [torch.cat(output.anchor_boxes)] * len(targets)
        objectness, deltas = self._proposal_outputs(output)
        if have_scores(targets):
            matched = match(rpn.proposal_matcher, targets, anchors)
            # 1 for an object, 0 for the background, -1 for what is too close to call
            sampled = rpn.fg_bg_sampler([numbers.clamp(max=0) + 1 for numbers in matched])
            positive, negative = (torch.cat(of_images).bool() for of_images in sampled)
            objects = objects_of(targets, matched)
            return soft_proposal_losses(objectness, deltas, objects, positive, negative, anchors, rpn.box_coder)
        labels, boxes = rpn.assign_targets_to_anchors(anchors, targets)
        return rpn.compute_loss(objectness, deltas, labels, rpn.box_coder.encode(boxes, anchors))

    def _proposal_outputs(self, output: TwoStageOutput) -> tuple[Tensor, Tensor]:
        """Objectness (B*N, 1) and deltas (B*N, 4) of all anchors, float32."""
        objectness, deltas = ([level.float() for level in levels] for levels in (output.objectness, output.box_deltas))
        return concat_box_prediction_layers(objectness, deltas)

    def _run_roi_head(self, features: tuple[Tensor, ...], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (P, C) and deltas (P, C*4) of the head's own classes, float32."""
        heads = self.model.roi_heads
        maps = {str(number): level.float() for number, level in enumerate(features[:-1])}
        pooled = heads.box_roi_pool(maps, list(boxes), [])
        logits, deltas = heads.box_predictor(heads.box_head(pooled.to(features[0].dtype)))
        return logits.float(), deltas.float()

    def _image_size(self, features: tuple[Tensor, ...]) -> tuple[int, int]:
        """Height and width that the pyramid covers, pixels."""
        height, width = features[0].shape[-2:]
        return height * self.strides[0], width * self.strides[0]


class MaskRCNNDetector(FasterRCNNDetector):
    """torchvision's Mask R-CNN (arXiv 1703.06870), of which the boxes are trained and found and the masks left out.

    So it is a Faster R-CNN that starts from Mask R-CNN's checkpoints. Arguments as in `FasterRCNNDetector`; only the
    ResNets have checkpoints.
    """

    weights_of = "maskrcnn"
