"""One's own data: JSON lines, or one JSON array, also compressed, of records in the forms of ``FORMS``.

docs/paper.md says what each becomes. A field that is null is not there; `tools` (a list, or JSON in a string)
and `system` beside a conversation go to its chat template. Bad lines are reported together. What is not read,
and what is read in one of several ways, is counted in a ``Counter`` under ``EMPTY`` and ``SEVERAL``.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ffkernels.training.conversations import NothingToLearn, conversation, turns
from ffkernels.training.examples import Segment

EMPTY, SEVERAL = "empty", "several forms"

ALLOWED = (
    "`text`; or `prompt` and `response` or `completion`; or `messages`, or `conversations`; or `instruction` "
    "and `output` or `response`"
)

SHOWN = 10  # bad lines of a file

BOM = b"\xef\xbb\xbf"

# Modules of the standard library that a Python may have been built without: imported when needed.
COMPRESSED = {".xz": "lzma", ".gz": "gzip", ".bz2": "bz2"}

Record = Mapping[str, Any]
Segments = tuple[Segment, ...]

# Stanford Alpaca's prompts, which Dolly's records are trained with as well.
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{}\n\n{}### Response:\n"
)
PAIRED = ", paired with an input that provides further context"


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


def forms_of(record: Record) -> list[tuple[str, ...]]:
    """The forms that the record has, by their fields; the first is the one that is read."""
    return [fields for fields in FORMS if all(record.get(field) is not None for field in fields)]


def segments_of(record: Any, tokenizer: Any, where: str) -> Segments:
    """The segments of a record; ``where`` says in errors which it is.

    Raises:
        ValueError: when it has none of the forms, or a field is of the wrong kind.
        NothingToLearn: when what the loss would count is empty or white space.
    """
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: a JSON {type(record).__name__}; each line must be an object with {ALLOWED}."
        )
    forms = forms_of(record)
    if not forms:
        null = [key for key in record if record[key] is None]
        also = f", of which {', '.join(null)} are null" if null else ""
        raise ValueError(f"{where}: has the keys {sorted(record)}{also}; needed are {ALLOWED}.")
    segments = FORMS[forms[0]](record, forms[0], tokenizer, where)
    try:
        for text, _ in segments:
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {error.object[error.start]!r} is half of a character (a lone surrogate), of which no "
            "text can be made."
        ) from error
    return segments


def _conversation(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    return _told(turns(record[fields[0]], where, fields[0]), record, tokenizer, where)


def _pair(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    prompt, response = (record[field] for field in fields)
    if isinstance(prompt, list) and isinstance(response, list):
        context = [{**turn, "weight": 0} for turn in turns(prompt, where, fields[0])] if prompt else []
        return _told([*context, *turns(response, where, fields[1])], record, tokenizer, where)
    prompt, response = (_string(record, field, where) for field in fields)
    return (prompt, False), (_filled(response, fields[1], where), True)


def _told(messages: list[dict[str, Any]], record: Record, tokenizer: Any, where: str) -> Segments:
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return conversation(messages, tokenizer, where, tools=_tools(record, where))


def _instruction(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    more = "input" if fields[1] == "output" else "context"
    instruction, response = (_string(record, field, where) for field in fields)
    context = _string(record, more, where) if record.get(more) is not None else ""
    shown = (PAIRED, instruction, f"### Input:\n{context}\n\n") if context.strip() else ("", instruction, "")
    return (ALPACA.format(*shown), False), (_filled(response, fields[1], where), True)


def _text(record: Record, fields: tuple[str, ...], tokenizer: Any, where: str) -> Segments:
    return ((_filled(_string(record, "text", where), "text", where), True),)


FORMS: dict[tuple[str, ...], Callable[[Record, tuple[str, ...], Any, str], Segments]] = {
    ("messages",): _conversation,
    ("conversations",): _conversation,
    ("prompt", "response"): _pair,
    ("prompt", "completion"): _pair,
    ("instruction", "output"): _instruction,
    ("instruction", "response"): _instruction,
    ("text",): _text,
}


def _tools(record: Record, where: str) -> list[Any] | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"{where}: 'tools' is not JSON ({error}).") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: 'tools' must be a list, not {type(tools).__name__}.")
    return tools


def _string(record: Record, key: str, where: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} must be a string, not {type(record[key]).__name__}.")
    return record[key]


def _filled(text: str, key: str, where: str) -> str:
    if not text.strip():
        raise NothingToLearn(
            f"{where}: {key!r} is empty or white space, so there is nothing to learn from it."
        )
    return text
