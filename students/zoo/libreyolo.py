"""Where the networks come from."""

import importlib
from collections.abc import Collection
from types import ModuleType


def import_family(name: str) -> ModuleType:
    """libreyolo's module with a family's network, such as `yolox.nn`; nothing is downloaded.

    Raises:
        ValueError: libreyolo is not installed.
    """
    try:
        return importlib.import_module(f"libreyolo.models.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"name: its network is libreyolo's, which is not installed (no {error.name}); "
            "python -m pip install -e '.[zoo]'"
        ) from None


def require_size(size: str, sizes: Collection[str]) -> None:
    """Refuses a size that a family does not have.

    Raises:
        ValueError: just that.
    """
    if size not in sizes:
        raise ValueError(f"size: {size!r} does not exist; choose {', '.join(sizes)}")
