"""YOLOX (arXiv 2107.08430), by libreyolo."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.normalizer import average_across_ranks
from losses.precision import at_least_float32
from students.adapter import Adapter
from students.assignment import Objects, pad_targets
from students.locations import flatten_levels, grid_locations, map_shapes
from students.yolo.detector import YOLOOutput
from students.yolo.head import STRIDES, joint_logits
from students.zoo.libreyolo import import_family, require_size

BOX_WEIGHT = 5.0  # as in libreyolo
LARGEST = 8.0  # log of a box's side in strides; a fresh network must not overflow


class YOLOXDetector(Adapter):
    """One box a location without anchors, its objectness and its classes; learns by SimOTA, libreyolo's.

    Args:
        class_names: the classes, in label order.
        size: n, t, s, m, l or x.
        weights: `none`, or the path of a file with the authors' names, libreyolo's own files among them.
        new_head: start the class layers anew, whatever the weights know.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    learns = scores_locations = True
    anchors = 1

    def __init__(self, class_names: list[str], size: str = "s", weights: str = "none", new_head: bool = False):
        library = import_family("yolox.nn")
        require_size(size, library.LibreYOLOXModel.CONFIGS)
        network = library.LibreYOLOXModel(size, len(class_names))
        network.init_weights()
        super().__init__(class_names, network, weights, new_head, std=(1 / 255,) * 3, bgr=True)

    def forward(self, images: Tensor) -> YOLOOutput:
        features, head = self.network.backbone(self.prepare(images)), self.network.head
        classes, objectness, distances = [], [], []
        for level, x in enumerate(map(lambda stem, x: stem(x), head.stems, features)):
            classes.append(head.cls_preds[level](head.cls_convs[level](x)))
            tower = head.reg_convs[level](x)
            objectness.append(head.obj_preds[level](tower))
            distances.append(read_boxes(head.reg_preds[level](tower)))
        joint = tuple(map(joint_logits, classes, objectness))
        return YOLOOutput(features, joint, tuple(distances), (), tuple(classes), tuple(objectness))

    def loss(self, output: YOLOOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`classification`, `objectness` and `box`, libreyolo's; where targets have `scores`, `soft_losses` in their
        place."""
        boxes, head = self.dense_boxes(output), self.network.head
        locations, strides = grid_locations(map_shapes(output.class_logits), STRIDES, boxes.device)
        corners = (locations / strides[:, None] - 0.5).T[:, None]  # (2, 1, N): x and y of each cell
        objects = pad_targets(targets, boxes.device)
        said = (to_centres(boxes), *(flatten_levels(x).float() for x in (output.objectness, output.conditional_logits)))
        head.num_classes = len(self.class_names)  # it may have been given others
        if any("scores" in target for target in targets):
            return soft_losses(head, said, objects, corners, strides)
        labels = torch.cat((objects.labels[..., None].float(), to_centres(objects.boxes)), dim=-1)
        losses = head.get_losses(
            imgs=None,
            x_shifts=[corners[0]],
            y_shifts=[corners[1]],
            expanded_strides=[strides[None]],
            labels=labels * objects.mask[..., None],
            outputs=torch.cat(said, dim=-1),
            origin_preds=[],
            dtype=torch.float32,
        )
        return {
            "classification": losses["cls_loss"],
            "objectness": losses["obj_loss"],
            "box": losses["iou_loss"],
        }

    def traced(self, output: YOLOOutput, num_boxes: int | None = None) -> list[Tensor]:
        return [*output.features, *output.conditional_logits, *output.objectness, *output.box_distances]

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return (self.network.backbone,)

    @property
    def strides(self) -> tuple[int, ...]:
        return STRIDES

    @property
    def feature_channels(self) -> tuple[int, ...]:
        neck = self.network.backbone
        return tuple(block.conv3.conv.out_channels for block in (neck.C3_p3, neck.C3_n3, neck.C3_n4))

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        head = self.network.head
        return (*head.cls_preds, *head.obj_preds, *head.reg_preds)

    @property
    def class_layers(self) -> tuple[nn.Module, ...]:
        return tuple(self.network.head.cls_preds)


def soft_losses(
    head: nn.Module, said: tuple[Tensor, Tensor, Tensor], objects: Objects, corners: Tensor, strides: Tensor
) -> dict[str, Tensor]:
    """libreyolo's losses of objects with scores, assigned by libreyolo; with scores of 1 they are its own.

    Objectness should be the object's score. Its box and its classes, which are those of an object that is there, count
    as much. All are divided by the number of assigned cells, averaged across ranks, at least 1.

    Args:
        head: libreyolo's, for its assignment.
        said: boxes (B, N, 4) as centres and sides in pixels, objectness (B, N, 1) and classes (B, N, K).
        objects: of the batch.
        corners: (2, 1, N) x and y of each cell, in strides.
        strides: (N,) pixels.
    """
    boxes, objectness, classes = said
    target = torch.zeros_like(objectness[..., 0])
    box, classification = boxes.sum() * 0, classes.sum() * 0  # in the graph where there are no objects, too
    number = target.new_zeros(())
    for image, there in enumerate(objects.mask & (objects.scores > 0)):
        if not there.any():
            continue
        wanted, labels, scores = (x[image, there] for x in (to_centres(objects.boxes), objects.labels, objects.scores))
        labels, assigned, overlap, index, _ = head.get_assignments(
            image, len(labels), wanted, labels.float(), boxes[image], strides[None], *corners, classes, objectness
        )
        weight, quality = scores[index], F.one_hot(labels.long(), classes.shape[-1]) * overlap[:, None]
        target[image, assigned] = weight
        box = box + (weight * head.iou_loss(boxes[image, assigned], wanted[index])).sum()
        entropy = F.binary_cross_entropy_with_logits(classes[image, assigned], quality, reduction="none")
        classification = classification + (weight[:, None] * entropy).sum()
        number += assigned.sum()
    number = average_across_ranks(number).clamp(min=1.0)
    entropy = F.binary_cross_entropy_with_logits(objectness[..., 0], target, reduction="sum")
    return {
        "classification": classification / number,
        "objectness": entropy / number,
        "box": BOX_WEIGHT * box / number,
    }


def read_boxes(outputs: Tensor) -> Tensor:
    """Distances (B, 4, H, W) in strides from a cell's centre, from what is said of a box: where its centre lies from
    the cell's corner, and the logs of its sides, in strides."""
    values = at_least_float32(outputs)
    shift, half = values[:, :2] - 0.5, values[:, 2:].clamp(max=LARGEST).exp() / 2
    return torch.cat((half - shift, half + shift), dim=1)


def to_centres(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy as their centres and sides."""
    return torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), dim=-1)
