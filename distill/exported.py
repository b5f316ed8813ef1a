"""A detector as one file for other runtimes: what its graph holds, how it is written, how it is read back."""

import contextlib
import copy
import importlib.util
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from distill.errors import UserError
from students import Detections, Detector, TwoStageDetector
from students.detector import DenseOutput
from students.nms import select, select_padded

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}
OUTPUTS = ("detections", "boxes", "raw")
MAKER = ("made_by", "distill.export")  # the mark by which a file is known as one of ours
_INFO = "distill.json"  # its place in a .pt2 file


class DeployedDetector(nn.Module):
    """A detector with as much of the decoding as its user wants done inside the graph.

    Args:
        detector: in eval mode.
        outputs: 'detections' for boxes (B, M, 4), scores (B, M) and labels (B, M) after NMS by the detector's own
            limits, padded to M as `students.nms.select_padded` says; 'boxes' for boxes (B, N, 4), of a two-stage
            detector (B, N, K, 4), and scores (B, N, K) of all predictions; 'raw' for class logits (B, A*K, H, W) of
            each level, then box distances (B, A*4, H, W) of each, as in `students.detector.DenseOutput`; 'network' for
            the least with which all of the network runs: 'raw' of dense heads, else 'boxes'.

    Raises:
        UserError: the detector's family has no step between raw outputs and detections, or no such raw outputs.
    """

    def __init__(self, detector: Detector, outputs: str):
        super().__init__()
        if type(detector).candidates is Detector.candidates:
            raise UserError(
                f"{detector.title}: tells its detections alone, so there is nothing that a graph could hold; give "
                f"{type(detector).__name__} a method `candidates`, see students.Detector"
            )
        two_stage = isinstance(detector, TwoStageDetector)
        if outputs == "network":
            outputs = "boxes" if two_stage else "raw"
        if outputs == "raw" and two_stage:
            raise UserError(
                f"{detector.title}: its second stage needs boxes that are decoded already, so it has no raw outputs; "
                "say detections or boxes"
            )
        self.detector = detector.deployed()
        self.outputs = outputs

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs named in `names`, for images (B, 3, H, W) RGB in [0, 1]; boxes are xyxy in their pixels."""
        output, size = self.detector(images), (images.shape[-2], images.shape[-1])
        if self.outputs == "raw":
            return (*output.class_logits, *output.box_distances)
        whole = (size,) if isinstance(self.detector, TwoStageDetector) else ()  # what its proposals are clipped to
        boxes, scores = self.detector.candidates(output, *whole)
        if self.outputs == "boxes":
            return boxes, scores
        return select_padded(boxes, scores, size, self.detector.limits)

    @property
    def names(self) -> tuple[str, ...]:
        """One an output; raw ones have the stride of their level behind them."""
        if self.outputs == "raw":
            return tuple(f"{k}_{s}" for k in ("class_logits", "box_distances") for s in self.detector.strides)
        return ("boxes", "scores", "labels")[: 2 if self.outputs == "boxes" else 3]


class ExportedDetector(nn.Module):
    """An exported file behind the two verbs of a `Detector`: forward and decode.

    Args:
        file: what `distill.export` wrote.
        threads: of ONNX Runtime; as many as PyTorch's otherwise. A .pt2 file runs on PyTorch's own.
        detector: what it was made from; only 'raw' outputs are decoded by it.

    Attributes:
        class_names: the names that labels stand for, in label order.
        device: where it runs; images are brought there and outputs come back to the CPU.
        info: what the file says of itself, `image_size`, `resize`, `outputs` and `batch` (None for any) among it.

    Raises:
        UserError: the file cannot be read, or was made by something else.
    """

    def __init__(self, file: Path, threads: int | None = None, detector: Detector | None = None):
        super().__init__()
        if not file.is_file():
            raise UserError(f"{file}: no such file; make it with python -m distill.export runs/x/student")
        read = _read_onnx if file.suffix == SUFFIXES["onnx"] else _read_pt2
        self._run, self.info, self.device = read(file, threads or torch.get_num_threads())
        if not self.info:
            raise UserError(f"{file}: was not made by distill.export, so its classes and outputs are unknown")
        self.class_names: list[str] = self.info["class_names"]
        self.file = file
        self._decoder = [detector]  # in a list, so that its parameters do not count as the file's

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The file's outputs on the CPU for images (B, 3, H, W); a file of a fixed batch runs as often as needed."""
        images = images.cpu().contiguous()
        batch = self.info["batch"]
        if batch in (None, len(images)):
            return self._run(images)
        filled = torch.cat((images, images.new_zeros(-len(images) % batch, *images.shape[1:])))
        parts = zip(*(self._run(portion) for portion in filled.split(batch)))
        return tuple(torch.cat(part)[: len(images)] for part in parts)

    def decode(self, output: tuple[Tensor, ...], image_sizes: list[tuple[int, int]]) -> list[Detections]:
        """Final detections, as `Detector.decode` gives them."""
        if self.info["outputs"] == "raw":
            if self._decoder[0] is None:
                raise UserError(
                    f"{self.file}: gives raw outputs, which nothing here can decode; export it with --outputs boxes or "
                    "detections"
                )
            levels = len(output) // 2
            return self._decoder[0].decode(DenseOutput((), output[:levels], output[levels:]), image_sizes)
        if self.info["outputs"] == "boxes":
            return select(*output, image_sizes, *self.info.get("limits", ()))
        detections = []
        for boxes, scores, labels, (height, width) in zip(*output, image_sizes):
            found = scores > 0
            limit = boxes.new_tensor([width, height, width, height])
            detections.append(Detections(boxes[found].minimum(limit), scores[found], labels[found]))
        return detections


def trace(
    deployed: DeployedDetector, image_size: tuple[int, int], batch: int = 1, dynamic: tuple[str, ...] = ()
) -> ExportedProgram:
    """The detector as a graph.

    Args:
        deployed: what to trace, on the CPU and in eval mode.
        image_size: (height, width) in pixels; multiples of the coarsest stride where the size is dynamic.
        batch: images in each batch.
        dynamic: what may differ from that in the file's use: 'batch'; 'size', to any multiple of the coarsest stride.

    Raises:
        UserError: the detector does not let itself be traced so.
    """
    shapes: dict[int, Any] = {0: Dim("batch")} if "batch" in dynamic else {}
    if "size" in dynamic:
        stride = max(deployed.detector.strides)
        shapes |= {2: stride * Dim("height"), 3: stride * Dim("width")}
        deployed = _with_fixed_padding(deployed)
    # a traced batch of one would be taken for a one that never changes
    images = torch.rand(max(batch, 2) if "batch" in dynamic else batch, 3, *image_size)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(deployed, (images,), dynamic_shapes=(shapes,) if shapes else None)
    except Exception as error:  # torch.export raises whatever the network's own code and the tracer's parts raise
        least = "boxes" if isinstance(deployed.detector, TwoStageDetector) else "raw"
        way_out = f"leave out --dynamic {' '.join(dynamic)}" if dynamic else f"try --outputs {least}"
        raise UserError(f"{_backbone(deployed)}: cannot be traced ({_reason(error)}); {way_out}") from error


def write_pt2(program: ExportedProgram, file: Path, info: dict[str, Any]) -> None:
    """Writes a graph as `torch.export` keeps it; whoever loads it with NMS inside must import torchvision first."""
    extra = {_INFO: json.dumps(dict([MAKER]) | info)}
    with _quiet():
        torch.export.save(program, file, extra_files=extra)


def write_onnx(
    program: ExportedProgram, file: Path, info: dict[str, Any], names: tuple[str, ...], opset: int | None = None
) -> None:
    """Writes a graph as ONNX, with each entry of `info` as JSON among the file's metadata.

    Args:
        program: what `trace` gave.
        file: where to.
        info: JSON-friendly facts.
        names: of the outputs.
        opset: ONNX's version of its operators; what the exporter prefers otherwise.

    Raises:
        UserError: ONNX, or that version of it, lacks an operator.
    """
    import onnx

    try:
        with torch.no_grad(), _quiet():
            exported = torch.onnx.export(
                program, input_names=["images"], output_names=names, opset_version=opset, dynamo=True, verbose=False
            )
            model = exported.model_proto
    except Exception as error:  # the exporter has errors of its own for every stage
        missing = re.search(r"op='([^']+)'|No ONNX function found for (\S+)", str(error))
        reason = f"it has no operator for {missing[1] or missing[2]}" if missing else _reason(error)
        raise UserError(f"--format onnx: ONNX cannot hold this detector ({reason}); try --format pt2") from error
    version = next(entry.version for entry in model.opset_import if not entry.domain)
    if opset is not None and version != opset:
        operators = sorted({node.op_type for node in model.graph.node})
        lacking = [operator for operator in operators if not _since(onnx, operator, opset)]
        newer = [operator for operator in operators if _since(onnx, operator, version) > opset]
        some = ", ".join(newer[:5]) + (", ..." if len(newer) > 5 else "")
        what = f"it lacks {', '.join(lacking)}" if lacking else f"{some} cannot be converted back to it"
        raise UserError(f"--opset: {opset} cannot hold this detector, {what}; say --opset {version}, or leave it out")
    _name_sizes(model, info)
    for node in model.graph.node:
        del node.metadata_props[:]  # the exporter's notes on where in the source each node comes from
    onnx.helper.set_model_props(model, dict([MAKER]) | {key: json.dumps(value) for key, value in info.items()})
    onnx.save(model, file)


def is_ours(file: Path) -> bool:
    """Whether a file was made by this module."""
    try:
        with _quiet():
            return bool(_read_info(file))
    except Exception:  # whatever a reader says to a file of another kind
        return False


def run_in_onnx(
    deployed: DeployedDetector, image_size: tuple[int, int], batch: int = 1, threads: int | None = None
) -> "ExportedDetector":
    """The same graph in ONNX Runtime, by way of a file that is gone afterwards.

    Args:
        deployed: in eval mode on the CPU.
        image_size: (height, width) in pixels.
        batch: images in a pass.
        threads: of the CPU; what ONNX Runtime prefers otherwise.

    Raises:
        UserError: the packages of the `[export]` extra are missing, or ONNX cannot hold the detector.
    """
    check_onnx()
    info = {"class_names": deployed.detector.class_names, "image_size": list(image_size), "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "detector.onnx"
        info |= {"outputs": deployed.outputs, "dynamic": []}
        write_onnx(trace(deployed, image_size, batch), file, info, deployed.names)
        return ExportedDetector(file, threads)


def check_onnx(opset: int | None = None, packages: tuple[str, ...] = ("onnx", "onnxruntime", "onnxscript")) -> None:
    """Raises a UserError where a package of the `[export]` extra is missing, or no ONNX has that opset."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}; install it: python -m pip install -e '.[export]'")
    if opset is not None:
        from onnx.defs import onnx_opset_version

        if not 1 <= opset <= onnx_opset_version():
            raise UserError(f"--opset: found {opset}; the installed onnx knows 1 to {onnx_opset_version()}")


def _with_fixed_padding(deployed: DeployedDetector) -> DeployedDetector:
    """A copy whose 'same' convolutions pad by a fixed number of pixels.

    TensorFlow's padding is worked out from the size of each input, which takes a tracer minutes to follow. For inputs
    that the stride divides it is the same for all sizes.
    """
    deployed = copy.deepcopy(deployed)
    for name, layer in list(deployed.named_modules()):
        if not isinstance(layer, Conv2dSame):
            continue
        sides = []
        for kernel, stride, dilation in zip(layer.kernel_size, layer.stride, layer.dilation):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            sides = [total // 2, total - total // 2, *sides]  # ZeroPad2d counts from the last dimension
        conv = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
        )
        conv.weight, conv.bias = layer.weight, layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(deployed.get_submodule(parent), leaf, nn.Sequential(nn.ZeroPad2d(tuple(sides)), conv))
    return deployed.eval()


def _read_info(file: Path) -> dict[str, Any]:
    """What a file says of itself; empty where it was made by something else."""
    if file.suffix == SUFFIXES["onnx"]:
        import onnx

        found = {entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props}
        return _from_metadata(found)
    extra = {_INFO: ""}
    torch.export.load(file, extra_files=extra)
    return json.loads(extra[_INFO] or "{}")


def _from_metadata(found: dict[str, str]) -> dict[str, Any]:
    key, maker = MAKER
    if found.get(key) != maker:
        return {}
    return {name: json.loads(value) for name, value in found.items() if name != key}


def _read_onnx(file: Path, threads: int):
    check_onnx(packages=("onnxruntime",))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails raises; it need not be told on standard error too
    # its threads would else spin on after a pass and take the cores from whoever is measured next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = ("CUDAExecutionProvider",) if torch.cuda.is_available() else ()
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(file), options, [*providers, "CPUExecutionProvider"])
        info = _from_metadata(session.get_modelmeta().custom_metadata_map)
        if info.get("quantization") == "weights":
            # brought to float once, in place of in every pass
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            session = onnxruntime.InferenceSession(str(file), options, [*providers, "CPUExecutionProvider"])
    except Exception as error:  # its errors have no base of their own
        raise UserError(f"{file}: cannot be read as ONNX ({_reason(error)})") from error

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))

    device = torch.device("cuda" if providers else "cpu")
    return run, info, device


def _read_pt2(file: Path, threads: int):
    extra = {_INFO: ""}
    try:
        with _quiet():
            program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # zip errors, unknown operators, other versions
        raise UserError(f"{file}: cannot be read as an exported program ({_reason(error)})") from error
    module = program.module()
    # a function, no submodule: a traced program refuses to be put in eval mode, in which it always is
    return lambda images: module(images), json.loads(extra[_INFO] or "{}"), torch.device("cpu")


def _since(onnx, operator: str, opset: int) -> int:
    """The opset since which an operator is what it is at `opset`; 0 where that one has none of its name."""
    try:
        return onnx.defs.get_schema(operator, opset).since_version
    except onnx.defs.SchemaError:
        return 0


def _name_sizes(model, info: dict[str, Any]) -> None:
    """Calls what may vary by its name, in place of the tracer's symbols."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    named = {dim.dim_param: name for dim, name in zip(dims, ("batch", "", "height", "width")) if dim.dim_param}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in named:
                dim.dim_param = named[dim.dim_param]


def _backbone(deployed: DeployedDetector) -> str:
    return deployed.detector.title


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' progress notes and their warnings to themselves; what fails still raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
