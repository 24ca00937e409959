"""The run log: one JSON object per line, written as the run goes, readable after any kind of end.

Every line has ``event`` and ``time`` (seconds since the epoch):

    run     name, config, machine, versions        once, and again by each resume, with resumed_from: the
                                                   optimizer step that it goes on from
    step    optimizer_step, train_loss, lr, flops, seconds; alignment where no learning rate was given
    stage   what ``Stage.to_dict()`` holds, and run_flops, run_seconds
    test    optimizer_step, loss, flops, seconds
    end     optimizer_steps, test_loss, flops, seconds, validation_forwards, stages, stopped_because,
            reached_target

``train`` writes into ``run`` also ``tokens`` (``Task.statistics``) and ``remarks`` (``Session.remarks``), and
into ``end`` what the test losses took, ``test_seconds``, which are in no other number.

``flops`` is ``{"paper", "measured"}`` and ``seconds`` is ``{"train", "validate", "move", "other",
"total"}``, both counted from the start of the run. JSON has no NaN and no infinity: they are written as the
strings ``"nan"``, ``"inf"`` and ``"-inf"``, and ``read_run`` makes floats of them again, everywhere but in
names, texts, config, machine and versions.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffkernels.reporting.exclusive import lock

EVENTS = ("run", "step", "stage", "test", "end")
# Events of which a log has many, and the list in RunLog where they are.
KEPT = {"step": "steps", "stage": "stages", "test": "tests"}
# Fields whose strings are strings even when they read "nan".
TEXTS = frozenset(
    {"event", "name", "config", "machine", "versions", "remarks"}
    | {"executor", "executor_reason", "stopped_because"}
)
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Recorder:
    """Writes a run log, one flushed line per event; a context manager.

    Each line is a single write, so a run that is killed leaves at most one incomplete line, the last. The log
    is locked from the beginning and touched by the first event only.

    Args:
        path: the file, by habit ``<name>.jsonl``; missing folders are made. append: go on with an existing
        log (a resumed run) instead of replacing it; an incomplete last line goes.

    Raises:
        RuntimeError: when another run is writing the log.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append, self._begun, self._made = append, False, not self.path.exists()
        self._file = open(self.path, "ab", buffering=0)
        try:
            lock(self._file.fileno(), self.path)
        except BaseException:
            self._file.close()
            raise

    def write(self, event: str, **fields: Any) -> None:
        """Write one event. Fields are numbers, strings, lists, mappings and 0-dim tensors."""
        if event not in EVENTS:
            raise ValueError(f"event is {event!r}; it must be one of {', '.join(EVENTS)}")
        record = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(_encode(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        data = memoryview(line.encode() + b"\n")
        try:
            self._begin()
            while data:  # an unbuffered write may stop short when the disk is full, and raises the next time
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _begin(self) -> None:
        if self._begun:
            return
        if self._append:
            _complete_last_line(self.path)
        elif self._file.tell():
            self._file.truncate(0)
        self._begun = True

    def close(self) -> None:
        """Close the file, which goes where it was made for nothing; closing twice is fine."""
        if self._made and not self._begun and not self._file.closed:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass
class RunLog:
    """A run log as read back: the events of each kind, in order, as dictionaries."""

    name: str  # this and the next three are of the last ``run`` event
    config: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)  # of a resumed run those that led to its end
    stages: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None  # None for a run that is still going or was killed
    resumes: int = 0  # how often the run was resumed
    truncated: bool = False  # whether an incomplete last line was left out


def read_run(path: str | os.PathLike[str]) -> RunLog:
    """Read a run log.

    An incomplete last line is left out. Where a run was resumed, what it did after the point it was resumed
    from is replaced by what it did then.

    Raises:
        ValueError: for a file that is empty, holds no ``run`` event, or has a broken line before its last.
    """
    path = Path(path)
    records, truncated = _read_records(path)
    if not records:
        raise ValueError(f"{path} holds no complete line; it must be a run log of `ffkernels train`")
    log: RunLog | None = None
    for record in records:
        event = record["event"]
        if event == "run":
            log = _begin(record, log, path)
        elif log is None:
            raise ValueError(f"{path} begins with a {event!r} event; a run log begins with 'run'")
        elif event == "end":
            log.end = record
        elif event in KEPT:
            getattr(log, KEPT[event]).append(record)
    log.truncated = truncated
    return log


def _begin(record: dict[str, Any], log: RunLog | None, path: Path) -> RunLog:
    if log is None:
        log = RunLog(name=path.stem)
    else:
        log.resumes += 1
        log.end = None
        for name in KEPT.values():
            kept = [e for e in getattr(log, name) if e["optimizer_step"] <= record["resumed_from"]]
            setattr(log, name, kept)
    log.name = str(record.get("name") or log.name)
    for name in ("config", "machine", "versions"):
        setattr(log, name, dict(record.get(name) or {}))
    return log


def _read_records(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The events of the file, and whether an incomplete last line was left out."""
    lines = path.read_bytes().splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "event" not in record:
                raise ValueError("an event is an object with the key 'event'")
        except ValueError as error:  # of json or of the encoding
            if number == len(lines):
                return records, True
            raise ValueError(f"{path}, line {number}: not an event of a run log ({error})") from None
        records.append({k: v if k in TEXTS else _decode(v) for k, v in record.items()})
    return records, False


def _complete_last_line(path: Path) -> None:
    """Make the file end with a complete line, so that the next one starts on its own."""
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    start = data.rfind(b"\n") + 1
    try:
        json.loads(data[start:])
    except ValueError:
        os.truncate(path, start)
    else:
        with open(path, "ab") as file:
            file.write(b"\n")


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if hasattr(value, "item") and getattr(value, "size", None) is not None:  # 0-dim tensors, numpy's scalars
        return _encode(value.item())
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return [_encode(item) for item in value]
    raise TypeError(
        f"cannot write {value!r} of type {type(value).__name__} to a run log; give numbers, strings or lists"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    return value
