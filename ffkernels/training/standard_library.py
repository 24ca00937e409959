"""Pairs of a docstring's first paragraph and its function, cut from the running Python's standard library.

The order of the pairs is a property of the source files alone: files are visited by a hash of their
relative path, which mixes packages and owes nothing to the file system. A body that has been seen is
skipped (``raise NotImplementedError`` under a hundred names is one lesson, not a hundred), so no function
of one split stands in another. Tests, installed packages and generated tables are left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from ffkernels.training.paused_collector import paused_collector

# site-packages and dist-packages are not the standard library; encodings and pydoc_data are generated tables.
SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


@functools.lru_cache(maxsize=1)
def documented_functions() -> tuple[tuple[str, str], ...]:
    """(summary, function source without its docstring), every body once; read once per process."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs, seen = [], set()
    with paused_collector():
        for name in _source_files(root):
            for summary, source, body in _functions_in(root / name):
                if body not in seen:
                    seen.add(body)
                    pairs.append((summary, source))
    if not pairs:
        raise RuntimeError(
            f"No documented function found under {root}: it holds no source of the standard library. "
            "Use a Python with its .py files, or a JSONL file of your own (--data FILE.jsonl)."
        )
    return tuple(pairs)


def _source_files(root: Path) -> list[str]:
    names = []
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_DIRECTORIES]
        here = Path(directory).relative_to(root)
        names += [(here / name).as_posix() for name in files if name.endswith(".py")]
    return sorted(names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())


def _functions_in(path: Path) -> Iterator[tuple[str, str, str]]:
    """(summary, source, body) of every documented function of one file; nothing if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if '"""' not in text:  # parsing is what takes the time
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources are not the caller's concern
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):  # templates and deliberately broken files
        return
    lines = text.split("\n")  # as ast counts lines; str.splitlines would also split at form feeds
    for node in _functions(tree):
        function = _cut(node, lines)
        if function is not None:
            yield function


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, nested ones too; ast.walk would visit every expression as well."""
    for block in ("body", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, block, ()):
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield statement
            yield from _functions(statement)


def _cut(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str, str] | None:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None or len(node.body) < 2:
        return None
    statement = node.body[0]
    # Header, docstring and body each on lines of their own, so that whole lines can be cut.
    if not node.lineno < statement.lineno <= statement.end_lineno < node.body[1].lineno:
        return None
    paragraph = inspect.cleandoc(docstring).split("\n\n", 1)[0]
    summary = re.sub(r"\s+", " ", paragraph).strip()
    if len(summary) < 10:
        return None
    header = _dedented(lines[node.lineno - 1 : statement.lineno - 1], node.col_offset)
    body = _dedented(lines[statement.end_lineno : node.end_lineno], node.col_offset)
    return summary, f"{header}\n{body}\n", body


def _dedented(lines: list[str], columns: int) -> str:
    """Less the function's own indentation; lines with less of it, inside long strings, stay as they are."""
    return "\n".join(line[columns:] if line[:columns].isspace() else line for line in lines).strip("\n")
