"""An end-to-end result in a few lines, and what the paper reports beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import aligned, rate, target

# The lowest saving that the paper reports, in its own count; and how far time may fall behind FLOPs.
LEAST_SAVED, MOST_BEHIND = 0.41, 0.02
COSTS = ("flops_measured", "flops_paper", "seconds")


def render_end_to_end(result: dict) -> list[str]:
    """A line per cell: FLOPs in both counts and time saved, by each search and by a tuned learning rate."""
    config, kinds = result["config"], ("parabolic", "linear", "adam-tuned")
    rows = []
    for cell in result["cells"]:
        lr = rate(cell["lr"]) + (" tuned" if cell["tuned"] else "")
        label = f"{cell['task']} {cell['method']} lr {lr} batch {cell['batch_size']}"
        rows.append([label, *(_saved(cell, kind) for kind in kinds)])
    lines = [
        "",
        f"end to end on {config['model']}, {config['dtype']} base, {config['steps']} Adam steps: saved on",
        "the way to Adam's test loss, FLOPs measured / FLOPs in the paper's count / time",
        aligned(["cell", *kinds], rows),
    ]
    if result["left_out"]:
        cells = dict.fromkeys(one["cell"] for one in result["left_out"])
        lines.append(f"-- left out (the file says why): {'; '.join(cells)}")
    return [*lines, *([f"-- {result['note']}"] if "note" in result else [])]


def _saved(cell: dict, kind: str) -> str:
    found = spread(cell, kind)
    if found is None:
        return "–"
    if found["median"] is None:
        return "not reached"
    return " / ".join(f"{found['median'][cost]:.0%}" for cost in COSTS)


def spread(cell: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The savings of a kind of run in a cell over its seeds.

    None where it was not measured; its ``median`` is None where a seed did not reach the target.
    """
    return next((found for found in cell["spreads"] if found["kind"] == kind), None)


def end_to_end_targets(result: dict) -> list[dict]:
    """What the default search has to save at the small learning rates; empty for a run that means nothing."""
    found = []
    for cell in result["cells"] if not result["fast"] else ():
        ours = spread(cell, "parabolic")
        if cell["tuned"] or ours is None:
            continue
        label = f"{cell['task']}, {cell['method']}, lr {rate(cell['lr'])}, batch {cell['batch_size']}"
        if (saved := ours["median"]) is None:
            found.append(target(f"{label}: reaches Adam's test loss", False, "not reached"))
            continue
        measured, paper, seconds = (saved[cost] for cost in COSTS)
        what = f"{label}: at least {LEAST_SAVED:.0%} of the FLOPs saved, the paper's count"
        found.append(target(what, paper >= LEAST_SAVED, f"{paper:.1%}"))
        for name, flops in (("measured", measured), ("the paper's count", paper)):
            what = f"{label}: as large a share of time as of FLOPs ({name}), less 2 points"
            found.append(target(what, seconds >= flops - MOST_BEHIND, f"{seconds:.1%} beside {flops:.1%}"))
    return found
