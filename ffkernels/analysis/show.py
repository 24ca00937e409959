"""What an analyze command shows: a line while it works, then a table, what was seen, where the files are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ffkernels.analysis.race import Watch

__all__ = ["finish", "percent", "than_adam", "watching", "working"]

INTERRUPTED = 130

Cell = str | int | float | None


@contextmanager
def working(what: str, flags: dict[str, Any]) -> Iterator[None]:
    """A spinner with ``what`` and the seconds passed, on a terminal and not with ``--quiet``."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = console.is_terminal and not flags["quiet"]
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def watching(flags: dict[str, Any]) -> Iterator[Watch]:
    """Progress bars on a terminal, and a clean end on Ctrl-C."""
    from rich.console import Console

    from ffkernels.analysis.race import Watch
    from ffkernels.training.compare import Interrupted
    from ffkernels.training.progress import ProgressBars

    console = Console(stderr=True)
    with ProgressBars(console, flags["quiet"] or not console.is_terminal) as bars:
        try:
            yield Watch(bars.start, bars.event)
        except Interrupted as error:
            typer.echo(f"interrupted in {error}; nothing was written", err=True)
            raise typer.Exit(INTERRUPTED) from None


def finish(
    name: str,
    data: dict[str, Any],
    draw: Callable[..., None],
    flags: dict[str, Any],
    *,
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    seen: Sequence[str],
) -> None:
    """Print the table and the sentences, write the files of ``record.save`` and say where they are.

    Numbers in ``rows`` are shown to four significant digits, None as a dash; the first column stands left.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ffkernels.analysis.record import save
    from ffkernels.reporting.machine import command_line

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no width
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(header):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_text(cell)) for cell in row))  # a str would be read as markup
    console.print(table)
    typer.echo()
    for sentence in seen:
        console.print(sentence, highlight=False, markup=False)
    written, picture = save(name, data, draw, flags["out"], command_line(sys.argv[1:]))
    typer.echo(f"\nData: {written}\nPicture: {picture}")


def percent(share: float) -> str:
    """0.425 as "42 %"."""
    return f"{100 * share:.0f} %".replace("-", "−")


def than_adam(saved: float) -> str:
    """What a run cost whose fraction ``saved`` of Adam's measured FLOPs may be negative."""
    return f"{percent(abs(saved))} {'fewer' if saved > 0 else 'more'} FLOPs than Adam (measured)"


def _text(cell: Cell) -> str:
    if cell is None or cell != cell:
        return "–"
    return f"{cell:.4g}".replace("e-0", "e-") if isinstance(cell, float) else str(cell)
