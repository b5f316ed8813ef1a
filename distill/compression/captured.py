"""A detector whose forward pass is a graph of operators, which can be looked at and changed."""

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from students import DenseOutput, Detections, Detector


class CapturedDetector(Detector):
    """A detector that runs by a graph of its own forward pass, and is the same detector in all else.

    The graph computes on the detector's own tensors, so that training one trains the other. Batch norms are as in eval
    mode, their statistics fixed. Any number of images, all of one size.

    Args:
        detector: any whose forward pass lets itself be traced; in eval mode.
        image_size: (height, width) of all images, pixels.

    Attributes:
        graph: of ATen operators, with the tensors' names as they are here; `compile` makes it what runs.
    """

    def __init__(self, detector: Detector, image_size: tuple[int, int]):
        super().__init__()
        self.detector = detector
        self.image_size = tuple(image_size)
        for name in ("class_names", "recipe", "plans", "info", "anchors", "box_bins", "unknown", "notes"):
            setattr(self, name, getattr(detector, name))
        device = next(detector.parameters()).device
        images = torch.rand(2, 3, *image_size, device=device)
        program = torch.export.export(_Root(detector).eval(), (images,), dynamic_shapes=({0: Dim("batch")},))
        module = program.module()
        self._output = program.call_spec.out_spec
        self.graph = _plain(module.graph)
        for node in self.graph.find_nodes(op="get_attr"):
            if not node.target.startswith("detector."):  # a constant that the tracer met
                self.register_buffer(node.target, module.get_buffer(node.target).clone(), persistent=False)
        self.compile()

    def compile(self) -> None:
        """Makes the graph, as it is now, what runs."""
        self.graph.eliminate_dead_code(_has_effect)
        self.graph.lint()
        self._run: Callable[[CapturedDetector, Tensor], tuple[Tensor, ...]] = _to_function(self.graph)

    def forward(self, images: Tensor) -> DenseOutput:
        """See `Detector.forward`.

        Raises:
            ValueError: images of another size than the graph was made for.
        """
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(f"images: found {tuple(images.shape[-2:])}; this graph is for {self.image_size}")
        return pytree.tree_unflatten(list(self._run(self, images)), self._output)

    def train(self, mode: bool = True) -> "CapturedDetector":
        super().train(mode)
        self.detector.eval()  # or what runs parts of it by itself would move the statistics that the graph counts on
        return self

    def loss(self, output: DenseOutput, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.detector.loss(output, targets)

    def candidates(self, output: DenseOutput) -> tuple[Tensor, Tensor]:
        return self.detector.candidates(output)

    def decode(self, output: DenseOutput, image_sizes: list[tuple[int, int]]) -> list[Detections]:
        return self.detector.decode(output, image_sizes)

    @property
    def limits(self):
        return self.detector.limits

    @property
    def strides(self):
        return self.detector.strides

    @property
    def feature_channels(self):
        return self.detector.feature_channels

    @property
    def output_layers(self):
        return self.detector.output_layers

    @property
    def normalization(self):
        return self.detector.normalization


class _Root(torch.nn.Module):
    """Gives the detector's tensors the names that they have in a `CapturedDetector`."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor):
        return self.detector(images)


def _plain(graph: fx.Graph) -> fx.Graph:
    """A copy that takes the images and gives a flat tuple, without the tracer's checks."""
    plain = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            flat = pytree.tree_leaves(node.args[0])
            plain.output(tuple(nodes[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in flat))
        elif node.op != "call_module":  # the checks
            nodes[node] = plain.node_copy(node, nodes.__getitem__)
    return plain


def _has_effect(node: fx.Node) -> bool:
    """Whether a node counts even where nobody uses what it gives: the graph has operators that write in place."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or (schema is not None and schema.is_mutable)


def _to_function(graph: fx.Graph) -> Callable:
    code = graph.python_code(root_module="self")
    names = dict(code.globals)
    exec(code.src, names)
    return names["forward"]
