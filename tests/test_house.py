"""The shape of the house: rooms import downward only, no files go in a circle, rooms and files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ffkernels"
# From the ground up: a room may import from itself and from the rooms before it.
ROOMS = [
    "ops",
    "search",
    "ranks",
    "validation",
    "stage",
    "graphs",
    "engine",
    "reporting",
    "training",
    "analysis",
]
# Modules directly in the package: doctor looks into every room, the command line stands on top of all.
TOP = {"__init__", "__main__", "cli", "doctor"}


def modules(root: Path, folder: Path) -> dict[str, Path]:
    """Every module under ``folder`` by the name that it is imported by."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = path
    return found


def imports_of(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules among ``known`` that a file imports, at any depth of its code, for types alone too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= inner & known
            if not inner <= known:
                found.add(module)
    return (found & known) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, each sorted."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), [start]
        while ahead:
            for node in graph[ahead.pop()] - seen:
                seen.add(node)
                ahead.append(node)
        return seen

    reach = {node: reached(node) for node in graph}
    groups = {
        frozenset(other for other in reach[node] if node in reach[other])
        for node in graph
        if node in reach[node]
    }
    return sorted(sorted(group) for group in groups)


def graph_of(found: dict[str, Path]) -> dict[str, set[str]]:
    return {name: imports_of(path, name, set(found)) for name, path in found.items()}


def upward(name: str, imported: str) -> bool:
    """Whether the module ``name`` of a room must not import the module ``imported``."""
    room, parts = name.split(".")[1], imported.split(".")
    if len(parts) == 1:
        return False
    return parts[1] in TOP or ROOMS.index(parts[1]) > ROOMS.index(room)


FILES = modules(ROOT, PACKAGE)
GRAPH = graph_of(FILES)
OF_ROOMS = sorted(name for name in FILES if len(name.split(".")) > 1 and name.split(".")[1] in ROOMS)


def test_every_file_of_the_package_is_in_a_room():
    rest = {name.split(".")[1] for name in FILES if name != "ffkernels"} - set(ROOMS)
    assert rest == TOP - {"__init__"}
    assert {name.split(".")[1] for name in OF_ROOMS} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downward_only(room):
    wrong = [
        (name, imported)
        for name in OF_ROOMS
        if name.split(".")[1] == room
        for imported in sorted(GRAPH[name])
        if upward(name, imported)
    ]
    assert not wrong


def test_no_files_of_the_package_import_each_other_in_a_circle():
    # The package's own __init__ loads its names on their first use.
    assert circles({name: found - {"ffkernels"} for name, found in GRAPH.items()}) == []


@pytest.mark.parametrize("folder", ["benchmarks", "tools"])
def test_no_modules_import_each_other_in_a_circle(folder):
    found = modules(ROOT, ROOT / folder)
    assert len(found) > 3
    # A folder's __init__ has nothing but words, and the root.
    assert circles({name: of - {folder} for name, of in graph_of(found).items()}) == []


def test_the_rules_find_what_they_forbid(tmp_path):
    package = tmp_path / "ffkernels"
    for file, text in {
        "__init__.py": "",
        "cli.py": "",
        "engine/__init__.py": "",
        "engine/search.py": "from ffkernels.ops import wrong\n",
        "ops/__init__.py": "",
        "ops/wrong.py": (
            "def f():\n    from ..engine import search\n    import ffkernels.cli\n"
            "    from ffkernels import ops\n"
        ),
        "ops/right.py": "from ffkernels.ops import wrong\n",
    }.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    graph = graph_of(modules(tmp_path, package))
    assert graph["ffkernels.ops.wrong"] == {"ffkernels.engine.search", "ffkernels.cli", "ffkernels.ops"}
    assert sorted(name for name in graph["ffkernels.ops.wrong"] if upward("ffkernels.ops.wrong", name)) == [
        "ffkernels.cli",
        "ffkernels.engine.search",
    ]
    assert circles(graph) == [["ffkernels.engine.search", "ffkernels.ops.wrong"]]


@pytest.mark.parametrize("room", ROOMS[: ROOMS.index("reporting")])
def test_the_lower_rooms_know_no_hugging_face(room):
    for path in sorted((PACKAGE / room).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top_level = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in top_level if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in top_level if isinstance(n, ast.ImportFrom)}
        assert not {n for n in names if n.split(".")[0] in {"transformers", "peft", "accelerate", "trl"}}, (
            path
        )


def test_search_runs_without_torch():
    for path in sorted((PACKAGE / "search").glob("*.py")):
        assert "torch" not in path.read_text(encoding="utf-8").replace("without torch", ""), path


def test_rooms_and_files_can_be_read_at_one_sitting():
    files = {room: len(list((PACKAGE / room).glob("*.py"))) for room in ROOMS}
    crowded = {room: n for room, n in files.items() if n > 16 and room not in ("training", "analysis")}
    assert not crowded, "over 16 files: a room of its own, or files that are one idea"
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: n for name, n in lines.items() if n > 400}, "over 400 lines: split by idea"
