"""One way to print: Markdown for documents, aligned columns for a terminal, numbers as people write them.

Imports nothing: a table of results needs neither torch nor the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Mapping[str, Any]]  # the committed files by name
Row = Sequence[str]

MODELS = {
    "tiny": "the embedded model",
    "smollm2-135m": "SmolLM2-135M",
    "smollm2-135m-random": "SmolLM2-135M's architecture with random weights",
}
LABELS = {
    "adam": "Adam",
    "linear": "Fast Forward, `linear` (the paper's)",
    "parabolic": "Fast Forward, `parabolic`",
    "auto": "Adam, no learning rate given",
    "adam-tuned": "Adam, tuned lr",
    "authors": "the authors' loop",
    "authors-32": "the same, validation in one batch",
    "peft-prototype": "PEFT's prototype",
    "salsa": "SaLSa, a line search on the training batch",
    "lora-plus": "LoRA+ at Adam's lr",
}
ORDER = tuple(LABELS)


def markdown(head: Row, rows: Iterable[Row], text_columns: int = 1) -> str:
    rule = f"|{'---|' * text_columns}{'---:|' * (len(head) - text_columns)}"
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, rule, *rest])


def aligned(head: Row, rows: Iterable[Row], text_columns: int = 1) -> str:
    """Columns two spaces apart; a row of a single cell is a line of its own."""
    lines = [list(head), *map(list, rows)]
    widths = [max((len(line[i]) for line in lines if len(line) > 1), default=0) for i in range(len(head))]

    def line(cells: Row) -> str:
        if len(cells) == 1:
            return cells[0]
        pairs = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(w) if i < text_columns else c.rjust(w) for i, (c, w) in pairs).rstrip()

    return "\n".join(map(line, lines))


def rate(lr: float) -> str:
    """A learning rate as people write it: 1e-4, 2.5e-3."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %".replace("-", "−")


def signed(share: float | None) -> str:
    if share is None or share == float("inf"):
        return "–" if share is None else "not finite"
    return f"{100 * share:+.1f} %".replace("-", "−")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def named(model: str) -> str:
    return MODELS.get(model, f"`{model}`")


def heading(model: str) -> str:
    """The model as a line begins with it; behind the first letter `SmolLM2` keeps its own."""
    name = named(model).removeprefix("the ")
    return name[:1].upper() + name[1:]


def where(data: Mapping[str, Any]) -> str:
    """The machine in a few words: what times depend on."""
    machine, versions = data["machine"], data["versions"]
    place = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return f"{place}; {libraries}"


def source(name: str, data: Mapping[str, Any]) -> str:
    return f"(`{data['command']}`; `{name}`)"


def captioned(name: str, data: Mapping[str, Any], said: str, head: Row, rows: Iterable[Row]) -> str:
    """A table under its conditions: the model, what is ``said``, the machine and where it comes from."""
    words = f"{heading(data['config']['model'])}, {said}. {where(data)} {source(name, data)}:"
    return f"{words}\n\n{markdown(head, rows)}"


def newest(results: Results, kind: str) -> tuple[str, Mapping[str, Any]] | None:
    """The file of this kind whose name, which ends with its date, is the last; None where there is none."""
    return max(
        ((n, d) for n, d in results.items() if d.get("kind") == kind), default=None, key=lambda x: x[0]
    )


def missing(module: str) -> str:
    return f"*Not measured yet: `python -m benchmarks.{module}`.*"


def median_of(samples: Mapping[str, float]) -> str:
    """A summary of ``timing``: median [20 %, 80 %]."""
    return f"{samples['median']:.3f} [{samples['p20']:.3f}, {samples['p80']:.3f}]"


def target(what: str, met: bool | str, measured: str) -> dict[str, Any]:
    """What was promised and what was measured; a word in place of ``met`` says why neither can be said."""
    word = met if isinstance(met, str) else "met" if met else "not met"
    return {"what": what, "met": word == "met", "verdict": word, "measured": measured or "nothing"}
