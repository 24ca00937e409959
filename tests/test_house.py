"""The shape of the house: rooms import downward only, and the names of design stay where they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ffkernels"
# From the ground up: a room may import from itself and from the rooms before it.
ROOMS = ["ops", "engine", "reporting", "training", "analysis"]
# Modules directly in the package: doctor looks into every room, the command line stands on top of all.
TOP = {"__init__", "__main__", "cli", "doctor"}


def imports_of(path: Path) -> set[str]:
    """Every ffkernels module that a file imports, at any depth of its code."""
    package = ["ffkernels", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
            found.add(module)
    return {name for name in found if name.split(".")[0] == "ffkernels"}


def upward(room: str, imported: str) -> bool:
    """Whether a file of ``room`` must not import the module ``imported``."""
    parts = imported.split(".")
    if len(parts) == 1:
        return False
    if parts[1] in ROOMS:
        return ROOMS.index(parts[1]) > ROOMS.index(room)
    return parts[1] in TOP


FILES = [path for room in ROOMS for path in sorted((PACKAGE / room).glob("**/*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_downward_only(path):
    room = path.relative_to(PACKAGE).parts[0]
    wrong = sorted(name for name in imports_of(path) if upward(room, name))
    assert not wrong, f"{room} must not import {wrong}"


def test_the_rule_finds_an_upward_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    file = tmp_path / "ops" / "wrong.py"
    file.write_text(
        "def f():\n    from ..engine import search\n    import ffkernels.cli\n    from ffkernels import ops\n"
    )
    assert sorted(name for name in imports_of(file) if upward("ops", name)) == [
        "ffkernels.cli",
        "ffkernels.engine",
        "ffkernels.search.search",
    ]


@pytest.mark.parametrize("room", ["ops", "engine"])
def test_the_lower_rooms_know_no_hugging_face(room):
    for path in sorted((PACKAGE / room).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top_level = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in top_level if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in top_level if isinstance(n, ast.ImportFrom)}
        assert not {n for n in names if n.split(".")[0] in {"transformers", "peft", "accelerate", "trl"}}, (
            path
        )


def test_modules_stay_small():
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.glob("**/*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long, "over 400 lines: split by idea"
