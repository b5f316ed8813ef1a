"""Reads the tensors of a published .pt file without running anything that is in it.

Such a file is a pickle of the whole network: its modules by class, with their state. Only the few functions that put a
tensor together are called; every class of a network becomes an inert stand-in that holds its state, and what is
neither, such as `os.system`, is refused by its name.
"""

import collections
import io
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The float32 tensors of a network by their dotted names, and its class names, if it tells them.

    Of a file that holds an averaged copy beside the network (`ema`), it is that copy's.

    Args:
        path: a .pt or .pth file: a pickled network, or its state dict.

    Raises:
        ValueError: no such file, no checkpoint, or one with code in it.
    """
    if not path.is_file():
        raise ValueError(f"weights: no file {path}; allowed are none, or the path of a published file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"weights: {path} is no checkpoint of PyTorch's (no zip archive); give a published .pt file")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError(f"weights: {path} is a TorchScript program, not a checkpoint; give the file it came from")
    try:
        content = torch.load(path, map_location="cpu", pickle_module=_RESTRICTED, weights_only=False)
    except RefusedError as error:
        raise ValueError(
            f"weights: {path} asks for {error}, which no network's state needs; it is refused, and nothing was run"
        ) from None
    except Exception as error:  # UnpicklingError, KeyError, RuntimeError, EOFError: all mean the same to the user
        raise ValueError(f"weights: {path} is no checkpoint that can be read ({type(error).__name__})") from None
    beside = content.get("names") if isinstance(content, dict) else None
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and content.get(key) is not None:
            content = content[key]
            break
    tensors = dict(_named_tensors(content))
    if not tensors:
        raise ValueError(f"weights: {path} holds no network and no state dict")
    names = getattr(content, "names", beside) or []
    names = list(names.values() if isinstance(names, dict) else names)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}, names


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
