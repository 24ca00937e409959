"""Where an analysis goes: <name>.json with its data and provenance, and <name>.png.

{"analysis": name, "command": …, "date": …, "machine": {…}, "versions": {…}, "data": {…}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffkernels.reporting.machine import machine_info, version_info
from ffkernels.reporting.plots import save_figure
from ffkernels.reporting.report import plain
from ffkernels.reporting.written import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save"]


def save(
    name: str,
    data: dict[str, Any],
    draw: Callable[[Figure, dict[str, Any]], None],
    out: str | os.PathLike[str],
    command: str,
) -> tuple[Path, Path]:
    """Write ``<name>.json`` and ``<name>.png`` into the folder ``out``; return their paths.

    Args:
        name: of the analysis; the files' stem.
        data: what the analysis returned: plain values. NaN and infinities become null.
        draw: draws ``data`` into an empty figure of the house style; it may set the figure's size.
        out: made when missing; older files of the same name are replaced.
        command: the command line that makes this again.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "analysis": name,
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": machine_info(),
        "versions": version_info(),
        "data": plain(data),
    }
    written, picture = folder / f"{name}.json", folder / f"{name}.png"
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(written, text)
    save_figure(lambda figure: draw(figure, data), picture)
    return written, picture
