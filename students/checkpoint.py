"""Reads the tensors of a published file without running anything that is in it, and holds them against a network's.

A .pt or .pth file is a pickle: of a state dict, or of the whole network, its modules by class. Only the few functions
that put a tensor together are called; every class of a network becomes an inert stand-in that holds its state, and what
is neither, such as `os.system`, is refused by its name.
"""

import collections
import io
import pickle
import sys
import tarfile
import types
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# what may be called: it puts tensors and plain containers together
_ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
# beside the network, files tell when, where and how well it was trained: of all that only a stand-in is made
_HARMLESS = {
    ("_codecs", "encode"),
    ("argparse", "Namespace"),
    ("collections", "defaultdict"),
    ("datetime", "datetime"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("torch", "device"),
}
_BUILTINS = {"builtins", "__builtin__", "__main__", "nt", "posix"}


class RefusedError(pickle.UnpicklingError):
    """A file asks for something that is no part of a network's state."""


class _StandInType(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        # unpickling makes an object of a class by __new__ alone; a call is what functions are asked for
        if cls.source not in _HARMLESS:
            raise RefusedError(".".join(cls.source))
        return cls.__new__(cls)


class StandIn(metaclass=_StandInType):
    """Takes the place of an object of any class and holds its state."""

    source = ("", "")

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Contents of a dict of some class; nothing here reads them."""

    def append(self, value: Any) -> None:
        """Likewise, of a list."""

    def extend(self, values: Any) -> None:
        """Likewise."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        source = (module, name)
        if source in _ALLOWED:
            return _ALLOWED[source]
        root = module.partition(".")[0]
        if source not in _HARMLESS and (root in sys.stdlib_module_names or root in _BUILTINS):
            raise RefusedError(f"{module}.{name}")
        return _StandInType(name, (StandIn,), {"source": source})


def _load(file: Any, **kwargs: Any) -> Any:
    return _Unpickler(file, **kwargs).load()


# in place of the pickle module, as torch.load wants it
_RESTRICTED = types.SimpleNamespace(
    __name__="restricted_pickle",
    Unpickler=_Unpickler,
    UnpicklingError=pickle.UnpicklingError,
    load=_load,
    loads=lambda data, **kwargs: _load(io.BytesIO(data), **kwargs),
)


class OtherClassesError(ValueError):
    """Weights of a whole detector that knows other classes.

    Attributes:
        number: of its classes.
    """

    def __init__(self, source: str, number: int, names: Sequence[str], class_names: Sequence[str]):
        self.number = number
        missing = next((name for name in class_names if name not in names), "")
        what = f"none of them {missing!r}" if len(names) == number else "without names"
        super().__init__(
            f"weights: {source} has {number} classes, {what}, here there are {len(class_names)}; say new_head: true to "
            "start the class layers anew"
        )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a network by their dotted names, and its class names, if the file tells them.

    Of a file that holds an averaged copy beside the network (`ema`), it is that copy's. Those of a pickle are float32,
    where they are no integers.

    Args:
        path: a .safetensors file; or a pickled network or its state dict, as any PyTorch has written it.

    Raises:
        ValueError: no such file, none with tensors, or one with code in it.
    """
    if not path.is_file():
        raise ValueError(
            f"weights: no file {path}; give the path of one that is there (what else there is: train.py --list)"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path), []
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights: {path} cannot be read as safetensors ({error})") from None
    content = _unpickle(path)
    beside = content.get("names") if isinstance(content, dict) else None
    while isinstance(content, dict):
        held = (content.get(key) for key in ("ema", "state_dict_ema", "model", "state_dict"))
        network = next((value for value in held if isinstance(value, dict | StandIn)), None)
        if network is None:
            break
        content = network
    try:
        tensors = dict(_named_tensors(content))
    except (AttributeError, TypeError, RecursionError):  # stand-ins where a module would have its tables
        tensors = {}
    if not tensors:
        raise ValueError(f"weights: {path} holds no network and no state dict")
    names = getattr(content, "names", beside)
    names = list(names.values()) if isinstance(names, dict) else names
    told = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}, list(names) if told else []


def require_tensors(
    wanted: dict[str, Tensor],
    found: dict[str, Tensor],
    source: str,
    problems: Sequence[str] = (),
    layers: tuple[int, int] | None = None,
    beyond: bool = False,
    way_out: str = "give the settings it was made with",
) -> None:
    """Refuses tensors that are not those of a network, name by name and shape by shape; counters of batch norms aside.

    Args:
        wanted: the network's.
        found: the file's.
        source: its path.
        problems: what is known to be wrong besides.
        layers: how many of them the network and the file have.
        beyond: the file may have more than is wanted, such as a classifier behind its backbone.
        way_out: what the user is told to do.

    Raises:
        ValueError: a difference; the first of each kind is shown.
    """
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]
    missing = [name for name in names if name not in found]
    other = [name for name in names if name in found and found[name].shape != wanted[name].shape]
    unknown = [name for name in found if name not in wanted and not name.endswith("num_batches_tracked")]
    told = []
    if missing:
        told.append(f"it lacks {missing[0]} {describe_shape(wanted[missing[0]])}{_more(missing)}")
    if other:
        shapes = f"{describe_shape(found[other[0]])}, here {describe_shape(wanted[other[0]])}"
        told.append(f"{other[0]} is {shapes}{_more(other, ' of other shapes')}")
    if unknown and (missing or not beyond):
        told.append(f"it has {unknown[0]} {describe_shape(found[unknown[0]])}{_more(unknown)}, which is not here")
    told += problems[: max(1, 3 - len(told))]
    if told:
        counts = f"; it has {layers[1]} layers, this network {layers[0]}" if layers and layers[0] != layers[1] else ""
        raise ValueError(f"weights: {source} is of another network: {'; '.join(told)}{counts}; {way_out}")


def describe_shape(tensor: Tensor) -> str:
    """Such as (64, 3, 7, 7)."""
    return f"({', '.join(map(str, tensor.shape))})"


def _more(names: Sequence[str], what: str = "") -> str:
    return f" and {len(names) - 1} more{what}" if len(names) > 1 else ""


def _unpickle(path: Path) -> Any:
    """What a file holds, as plain containers, tensors and stand-ins: a zip archive, or as PyTorch wrote before 1.6."""
    refused = f"weights: {path} is no checkpoint of PyTorch's, or not a whole one"
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                is_program = any(name.endswith("constants.pkl") for name in archive.namelist())
            if is_program:  # PyTorch would hand it to another reader
                raise ValueError(
                    f"weights: {path} is a TorchScript program, not a checkpoint; give the file it came from"
                )
        elif tarfile.is_tarfile(path):  # unpacked on the way, from before PyTorch 0.2
            raise ValueError(f"weights: {path} is a tar archive, which is not read; save its tensors by torch.save")
    except zipfile.BadZipFile:
        raise ValueError(f"{refused} (its zip archive is broken)") from None
    try:
        with warnings.catch_warnings():  # PyTorch tells of sources that it does not find
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", pickle_module=_RESTRICTED, weights_only=False)
    except RefusedError as error:
        raise ValueError(
            f"weights: {path} asks for {error}, which no network's state needs; it is refused, and nothing was run"
        ) from None
    except Exception as error:  # UnpicklingError, KeyError, RuntimeError, EOFError: all mean the same to the user
        raise ValueError(f"{refused} ({type(error).__name__})") from None


def _named_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Of a state dict, or of a stand-in for a module: its own tensors first, then those of its parts, as torch does."""
    if isinstance(content, dict):
        found = content.items()
    else:
        state = vars(content) if isinstance(content, StandIn) else {}
        left_out = state.get("_non_persistent_buffers_set") or ()
        buffers = {name: x for name, x in (state.get("_buffers") or {}).items() if name not in left_out}
        found = [*(state.get("_parameters") or {}).items(), *buffers.items()]
        parts = state.get("_modules") or {}
    for name, value in found:
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach().float() if value.is_floating_point() else value.detach()
    if not isinstance(content, dict):
        for name, part in parts.items():
            yield from _named_tensors(part, f"{prefix}{name}.")
