"""Where a detector is rounded to 8 bits: in training as if, in an exported file for good."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn

from distill.compression.captured import CapturedDetector
from distill.compression.fake_quant import LEVELS, ActivationQuantizer, WeightQuantizer
from students import Detector

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv2d.default}
# what a runtime makes one step of with a convolution: constants a channel, and clipping
AFFINE = {aten.batch_norm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
CLIPS = {
    aten.relu.default, aten.relu_.default, aten.relu6.default, aten.hardtanh.default, aten.hardtanh_.default,
}  # fmt: skip
JOINS = {aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.cat.default}
# what only moves numbers: its output has the same 256 values
MOVES = {
    aten.max_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.slice.Tensor,
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.clone.default,
}  # fmt: skip
PADS = {aten.pad.default, aten.constant_pad_nd.default}  # which runtimes make part of the convolution after them


class QuantizedDetector(CapturedDetector):
    """A detector whose convolutions see inputs and weights of 8 bits, and give outputs of 8 bits.

    Weights are rounded a row, symmetric; a batch norm behind the convolution only scales its rows, so that rounding
    before it is the same as rounding what it is folded into. Activations are rounded a tensor: what convolutions give,
    once normalised and clipped, and what joins them on the way to the next one (static folding: Nagel 2021, arXiv
    2106.08295). Each has its `ActivationQuantizer`, which has to be calibrated first.

    Args:
        detector: see `CapturedDetector`; its tensors are used, not copied.
        image_size: (height, width) of all images, pixels.
        keep: patterns of convolutions that stay in float, such as `head.box_distances`.
        bits: of weights, see `WeightQuantizer`.
    """

    def __init__(self, detector: Detector, image_size: tuple[int, int], keep: Sequence[str] = (), bits: int = 8):
        super().__init__(detector, image_size)
        self.weights = WeightQuantizer(bits)
        self.activations = nn.ModuleDict()
        convolutions = list(self._rounded(keep))
        for node, name in list(self._places(convolutions).items()):
            if name not in self.activations:
                self.activations[name] = ActivationQuantizer()
            _insert_after(self.graph, node, f"activations.{name}")
        rounded: dict[str, fx.Node] = {}
        for node in convolutions:
            weight = node.args[1]
            if weight.target not in rounded:
                with self.graph.inserting_after(weight):
                    rounded[weight.target] = self.graph.call_module("weights", (weight,))
            with self.graph.inserting_before(node):
                node.replace_input_with(weight, rounded[weight.target])
        # a weight that is read in several places is fetched in each; the rounded one must come before all of them
        _move_to_front(self.graph, rounded.values())
        self.compile()

    @property
    def rounded_layers(self) -> list[str]:
        """Names of the convolutions that are not kept in float."""
        return [_layer(node.args[0]) for node in _calls(self.graph, "weights")]

    def _rounded(self, keep: Sequence[str]) -> Iterator[fx.Node]:
        """The convolutions that are not kept in float.

        Raises:
            ValueError: a pattern that fits none.
        """
        unused = set(keep)
        for node in self.graph.nodes:
            if node.target not in CONVOLUTIONS or node.args[1].op != "get_attr":
                continue
            layer = _layer(node.args[1])
            fitting = {pattern for pattern in keep if fnmatchcase(layer, pattern)}
            unused -= fitting
            if not fitting:
                yield node
        if unused:
            raise ValueError(f"keep: {min(unused)!r} fits no convolution of this detector")

    def _places(self, convolutions: list[fx.Node]) -> dict[fx.Node, str]:
        """The tensors to round, each with the name of its quantizer; what only moves numbers has that of its input."""
        moving = _depend_on_images(self.graph)
        ends = {_end(node, moving) for node in convolutions}
        wanted: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            for user in node.users:
                reads = user in convolutions and user.args[0] is node
                passes = user in wanted and user.target in CLIPS | JOINS | MOVES | PADS
                if node in moving and _is_map(node) and (reads or passes):
                    wanted.add(node)
        places: dict[fx.Node, str] = {}
        for node in self.graph.nodes:
            clipped_next = len(node.users) == 1 and next(iter(node.users)).target in CLIPS
            if node in ends or (node in wanted and not clipped_next and node.target not in PADS):
                source = places.get(node.args[0]) if node.target in MOVES else None
                places[node] = source or node.name
        return places


def to_integers(quantized: QuantizedDetector, activations: bool = True) -> CapturedDetector:
    """A copy on the CPU that holds integers and their scales, in operators that exporters know; not to be trained.

    Args:
        quantized: calibrated, but for `activations=False`.
        activations: whether they are rounded, or the weights alone.

    What stands between a convolution and its rounding is folded: the scale of each row takes up the batch norm's, so
    that a weight shared by several batch norms is still kept once.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  its import makes the operators known

    ops = torch.ops.quantized_decomposed
    result = copy.deepcopy(quantized).cpu().eval()
    graph, moving = result.graph, _depend_on_images(result.graph)
    for node in graph.nodes:  # the tracer wrote down where constants were made
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    kept: dict[tuple[str, bytes], str] = {}

    def hold(name: str, value: Tensor) -> fx.Node:
        result.register_buffer(name, value)
        return graph.get_attr(name)

    for number, rounded in enumerate(list(_calls(graph, "weights"))):
        weight = result.get_parameter(rounded.args[0].target)
        integers, scale = result.weights.to_integers(weight)
        for node in list(rounded.users):
            chain = _chain(node, moving)
            factor, shift = _affine(result, chain, len(weight))
            bias = result.get_parameter(node.args[2].target).detach() if len(node.args) > 2 and node.args[2] else 0.0
            signs = torch.where(factor < 0, -1, 1).to(torch.int8)
            key = rounded.args[0].target, bytes(signs.numpy().tobytes())
            name = kept.setdefault(key, f"integers_{number}_{len(kept)}")
            with graph.inserting_before(node):
                if not hasattr(result, name):
                    result.register_buffer(name, integers * signs.view(-1, 1, 1, 1))
                rows = (scale * factor.abs()).clamp(min=1e-12)
                zeros = torch.zeros(len(rows), dtype=torch.int64)
                of = [hold(f"{part}_{node.name}", value) for part, value in (("scale", rows), ("zero", zeros))]
                largest = result.weights.largest
                limits = -largest, largest, torch.int8
                new_weight = graph.call_function(
                    ops.dequantize_per_channel.default, (graph.get_attr(name), *of, 0, *limits)
                )
                new_bias = hold(f"bias_{node.name}", bias * factor + shift)
                call = graph.call_function(node.target, (node.args[0], new_weight, new_bias, *node.args[3:]))
            (chain[-1] if chain else node).replace_all_uses_with(call)
    for node in list(graph.find_nodes(op="call_module")):
        if not node.target.startswith("activations."):
            continue
        if not activations:
            node.replace_all_uses_with(node.args[0])
            continue
        quantizer = result.get_submodule(node.target)
        grid = float(quantizer.scale), int(quantizer.zero_point), 0, LEVELS, torch.uint8
        with graph.inserting_before(node):
            integer = graph.call_function(ops.quantize_per_tensor.default, (node.args[0], *grid))
            node.replace_all_uses_with(graph.call_function(ops.dequantize_per_tensor.default, (integer, *grid)))
    result.compile()
    return result


def _affine(host: CapturedDetector, chain: list[fx.Node], channels: int) -> tuple[Tensor, Tensor]:
    """What a chain of constants and batch norms does to each channel: the factor (C,) and the summand (C,)."""
    probes = torch.stack((torch.zeros(channels), torch.ones(channels)))[..., None, None].double()
    values: dict[fx.Node, Tensor] = {}

    def value(argument):
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(value, argument))
        if not isinstance(argument, fx.Node):
            return argument
        if argument not in values:
            if argument.op == "get_attr":
                owner, _, leaf = argument.target.rpartition(".")
                values[argument] = getattr(host.get_submodule(owner), leaf).detach()
            else:
                values[argument] = argument.target(*value(argument.args), **dict(argument.kwargs))
            if values[argument].is_floating_point():
                values[argument] = values[argument].double()
        return values[argument]

    if not chain:
        return torch.ones(channels), torch.zeros(channels)
    values[chain[0].args[0]] = probes  # chains hang by their first argument
    with torch.no_grad():
        end = value(chain[-1])[..., 0, 0]
    return (end[1] - end[0]).float(), end[0].float()


def _depend_on_images(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are not the same for all images."""
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(argument in moving for argument in node.all_input_nodes):
            moving.add(node)
    return moving


def _chain(node: fx.Node, moving: set[fx.Node]) -> list[fx.Node]:
    """What stands behind a convolution and only scales and moves each of its channels."""
    chain = []
    while len(node.users) == 1:
        (user,) = node.users
        others = [argument for argument in user.all_input_nodes if argument is not node]
        if user.target not in AFFINE or user.args[0] is not node or any(other in moving for other in others):
            break
        chain.append(node := user)
    return chain


def _end(node: fx.Node, moving: set[fx.Node]) -> fx.Node:
    """The last node of the step that a runtime makes of a convolution and what stands behind it."""
    node = [node, *_chain(node, moving)][-1]
    while len(node.users) == 1 and next(iter(node.users)).target in CLIPS:
        (node,) = node.users
    return node


def _is_map(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _layer(weight: fx.Node) -> str:
    return weight.target.removeprefix("detector.").removesuffix(".weight")


def _calls(graph: fx.Graph, target: str) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_module" and node.target == target)


def _insert_after(graph: fx.Graph, node: fx.Node, module: str) -> None:
    with graph.inserting_after(node):
        call = graph.call_module(module, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def _move_to_front(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    first = next(node for node in graph.nodes if node.op == "placeholder")
    for node in nodes:
        weight = node.args[0]
        first.append(weight)
        weight.append(node)
