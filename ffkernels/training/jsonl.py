"""One's own data: JSON lines, or one JSON array, of the records of ``records.py``; also compressed.

Bad lines are reported together. What is not read, and what is read in one of several ways, is counted in a
``Counter`` under ``EMPTY`` and ``SEVERAL``.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ffkernels.training.examples import Segment
from ffkernels.training.records import ALLOWED, forms_of, segments_of
from ffkernels.training.turns import NothingToLearn

EMPTY, SEVERAL = "empty", "several forms"

SHOWN = 10  # bad lines of a file

BOM = b"\xef\xbb\xbf"

# Modules of the standard library that a Python may have been built without: imported when needed.
COMPRESSED = {".xz": "lzma", ".gz": "gzip", ".bz2": "bz2"}


def task_name(path: Path) -> str:
    """The file's name without its ending: ``medquad`` for medquad.jsonl and for medquad.jsonl.xz."""
    return Path(path.stem).stem if path.suffix in COMPRESSED else path.stem


def read_lines(path: Path, tokenizer: Any, counts: Counter[str]) -> Iterator[tuple[Segment, ...]]:
    """The segments of each line with something to learn; empty lines are passed over.

    Raises:
        ValueError: when all has been read, with the first ten bad lines and their number.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a JSONL file whose lines have {ALLOWED}.")
    bad: list[str] = []
    found = 0
    with _opened(path) as lines:
        for where, record in _records(lines, path):
            try:
                if isinstance(record, bytes):
                    record = parsed(record, where)
                segments = segments_of(record, tokenizer, where)
            except NothingToLearn:
                counts[EMPTY] += 1
            except ValueError as error:
                found += 1
                if found <= SHOWN:
                    bad.append(str(error))
            else:
                counts[SEVERAL] += len(forms_of(record)) > 1
                yield segments
    if found == 1:
        raise ValueError(bad[0])
    if bad:
        more = [f"… and {found - SHOWN} more."] if found > SHOWN else []
        raise ValueError("\n  ".join([f"{path}: {found} lines cannot be read:", *bad, *more]))


def _records(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    """(where it is, line) of each line that is not empty; (where, item) of a file that is one array."""
    filled = ((number, line) for number, line in enumerate(lines, start=1) if line.removeprefix(BOM).strip())
    for place, (number, line) in enumerate(filled):
        if place == 0 and line.removeprefix(BOM).lstrip().startswith(b"["):
            array = parsed(b"".join([line, *(line for _, line in filled)]), str(path))
            yield from ((f"{path}, item {item}", record) for item, record in enumerate(array, start=1))
            return
        yield f"{path}, line {number}", line


def parsed(raw: bytes, where: str) -> Any:
    """One JSON value in UTF-8, with a mark of byte order or not; a ValueError says ``where`` it is none."""
    try:
        return json.loads(raw.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}).") from error
    except (ValueError, RecursionError) as error:  # also of numbers and nestings that Python does not read
        raise ValueError(f"{where}: not JSON ({error}).") from error


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
