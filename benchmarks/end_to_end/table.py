"""The result of `end_to_end.py` in a few lines, and what the paper reports beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The lowest saving that the paper reports, in its own count; and how far time may fall behind FLOPs.
LEAST_SAVED, MOST_BEHIND = 0.41, 0.02


def rate(lr: float) -> str:
    """A learning rate as people write it: 1e-4, 2.5e-3."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def render_end_to_end(result: dict) -> list[str]:
    """A line per cell: FLOPs in both counts and time saved, by each search and by a tuned learning rate."""
    config = result["config"]
    lines = [
        "",
        f"end to end on {config['model']}, {config['dtype']} base, {config['steps']} Adam steps: saved on",
        "the way to Adam's test loss, FLOPs measured / FLOPs in the paper's count / time",
        f"{'cell':44}{'parabolic':>22}{'linear':>22}{'Adam, tuned lr':>22}",
    ]
    for cell in result["cells"]:
        rate_ = rate(cell["lr"]) + (" tuned" if cell["tuned"] else "")
        line = f"{cell['task']} {cell['method']} lr {rate_} batch {cell['batch_size']}".ljust(44)
        for kind in ("parabolic", "linear", "adam-tuned"):
            line += f"{_saved(cell, kind):>22}"
        lines.append(line)
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
    return " / ".join(f"{found['median'][cost]:.0%}" for cost in ("flops_measured", "flops_paper", "seconds"))


def spread(cell: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The savings of a kind of run in a cell over its seeds.

    None where it was not measured; its ``median`` is None where a seed did not reach the target.
    """
    return next((found for found in cell["spreads"] if found["kind"] == kind), None)


def end_to_end_targets(result: dict) -> list[dict]:
    """What the default search has to save at the small learning rates; empty for a run that means nothing."""
    if result["fast"]:
        return []
    found = []
    for cell in result["cells"]:
        ours = spread(cell, "parabolic")
        if cell["tuned"] or ours is None:
            continue
        label = f"{cell['task']}, {cell['method']}, lr {rate(cell['lr'])}, batch {cell['batch_size']}"
        if (saved := ours["median"]) is None:
            found.append(
                {"what": f"{label}: reaches Adam's test loss", "met": False, "measured": "not reached"}
            )
            continue
        paper, measured, seconds = (saved[cost] for cost in ("flops_paper", "flops_measured", "seconds"))
        found.append(
            {
                "what": f"{label}: at least {LEAST_SAVED:.0%} of the FLOPs saved, the paper's count",
                "met": paper >= LEAST_SAVED,
                "measured": f"{paper:.1%}",
            }
        )
        for name, flops in (("measured", measured), ("the paper's count", paper)):
            found.append(
                {
                    "what": f"{label}: as large a share of time as of FLOPs ({name}), less 2 points",
                    "met": seconds >= flops - MOST_BEHIND,
                    "measured": f"{seconds:.1%} beside {flops:.1%}",
                }
            )
    return found
