"""One's own data: JSON lines with `text`, or `prompt` and `response`, or `messages`; also compressed.

A line becomes segments (text, counted): the loss counts a `text` whole, of a pair only the `response`, of a
conversation only what the assistant says.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ffkernels.training.conversations import conversation
from ffkernels.training.examples import Segment

ALLOWED = "`text`, or `prompt` and `response`, or `messages`"

# Modules of the standard library that a Python may have been built without: imported when needed.
COMPRESSED = {".xz": "lzma", ".gz": "gzip", ".bz2": "bz2"}


def task_name(path: Path) -> str:
    """The file's name without its ending: ``medquad`` for medquad.jsonl and for medquad.jsonl.xz."""
    return Path(path.stem).stem if path.suffix in COMPRESSED else path.stem


def read_lines(path: Path, tokenizer: Any) -> Iterator[tuple[Segment, ...]]:
    """The segments of each line; empty lines are passed over, a bad one is a ValueError that says where."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a JSONL file whose lines have {ALLOWED}.")
    with _opened(path) as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error}).") from error
            if line.strip():
                yield _segments(line, where, tokenizer)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed as its ending says."""
    if path.suffix not in COMPRESSED:
        with path.open("rb") as lines:
            yield lines
        return
    module = importlib.import_module(COMPRESSED[path.suffix])
    # Every module has its own way to say that it cannot read a file.
    damaged = (
        OSError,
        EOFError,
        getattr(module, "LZMAError", EOFError),
        importlib.import_module("zlib").error,
    )
    try:
        with module.open(path, "rb") as lines:
            yield lines
    except damaged as error:
        raise ValueError(
            f"{path} cannot be decompressed: damaged, cut short, or not what its ending {path.suffix} says "
            f"({error})."
        ) from error


def _segments(line: str, where: str, tokenizer: Any) -> tuple[Segment, ...]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__}; each line must be an object with {ALLOWED}."
        )
    if "messages" in record:
        return conversation(record["messages"], tokenizer, where)
    if "prompt" in record or "response" in record:
        prompt, response = (_string(record, key, where) for key in ("prompt", "response"))
        return (prompt, False), (_filled(response, "response", where), True)
    if "text" in record:
        return ((_filled(_string(record, "text", where), "text", where), True),)
    raise ValueError(f"{where}: has the keys {sorted(record)}; needed are {ALLOWED}.")


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise ValueError(
            f"{where}: the key {key!r} is missing; it has {sorted(record)}, needed are {ALLOWED}."
        )
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} must be a string, not {type(record[key]).__name__}.")
    return record[key]


def _filled(text: str, key: str, where: str) -> str:
    if not text:
        raise ValueError(f"{where}: {key!r} is empty, so there is nothing to learn from it.")
    return text
