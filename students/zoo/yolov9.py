"""YOLOv9 (arXiv 2402.13616), by libreyolo."""

import torch
from torch import Tensor, nn

from students.adapter import Adapter
from students.assignment import pad_targets
from students.detector import DenseOutput
from students.zoo.library import import_family, require_size

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
        """`classification`, `box` and `distribution`, libreyolo's; a teacher's objects count in full."""
        head, first = self.network.head, output.class_logits[0]
        compute = head._get_loss_fn(first.device)
        if (compute.num_classes, compute.device) != (len(self.class_names), first.device):  # it was given others, moved
            head.nc, head._loss_fn = len(self.class_names), None
            compute = head._get_loss_fn(first.device)
        height, width = (side * self.strides[0] for side in first.shape[-2:])
        compute.update_anchors([width, height])
        objects = pad_targets(targets, first.device)
        boxes = objects.boxes / objects.boxes.new_tensor([width, height, width, height])
        said = [torch.cat(level, dim=1).float() for level in zip(output.box_logits, output.class_logits)]
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


def mean_distances(edges: Tensor) -> Tensor:
    """(B, 4, H, W) distances in strides, from the distributions (B, 4*bins, H, W) over them."""
    shares = edges.unflatten(1, (4, -1)).float().softmax(dim=2)
    return torch.einsum("bkchw,c->bkhw", shares, torch.arange(shares.shape[2], device=edges.device, dtype=shares.dtype))
