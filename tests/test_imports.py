"""Imports point one way: losses -> torch; students -> losses; teachers -> students; distill -> all three."""

import ast
import sys
from pathlib import Path

import pytest

OURS = {"losses", "students", "teachers", "distill", "train", "eval"}
MAY_IMPORT = {
    "losses": {"losses"},
    "students": {"losses", "students"},
    "teachers": {"losses", "students", "teachers"},
    "distill": {"losses", "students", "teachers", "distill"},
}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f"{'.' * node.level}{node.module or ''}")
    return found


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_imports_are_found(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import os, a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h as i\n")
    assert imported(file) == {"os", "a.b", "c.d", ".", "h"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_lies_below_them(repository, room):
    files = sorted((repository / room).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(repository)} imports {name or 'by a relative path'}"
        for path in files
        for name in top_level(path) & (OURS | {""}) - MAY_IMPORT[room]
    }
    assert not wrong


def test_losses_need_only_torch(repository):
    # scipy matches queries
    allowed = {"torch", "torchvision", "scipy", "losses"} | sys.stdlib_module_names
    wrong = {f"{p.name}: {name}" for p in (repository / "losses").rglob("*.py") for name in top_level(p) - allowed}
    assert not wrong
