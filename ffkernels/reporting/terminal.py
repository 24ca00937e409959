"""What a terminal is shown: a console that tables fit into, and tables without lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def wide_console() -> Console:
    """The terminal; of a file or a pipe, which have no width, as many columns as a table needs."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def bare_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, gap: int = 2, title: str | None = None
) -> Table:
    """The first column to the left, the others to the right, ``gap`` spaces apart; cells are no markup."""
    look = {"box": None, "pad_edge": False, "padding": (0, gap, 0, 0), "header_style": "bold"}
    table = Table(title=title, title_justify="left", **look)
    for place, heading in enumerate(header):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
