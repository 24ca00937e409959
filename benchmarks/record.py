"""One way to say what was measured where, and to keep it: options, provenance, files.

A module is named as it is run, without ``benchmarks.``: "kernels.step".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

# Whatever fits on a line of this length stands on one: a run, a curve, a row.
WIDTH = 400


def parser(
    module: str, doc: str, *, out: str | Path | None = None, name: str = ""
) -> argparse.ArgumentParser:
    """A parser that shows ``doc`` and knows ``--out``, a file or the folder for ``<name>_<date>.json``."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = f"the JSON file, or the folder for {name}_<date>.json" if name else "the JSON file"
    default = "without it, nothing is written" if out is None else f"default: {out}"
    made.add_argument("--out", type=Path, default=out, help=f"{where}; {default}")
    return made


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def provenance(module: str, argv: Sequence[str] | None = None, **more: Any) -> dict[str, Any]:
    """What a number needs to be believed: when, by which command, on what machine, with which versions.

    Args:
        argv: the options; None, this process's.
        more: what else a result begins with, such as its kind.
    """
    # Here, so that whoever only writes a file needs no torch.
    from ffkernels.reporting.machine import command_line, machine_info, version_info

    load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    given = sys.argv[1:] if argv is None else argv
    return {
        **more,
        "command": command_line(given, "python", "-m", f"benchmarks.{module}"),
        "measured_at": now(),
        "machine": {**machine_info(), "load": load},
        "versions": version_info(),
    }


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a measurement, without where its result went."""
    return {name: value for name, value in vars(options).items() if name != "out"}


def text_of(value: Any, indent: int = 0) -> str:
    """JSON in lines that a diff can tell apart: what is short stands on one."""
    flat = json.dumps(value, ensure_ascii=False)
    if (len(flat) <= WIDTH and indent) or not isinstance(value, (dict, list, tuple)) or not value:
        return flat
    pad, (left, right) = "\n" + " " * (indent + 1), "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        parts = [
            f"{json.dumps(str(k), ensure_ascii=False)}: {text_of(v, indent + 1)}" for k, v in value.items()
        ]
    else:
        parts = [text_of(one, indent + 1) for one in value]
    return f"{left}{pad}{f',{pad}'.join(parts)}{pad[:-1]}{right}"


def path_of(out: Path, name: str, measured_at: str) -> Path:
    """The file ``out``, or in the folder ``out`` the one of this name and day."""
    return out if out.suffix == ".json" else out / f"{name}_{measured_at[:10]}.json"


def write(result: Any, out: Path, name: str = "") -> Path:
    """Write the file in one move: whoever stops this process finds a whole one. Returns where it is.

    Args:
        out, name: see ``path_of``.
    """
    out = path_of(out, name, result["measured_at"]) if name else out
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(text_of(result) + "\n", encoding="utf-8")
    part.replace(out)
    return out


def add_line(one: dict[str, Any], path: Path) -> None:
    """Append a line to a file that may end with half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if file.tell() else "") + json.dumps(one))


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


class Report:
    """A result that is rewritten whenever there is something new, and what failed on its way.

    For a GPU, or in small for a CPU, by the options --seconds and --dry.
    """

    def __init__(self, parser: argparse.ArgumentParser, argv: Any = None, **result: Any) -> None:
        import torch

        parser.add_argument("--seconds", type=float, default=470.0, help="time for everything")
        parser.add_argument("--dry", action="store_true", help="in small on the CPU, as without a GPU")
        options = parser.parse_args(argv)
        self.out, self.begin, self.seconds = options.out, perf_counter(), options.seconds
        self.dry = options.dry or not torch.cuda.is_available()
        self.device = torch.device("cpu" if self.dry else f"cuda:{torch.cuda.current_device()}")
        self.result = {"device": str(self.device), "dry": self.dry, **result, "errors": []}

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """The value of ``work``, or None with the error on record: one failure must not end the rest."""
        value = None
        try:
            value = work()
        except Exception as error:
            self.result["errors"].append(f"{what}: {reason(error)}")
        print(f"{what}: at {perf_counter() - self.begin:.0f} s", flush=True)
        return value

    def write(self) -> None:
        self.result["seconds"] = perf_counter() - self.begin
        write(self.result, self.out)

    def end(self, failed: Sequence[str]) -> int:
        """Say what failed; the exit status."""
        failed = [*self.result["errors"], *failed]
        print("\n".join(failed))
        return 1 if failed else 0


def lines_of(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """What a file of a JSON line per measurement has, by its key; a last line that was cut off is none."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        found[one[key]] = one
    return found
