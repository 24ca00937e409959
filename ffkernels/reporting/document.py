"""The report as text: the table of runs and savings, and the Markdown document around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffkernels.reporting.numbers import flop_unit, number, percent
from ffkernels.reporting.savings import SECONDS, Run, Spread

# In the order of the table: what a saving is called, and its key.
SAVINGS = (
    ("flops_measured", "FLOPs saved, measured"),
    ("flops_paper", "FLOPs saved, paper"),
    ("seconds", "time saved"),
)
CAPTIONS = {
    "test_loss_flops": "Test loss over training compute (measured FLOPs); the mark is where a run ended.",
    "test_loss_seconds": "Test loss over training time; the mark is where a run ended.",
    "tau": "How far each Fast Forward stage went.",
    "learning_rate": "Runs with no learning rate given: loss, rate, and the cosine of each gradient with "
    "the last update, which moves it.",
    "training": "The loss along the path: a stage repeats the last optimizer step's update τ* times. "
    "Optimizer steps show the loss of their training batch, Fast Forward's steps that of the validation set.",
}
# The settings a reader asks for first, in this order; the rest follows in report.json.
CONDITIONS = (
    "model task data test_data method rank alpha lr tuned_lr schedule warmup_steps batch_size max_length "
    "steps seeds validation_examples test_examples"
).split()


def runs_table(runs: Sequence[Run], several: Sequence[Spread]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the runs, then the medians of several seeds."""
    size, unit = _unit(runs)
    header = ["run", "lr", "steps", "stages", "validations", "test loss", unit, "seconds"]
    rows = []
    for run in runs:
        row = run.row
        cells = [
            run.name,
            "auto" if run.auto else "" if run.lr is None else f"{run.lr:g}",
            str(row["optimizer_steps"]),
            str(row["stages"]),
            str(row["validation_forwards"]),
            number(row["test_loss"], ".4f"),
            number(row["flops"]["measured"] / size, ".4g"),
            number(row["seconds"]["total"], ".1f"),
        ]
        rows.append([*cells, *_saved(run)])
    for spread in several:
        rows.append([f"{spread.kind}, median of {spread.count}", *[""] * 7, *_spread(spread)])
    return [*header, *(title for _, title in SAVINGS)], rows


def markdown(
    data: Mapping[str, Any],
    runs: Sequence[Run],
    several: Sequence[Spread],
    caveats: Sequence[str],
    pictures: Mapping[str, Path],
) -> str:
    """The whole of report.md."""
    size, unit = _unit(runs)
    flops = [
        [run.name, f"{measured / size:.4g}", f"{paper / size:.4g}", str(measured), str(paper)]
        for run in runs
        for paper, measured in [(run.row["flops"]["paper"], run.row["flops"]["measured"])]
    ]
    exactly = [f"measured ({unit})", f"paper ({unit})", "measured, exactly", "paper, exactly"]
    seconds = [[run.name, *(f"{run.row['seconds'][part]:.2f}" for part in SECONDS)] for run in runs]
    lines = ["# Fast Forward report", "", *_conditions(data), "", "## Runs and savings", ""]
    lines += _lines(*runs_table(runs, several))
    if several:
        lines += ["", "Medians with the range over the seeds in parentheses."]
    lines += ["", *(f"- {caveat}" for caveat in caveats)]
    for stem, path in pictures.items():
        lines += ["", f"![{CAPTIONS[stem]}]({path.name})", "", f"*{CAPTIONS[stem]}*"]
    lines += ["", "## FLOPs in both conventions", "", *_lines(["run", *exactly], flops)]
    lines += [
        "",
        "## Where the time went",
        "",
        *_lines(["run", *(f"{part} (s)" for part in SECONDS)], seconds),
    ]
    lines += ["", "## Machine and versions", ""]
    known = {**data["machine"], **data["versions"]}
    lines += [f"- {name}: {_text(value)}" for name, value in known.items() if value not in (None, [], "")]
    return "\n".join(lines) + "\n"


def spread_lines(several: Sequence[Spread]) -> list[str]:
    """Medians and ranges of several seeds, a sentence each."""
    lines = []
    for spread in several:
        if spread.median is None:
            lines.append(f"{spread.kind}, {spread.count} runs: no median, {spread.reason}")
        else:
            cells = [f"{title} {cell}" for (_, title), cell in zip(SAVINGS, _spread(spread), strict=True)]
            lines.append(f"{spread.kind}, median of {spread.count} and range: {'; '.join(cells)}")
    return lines


def _saved(run: Run) -> list[str]:
    if run.saved is None:
        return [""] * len(SAVINGS)
    if run.reason is not None:
        return ["not reached" if run.target is not None else "–", *["–"] * (len(SAVINGS) - 1)]
    return [percent(run.saved[cost], 1) for cost, _ in SAVINGS]


def _spread(spread: Spread) -> list[str]:
    if spread.median is None:
        return ["–"] * len(SAVINGS)
    cells = []
    for cost, _ in SAVINGS:
        ends = f"({100 * spread.low[cost]:.1f} to {100 * spread.high[cost]:.1f})".replace("-", "−")
        cells.append(f"{percent(spread.median[cost], 1)} {ends}")
    return cells


def _unit(runs: Sequence[Run]) -> tuple[float, str]:
    return flop_unit(max((run.row["flops"]["measured"] for run in runs), default=0))


def _conditions(data: Mapping[str, Any]) -> list[str]:
    config = data["config"]
    settings = [f"{key} {_text(config[key])}" for key in CONDITIONS if config.get(key) is not None]
    lines = [f"Conditions: {', '.join(settings)}."] if settings else []
    forward = config.get("fast_forward")
    if isinstance(forward, Mapping):
        named = [f"{key} {_text(value)}" for key, value in forward.items() if key != "search"]
        lines += ["", f"Fast Forward: {', '.join(named)}."]
    machine, versions = data["machine"], data["versions"]
    if machine:
        threads = f"{machine.get('threads')} CPU thread(s)"
        where = [_text(machine.get("cpu")), threads, *(machine.get("gpus") or [])]
        software = f"torch {versions.get('torch')}, ffkernels {versions.get('ffkernels')}"
        lines += ["", f"Measured on {', '.join(where)}; {software}."]
    return lines


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)
