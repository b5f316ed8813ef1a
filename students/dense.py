"""The first family: any timm backbone, an FPN or PAN, and an anchor-free dense head."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from losses.detection import giou_loss, quality_focal_loss
from losses.normalizer import average_across_ranks
from students.assignment import assign_task_aligned
from students.backbone import Backbone
from students.dense_head import DenseHead
from students.detector import DenseOutput, Detections, Detector
from students.nms import IOU_THRESHOLD, MAX_CANDIDATES, MAX_DETECTIONS, SCORE_THRESHOLD, select
from students.pyramid import NECKS


class DenseDetector(Detector):
    """A one-stage, anchor-free detector trained with task-aligned assignment (TOOD, arXiv 2108.07755).

    Args:
        class_names: the classes, in label order.
        backbone: a timm model name.
        weights: the backbone's first weights: `none`, `imagenet`, or the path of a .pth or .safetensors file.
        neck: `fpn` or `pan`.
        channels: width of the pyramid and of the head.
        levels: pyramid levels, ascending and without gaps; level n has stride 2^n. Levels above 5 are made by the neck.
        head_depth: 3x3 convolutions in each of the head's two towers.
        box_loss_weight: weight of the GIoU loss against the classification loss.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    anchors = 1

    def __init__(
        self,
        class_names: list[str],
        backbone: str,
        weights: str = "none",
        neck: str = "fpn",
        channels: int = 96,
        levels: tuple[int, ...] = (3, 4, 5),
        head_depth: int = 2,
        box_loss_weight: float = 5.0,
    ):
        super().__init__()
        if not class_names:
            raise ValueError("class_names: the list of classes is empty; a detector needs at least one")
        if not levels:
            raise ValueError("levels: the list is empty; give the pyramid's levels, such as [3, 4, 5]")
        if list(levels) != list(range(levels[0], levels[0] + len(levels))):
            raise ValueError(f"levels: {list(levels)} must ascend without gaps, such as [3, 4, 5]")
        from_backbone = [level for level in levels if level <= 5]
        if not from_backbone:
            raise ValueError(f"levels: {list(levels)} has none that a backbone gives; start at 5 or below")
        self.class_names = list(class_names)
        self.box_loss_weight = box_loss_weight
        self._strides = tuple(2**level for level in levels)
        self.backbone = Backbone(backbone, tuple(2**level for level in from_backbone), weights)
        self.neck = NECKS[neck](self.backbone.channels, channels, num_extra=len(levels) - len(from_backbone))
        self.head = DenseHead(channels, len(class_names), len(levels), head_depth)
        mean, std = self.backbone.normalization
        # buffers, not constants: a saved detector brings along the normalisation that its weights were trained with
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> DenseOutput:
        features = self.neck(self.backbone((images - self.mean) / self.std))
        class_logits, box_distances = self.head(features)
        return DenseOutput(features, class_logits, box_distances)

    def loss(self, output: DenseOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Quality focal loss on all locations (`classification`) and GIoU on the assigned ones (`box`).

        The first is divided by the sum of the assigned qualities over the batch, the second by the number of assigned
        locations; both at least 1 and averaged across ranks. A deviation from the paper, which weights boxes by their
        quality too: that leaves small objects, whose first boxes are poor, without a gradient to better them.
        """
        locations, strides = self._locations(output)
        logits = flatten_levels(output.class_logits).float()
        boxes = to_boxes(flatten_levels(output.box_distances).float(), locations, strides)
        target_boxes, target_labels, target_scores, mask = pad_targets(targets, boxes.device)
        objects, quality = assign_task_aligned(
            logits.detach().sigmoid(), boxes.detach(), locations, strides, target_boxes, target_labels, mask
        )
        if target_boxes.shape[1]:
            quality = quality * target_scores.gather(1, objects)
        assigned = (quality > 0).float()
        total_quality, num_assigned = average_across_ranks(torch.stack((quality.sum(), assigned.sum()))).clamp(min=1.0)

        wanted = torch.zeros_like(logits)
        if target_boxes.shape[1]:
            labels = target_labels.gather(1, objects)
            wanted.scatter_(-1, labels[..., None], quality[..., None])
        classification = quality_focal_loss(logits, wanted) / total_quality

        if target_boxes.shape[1]:
            matched = target_boxes.gather(1, objects[..., None].expand(-1, -1, 4))
            # over all locations, most of weight 0: picking the positives out would make a GPU wait for the CPU
            box = giou_loss(boxes, matched, assigned) / num_assigned
        else:
            box = boxes.sum() * 0.0  # keeps every parameter in the graph, so that ranks without objects stay in step
        return {"classification": classification, "box": self.box_loss_weight * box}

    def candidates(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        """Boxes (B, N, 4) and scores (B, N, K) at all locations; see `Detector.candidates`."""
        locations, strides = self._locations(output)
        boxes = to_boxes(flatten_levels(output.box_distances).float(), locations, strides)
        return boxes, flatten_levels(output.class_logits).float().sigmoid()

    @torch.no_grad()
    def decode(
        self,
        output: DenseOutput,
        image_sizes: list[tuple[int, int]],
        score_threshold: float = SCORE_THRESHOLD,
        iou_threshold: float = IOU_THRESHOLD,
        max_candidates: int = MAX_CANDIDATES,
        max_detections: int = MAX_DETECTIONS,
    ) -> list[Detections]:
        """Class-wise NMS over the best candidates; limits as in `students.nms.select`, see `Detector.decode`."""
        limits = (score_threshold, iou_threshold, max_candidates, max_detections)
        return select(*self.candidates(output), image_sizes, *limits)

    @property
    def strides(self) -> tuple[int, ...]:
        return self._strides

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return self.neck.output_channels

    @property
    def output_layers(self) -> tuple[nn.Module, ...]:
        return (self.head.class_logits, self.head.box_distances)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())

    def _locations(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        shapes = tuple((logits.shape[-2], logits.shape[-1]) for logits in output.class_logits)
        # what is made while a graph is traced belongs to the trace; kept, it would spoil later calls
        locate = grid_locations.__wrapped__ if torch.compiler.is_compiling() else grid_locations
        return locate(shapes, self._strides, output.class_logits[0].device)


@lru_cache(maxsize=16)
def grid_locations(
    shapes: tuple[tuple[int, int], ...], strides: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Centres (N, 2) of all cells, x and y in pixels, and their strides (N,), level after level, row after row."""
    points, steps = [], []
    with torch.inference_mode(False):  # a cached tensor made in inference mode could not be used in training
        for (height, width), stride in zip(shapes, strides):
            y, x = torch.meshgrid(
                torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
            )
            points.append((torch.stack((x, y), dim=-1).reshape(-1, 2) + 0.5) * stride)
            steps.append(torch.full((height * width,), float(stride), device=device))
        return torch.cat(points), torch.cat(steps)


def flatten_levels(levels: tuple[Tensor, ...]) -> Tensor:
    """(B, C, H, W) of each level to one (B, N, C), in the order of `grid_locations`."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)


def to_boxes(distances: Tensor, locations: Tensor, strides: Tensor) -> Tensor:
    """Boxes (B, N, 4) xyxy in pixels, from edge distances (B, N, 4) in strides."""
    pixels = distances * strides[:, None]
    return torch.cat((locations - pixels[..., :2], locations + pixels[..., 2:]), dim=-1)


def pad_targets(targets: list[dict[str, Tensor]], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (B, M, 4), labels (B, M), scores (B, M), 1 where none are given, and a mask (B, M) that is False where an
    image has fewer than M objects."""
    boxes = nn.utils.rnn.pad_sequence([t["boxes"].to(device) for t in targets], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([t["labels"].to(device) for t in targets], batch_first=True)
    given = [t["scores"].to(device) if "scores" in t else torch.ones(len(t["labels"]), device=device) for t in targets]
    scores = nn.utils.rnn.pad_sequence(given, batch_first=True)
    counts = torch.tensor([len(t["labels"]) for t in targets], device=device)
    mask = torch.arange(labels.shape[1], device=device) < counts[:, None]
    return boxes, labels, scores, mask
