"""What an analyze command shows while it works and when it is done, and the two files that it writes:

<name>.json    {"analysis": name, "command": …, "date": …, "machine": {…}, "versions": {…}, "data": {…}}
<name>.png     the picture of that data
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ffkernels.reporting.numbers import percent, plain
from ffkernels.reporting.written import write_json

if TYPE_CHECKING:
    from ffkernels.training.config import TrainConfig


INTERRUPTED = 130

Data = dict[str, Any]  # what an analysis returns: plain values
Cell = str | int | float | None
Table = tuple[list[str], list[list[Cell]]]  # the columns' names, and rows


@dataclass(frozen=True)
class Watch:
    """Who is told what: ``run`` each run before it starts, ``event`` its log events, for a progress bar."""

    run: Callable[[TrainConfig], Any] = lambda config: None
    event: Callable[[dict[str, Any]], Any] = lambda event: None


@contextmanager
def working(what: str, quiet: bool) -> Iterator[None]:
    """A spinner with ``what`` and the seconds passed, on a terminal and not when ``quiet``."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = console.is_terminal and not quiet
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def watching(quiet: bool) -> Iterator[Watch]:
    """A progress bar per run on a terminal, and a clean end on Ctrl-C."""
    from rich.console import Console

    from ffkernels.training.compare import Interrupted
    from ffkernels.training.progress import ProgressBars

    console = Console(stderr=True)
    with ProgressBars(console, quiet or not console.is_terminal) as bars:
        try:
            yield Watch(bars.start, bars.event)
        except Interrupted as error:
            typer.echo(f"interrupted in {error}; nothing was written", err=True)
            raise typer.Exit(INTERRUPTED) from None


def finish(name: str, data: Data, analysis: Any, out: str | os.PathLike[str]) -> None:
    """Print what ``analysis`` makes of its data, write the two files and say where they are.

    Args:
        data: NaN and infinities become null in the file.
        analysis: has ``table(data)``; ``what_was_seen(data)``, sentences; ``draw(figure, data)``. Numbers in
            the table are shown to four significant digits, None as a dash.
        out: a folder, made when missing; older files of the same name are replaced.
    """
    from ffkernels.reporting.machine import command_line, machine_info, version_info
    from ffkernels.reporting.plots import save_figure
    from ffkernels.reporting.terminal import bare_table, wide_console

    console = wide_console()
    header, rows = analysis.table(data)
    console.print(bare_table(header, [list(map(_text, row)) for row in rows]))
    typer.echo()
    for sentence in analysis.what_was_seen(data):
        console.print(re.sub(r" -(?=\d)", " −", sentence), highlight=False, markup=False)

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "analysis": name,
        "command": command_line(sys.argv[1:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": machine_info(),
        "versions": version_info(),
        "data": plain(data),
    }
    written, picture = folder / f"{name}.json", folder / f"{name}.png"
    write_json(written, record, indent=1)
    save_figure(lambda figure: analysis.draw(figure, data), picture)
    typer.echo(f"\nData: {written}\nPicture: {picture}")


def than_adam(saved: float) -> str:
    """What a run cost whose fraction ``saved`` of Adam's measured FLOPs may be negative."""
    return f"{percent(abs(saved))} {'fewer' if saved > 0 else 'more'} FLOPs than Adam (measured)"


def _text(cell: Cell) -> str:
    if cell is None or cell != cell:
        return "–"
    return f"{cell:.4g}".replace("e-0", "e-") if isinstance(cell, float) else str(cell)
