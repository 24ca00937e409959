"""The report of some runs: report.json for programs, report.md and PNGs for people, a table for the terminal.

    {"runs":    [{"name", "optimizer_steps", "test_loss", "flops": {"paper", "measured"},
                  "seconds": {"train", "validate", "move", "other", "total"}, "validation_forwards",
                  "stages"}],
     "savings": [{"name", "flops_paper", "flops_measured", "seconds"}],
     "machine": {}, "versions": {}, "config": {}}

Savings are fractions of the Adam run at the same learning rate (``savings.py``). An entry without a number
holds nulls and a ``reason``. Several seeds add entries named ``<kind>-median`` at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffkernels.reporting.document import markdown, runs_table, spread_lines
from ffkernels.reporting.numbers import percent, plain
from ffkernels.reporting.plots import draw_all
from ffkernels.reporting.recorder import RunLog
from ffkernels.reporting.savings import Run, Spread, compare_runs, spreads
from ffkernels.reporting.written import write_json, write_text
from ffkernels.search.search import SEARCHES

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_TOLERANCE = 1e-4
# Where the files of a run lie says nothing about the run.
NOT_CONDITIONS = ("name", "out", "target_loss")
OF_TASKS = ("task", "source", "chat_loss")  # with a file in its place nothing reads them


@dataclass
class Report:
    """What ``build_report`` made."""

    data: dict[str, Any]  # what report.json holds
    runs: list[Run]  # with their savings, in the order of the table
    spreads: list[Spread]  # median and range per kind, where there are several seeds
    caveats: list[str]  # what a reader of the numbers must know
    folder: Path
    files: list[Path] = field(default_factory=list)


def build_report(
    logs: Iterable[RunLog],
    out_dir: str | os.PathLike[str],
    *,
    target_tolerance: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> Report:
    """Write report.json, report.md and the plots of ``logs`` into ``out_dir``, and return what they say.

    Args:
        logs: the runs, in any order; they belong together by their names: ``adam-s0``, ``linear-s0``, …
        out_dir: a folder; made when missing.
        target_tolerance: how far above Adam's final test loss counts as reached; when not given,
            ``config["tolerance"]`` or else 1e-4.
        config: the ``config`` of report.json; that of the first Adam run when not given.

    Raises:
        ValueError: when there is no run, two have the same name, or the tolerance is not a number ≥ 0.
    """
    logs = list(logs)
    if not logs:
        raise ValueError("no run to report; give at least one run log")
    if target_tolerance is None:
        target_tolerance = (config or {}).get("tolerance", DEFAULT_TOLERANCE)
    runs = compare_runs(logs, target_tolerance)
    several = spreads(runs)
    judged = [run for run in runs if run.saved is not None]
    data = {
        "runs": [run.row for run in runs],
        "savings": [entry.entry() for entry in (*judged, *several)],
        "machine": runs[0].log.machine,
        "versions": runs[0].log.versions,
        "config": _conditions(config or runs[0].log.config, runs),
    }
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(plain(data), runs, several, _caveats(runs, several, target_tolerance), folder)
    write_json(folder / "report.json", report.data, indent=2)
    pictures = draw_all(runs, folder)
    write_text(folder / "report.md", markdown(report.data, runs, several, report.caveats, pictures))
    report.files = [folder / "report.json", folder / "report.md", *pictures.values()]
    return report


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the runs, their savings and the caveats with rich."""
    from ffkernels.reporting.terminal import bare_table, wide_console

    console = console or wide_console()
    # Eighty columns must do: short headings on several lines, medians below the table.
    headings = ("run", "lr", "steps", "stages", "vali-\ndations", "test\nloss", None, "time\n(s)")
    headings += ("FLOPs\nsaved", "FLOPs\n(paper)", "time\nsaved")
    header, rows = runs_table(report.runs, [])
    header = [short or long for short, long in zip(headings, header, strict=True)]
    rows = [[cell.replace(" %", "%").replace("not reached", "missed") for cell in row] for row in rows]
    console.print(bare_table(header, rows, gap=1))
    console.print()
    for line in spread_lines(report.spreads):
        console.print(line, highlight=False, markup=False)
    for caveat in report.caveats:
        console.print(f"· {caveat}", style="dim", highlight=False, markup=False)


def _caveats(runs: Sequence[Run], several: Sequence[Spread], tolerance: float) -> list[str]:
    """What the numbers do not say by themselves, most important first."""
    lines = []
    judged = [run for run in runs if run.saved is not None]
    if judged:
        lines.append(
            "Savings are against Adam at the same learning rate, on the way to that run's final test loss "
            f"+ {tolerance:g}; they are not savings against a tuned learning rate."
        )
    for run in judged:
        if run.reason is not None:
            lines.append(f"{run.name} has no saving: {run.reason}.")
    if any(run.kind == "auto" for run in runs):
        lines.append(
            "“auto” was given no learning rate: each gradient's cosine with the last update moved it. It is "
            "held to the same test loss."
        )
    lines += _tuned_lines(runs, several)
    lines.append(
        "FLOPs: “measured” counts the forward and backward that ran; “paper” charges a backward as two "
        "forwards, more than it costs where base weights are frozen, and so flatters Fast Forward."
    )
    tests = sum(run.log.end.get("test_seconds", 0.0) for run in runs if run.log.end is not None)
    lines.append(
        "Seconds hold training and everything Fast Forward does (validation, search, weight moves); loading, "
        "logging and test losses are charged to nobody."
        + (f" The test losses took {tests:.1f} s beside them." if tests else "")
    )
    for run in runs:
        lines += _run_lines(run)
    if differing := _differing(run.log.machine for run in runs):
        lines.append(f"The runs differ in {differing} of their machine: their seconds do not compare.")
    if differing := _differing(run.log.versions for run in runs):
        lines.append(f"The runs differ in their versions of {differing}; the report names the first run's.")
    return lines


def _run_lines(run: Run) -> list[str]:
    """Caveats of one run."""
    lines, steps = [], run.row["optimizer_steps"]
    if run.log.end is None:
        lines.append(f"{run.name} has no end in its log: killed, or running. Its row is its last state.")
    at = run.reached_at["optimizer_step"] if run.reached_at is not None else steps
    if at < steps and run.kind == "adam":
        lines.append(f"{run.name} itself was at its target, step {steps}'s, already at step {at}.")
    elif at < steps:
        lines.append(f"{run.name} went on after the target: its saving is taken at step {at} of {steps}.")
    return lines


def _tuned_lines(runs: Sequence[Run], several: Sequence[Spread]) -> list[str]:
    """The honest row in words: a tuned learning rate next to Fast Forward and the others."""
    saved = {spread.kind: spread.median for spread in several}
    for run in runs:
        if run.saved is not None and run.reason is None:
            saved.setdefault(run.group, run.saved)
    tuned = saved.pop("adam-tuned", None)
    if tuned is None:
        return []
    of_kind = [run for run in runs if run.kind == "adam-tuned"]
    rates = sorted({f"{run.lr:g}" for run in of_kind if run.lr is not None})
    line = f"Adam at a tuned learning rate ({', '.join(rates)})" if rates else "Adam at a tuned learning rate"
    if not all(run.tuned for run in of_kind):
        line = f"Adam at another learning rate ({', '.join(rates)}), a usual one that nobody tuned,"
    line += f" saves {_two_shares(tuned)} on the way to the same test loss"
    names = {kind: f"Fast Forward {kind}" for kind in SEARCHES} | {"auto": "Adam with no learning rate given"}
    rivals = [f"{names.get(kind, kind)} {_two_shares(values)}" for kind, values in saved.items() if values]
    return ["; ".join([line, *rivals]) + "."]


def _two_shares(saved: Mapping[str, float | None]) -> str:
    flops, seconds = (percent(saved[cost], 1) for cost in ("flops_measured", "seconds"))
    return f"{flops} of the FLOPs (measured) and {seconds} of the time"


def _differing(of_runs: Iterable[Mapping[str, Any]]) -> str:
    """The keys in which the mappings are not all the same."""
    mappings = list(of_runs)
    keys = sorted({key for mapping in mappings for key in mapping})
    return ", ".join(k for k in keys if any(m.get(k) != mappings[0].get(k) for m in mappings))


def _conditions(config: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """The settings to report; Fast Forward's come from a run that has stages, which Adam's has not."""
    unread = (*NOT_CONDITIONS, *(OF_TASKS if config.get("data") else ()))
    kept = {key: value for key, value in config.items() if key not in unread}
    for name in {"data", "test_data"} & kept.keys():
        if isinstance(kept[name], str):
            kept[name] = Path(kept[name]).name  # the file, not somebody's folders
    stages = (run.log.config.get("fast_forward") for run in runs if run.kind != "auto")
    forward = next(filter(None, stages), None)
    if not kept.get("fast_forward") and isinstance(forward, Mapping):
        kept["fast_forward"] = {key: value for key, value in forward.items() if key != "search"}
    return kept
