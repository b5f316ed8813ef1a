"""D-FINE (arXiv 2410.13842), by libreyolo; it teaches."""

import torch
from torch import Tensor, nn

from students.adapter import Adapter, DetectedOutput
from students.detector import Limits
from students.zoo.libreyolo import import_family, require_size

QUERIES = 300
# made anew for each size of image, and what only helps training
UNREAD = ("decoder.anchors", "decoder.valid_mask", "decoder.denoising_class_embed.", "encoder.pos_embed")


class DFINEDetector(Adapter):
    """A transformer that refines the distributions of 300 queries' boxes; its pyramid is that of its encoder.

    Args:
        class_names: the classes, in label order.
        size: n (levels P4 and P5), s, m, l or x.
        weights: the path of a file with libreyolo's names, which are the authors'; `none` for random ones.
        new_head: start the class layers anew, whatever the weights know.

    Raises:
        ValueError: settings that cannot be met, each named.
    """

    def __init__(self, class_names: list[str], size: str = "s", weights: str = "none", new_head: bool = False):
        library = import_family("dfine.nn")
        require_size(size, library.SIZE_CONFIGS)
        # without a size of its own, it makes its grids for each image
        network = library.LibreDFINEModel(size, len(class_names), eval_spatial_size=None)
        super().__init__(class_names, network, weights, new_head, unread=UNREAD)
        self.network.eval()

    def train(self, mode: bool = True) -> "DFINEDetector":
        """Stays as it is: in training, the network returns something else."""
        return super().train(False)

    def forward(self, images: Tensor) -> DetectedOutput:
        features = self.network.encoder(self.network.backbone(self.prepare(images)))
        decoder = self.network.decoder
        decoder.num_queries = min(QUERIES, sum(level.shape[-2] * level.shape[-1] for level in features))
        found = decoder(features)
        height, width = images.shape[-2:]
        centres, sides = found["pred_boxes"].float().split(2, dim=-1)
        boxes = torch.cat((centres - sides / 2, centres + sides / 2), dim=-1)
        pixels = boxes * boxes.new_tensor([width, height, width, height])
        return DetectedOutput(tuple(features), (pixels,), (found["pred_logits"].float().sigmoid(),))

    @property
    def limits(self) -> Limits:
        return Limits(iou_threshold=1.0)  # queries do not repeat each other, so nothing is suppressed

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.network.encoder.feat_strides)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return (self.network.encoder.hidden_dim,) * len(self.strides)

    @property
    def class_layers(self) -> tuple[nn.Module, ...]:
        return (self.network.decoder.enc_score_head, *self.network.decoder.dec_score_head)
