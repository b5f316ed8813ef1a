"""YOLOv9 (arXiv 2402.13616), by libreyolo."""

from typing import Any

import torch
from torch import Tensor, nn

from losses.normalizer import average_across_ranks
from students.adapter import Adapter
from students.assignment import Objects, pad_targets
from students.detector import DenseOutput
from students.zoo.libreyolo import import_family, require_size

BINS = 16


class YOLOv9Detector(Adapter):
    """One box a location without anchors, each edge as a distribution; learns by task alignment, libreyolo's.

    Args:
        class_names: the classes, in label order.
        size: t, s, m or c.
        weights: `none`, or the path of a file with libreyolo's names.
        new_head: start the class layers anew, whatever the weights know.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    learns = scores_locations = True
    anchors = 1
    box_bins = BINS

    def __init__(self, class_names: list[str], size: str = "s", weights: str = "none", new_head: bool = False):
        library = import_family("yolo9.nn")
        require_size(size, library.YOLO9_CONFIGS)
        network = library.LibreYOLO9Model(size, reg_max=BINS, nb_classes=len(class_names))
        # what only helped training is left out
        super().__init__(class_names, network, weights, new_head, unread=("aux.", "aux_head."))

    def forward(self, images: Tensor) -> DenseOutput:
        features = self.network.neck(*self.network.backbone(self.prepare(images)))
        head = self.network.head
        edges = tuple(tower(x) for tower, x in zip(head.cv2, features))
        classes = tuple(tower(x) for tower, x in zip(head.cv3, features))
        return DenseOutput(tuple(features), classes, tuple(map(mean_distances, edges)), edges)

    def loss(self, output: DenseOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`classification`, `box` and `distribution`, libreyolo's; where targets have `scores`, `soft_losses` in their
        place."""
        head, first = self.network.head, output.class_logits[0]
        compute = head._get_loss_fn(first.device)
        if (compute.num_classes, compute.device) != (len(self.class_names), first.device):  # it was given others, moved
            head.nc, head._loss_fn = len(self.class_names), None
            compute = head._get_loss_fn(first.device)
        height, width = (side * self.strides[0] for side in first.shape[-2:])
        compute.update_anchors([width, height])
        objects = pad_targets(targets, first.device)
        said = [torch.cat(level, dim=1).float() for level in zip(output.box_logits, output.class_logits)]
        if any("scores" in target for target in targets):
            return soft_losses(compute, said, objects)
        boxes = objects.boxes / objects.boxes.new_tensor([width, height, width, height])
        losses = compute(said, torch.cat((objects.labels[..., None].float(), boxes), dim=-1))
        return {
            "classification": losses["cls_loss"],
            "box": losses["box_loss"],
            "distribution": losses["dfl_loss"],
        }

    def traced(self, output: DenseOutput, num_boxes: int | None = None) -> list[Tensor]:
        return [*output.features, *output.class_logits, *output.box_logits]

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return (self.network.backbone, self.network.neck)

    @property
    def strides(self) -> tuple[int, ...]:
        return (8, 16, 32)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return tuple(tower[0].conv.in_channels for tower in self.network.head.cv3)

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return tuple(tower[-1] for tower in (*self.network.head.cv2, *self.network.head.cv3))

    @property
    def class_layers(self) -> tuple[nn.Module, ...]:
        return tuple(tower[-1] for tower in self.network.head.cv3)


def soft_losses(compute: Any, said: list[Tensor], objects: Objects) -> dict[str, Tensor]:
    """libreyolo's losses of objects with scores, assigned by libreyolo; with scores of 1 they are its own.

    A class's probability should be the quality of the box, as assigned, times its object's score; the box counts as
    much. All are divided by the sum of the qualities alone, averaged across ranks, at least 1.

    Args:
        compute: libreyolo's loss, for its assignment and parts.
        said: (B, 4*bins + K, H, W) of each level, edges and classes before softmax and sigmoid.
        objects: of the batch.
    """
    classes, edges, boxes = compute.vec2box(said)
    targets = torch.cat((objects.labels[..., None].float(), objects.boxes), dim=-1)
    found = compute.matcher(targets, (classes.detach(), boxes.detach()), return_indices=True)
    (wanted, wanted_boxes), assigned, index = found[0].split((classes.shape[-1], 4), dim=-1), *found[1:]
    divisor = average_across_ranks(wanted.sum()).clamp(min=1.0)
    wanted = wanted * objects.scores.gather(1, index)[..., None]
    weight, strides = wanted.sum(dim=-1)[assigned], compute.vec2box.scaler[:, None]
    boxes, wanted_boxes, locations = (x / strides for x in (boxes, wanted_boxes, compute.vec2box.anchor_grid))
    box = compute.box_loss(boxes, wanted_boxes, assigned, weight, divisor)
    distribution = compute.dfl_loss(edges, wanted_boxes, locations, assigned, weight, divisor)
    return {
        "classification": compute.cls_weight * compute.cls_loss(classes, wanted, divisor),
        "box": compute.box_weight * box,
        "distribution": compute.dfl_weight * distribution,
    }


def mean_distances(edges: Tensor) -> Tensor:
    """(B, 4, H, W) distances in strides, from the distributions (B, 4*bins, H, W) over them."""
    shares = edges.unflatten(1, (4, -1)).float().softmax(dim=2)
    return torch.einsum("bkchw,c->bkhw", shares, torch.arange(shares.shape[2], device=edges.device, dtype=shares.dtype))
