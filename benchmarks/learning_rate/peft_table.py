"""PEFT's methods in Markdown: the rate of PEFT's own comparison, the one of "auto" and the tuned one.

L* is Adam's lowest final test loss of all its rates, L₀ the loss before training; what is not recovered is
(L − L*) / (L₀ − L*).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.learning_rate.methods import LEFT_OUT, PEFT_METHODS, SOURCE, SOURCE_COMMIT, PeftMethod
from benchmarks.learning_rate.plan import LIMITS
from benchmarks.learning_rate.table import conditions
from benchmarks.tables import Results as Files
from benchmarks.tables import markdown, missing, newest, rate
from benchmarks.tables import signed as percent

KIND = "peft_methods"
NAMED = (0.08, 0.02)  # of the recoverable loss: where "auto" leaves more, its methods are named

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """The runs of a method; None where there is none.

    Attributes:
        adam: Adam's, of the sweep and at the published rates, by rate.
        published: at the published rate that does best here.
        tuned: the best of all of Adam's.
    """

    method: PeftMethod
    auto: Line | None
    adam: Mapping[float, Line]

    @property
    def published(self) -> Line | None:
        return lowest(self.adam[lr] for lr in self.method.published if lr in self.adam)

    @property
    def tuned(self) -> Line | None:
        best = lowest(self.adam.values())
        return None if best is None or best["loss"] is None else best

    @property
    def inside(self) -> bool:
        """Whether the tuned rate has a worse one within a factor of 2 on both sides."""
        apart = [lr / self.tuned["lr"] for lr in self.adam]  # rates have four digits
        return any(0.499 < each < 1 for each in apart) and any(1 < each < 2.01 for each in apart)

    def share(self, line: Line | None) -> float | None:
        """Of the recoverable loss, what is not recovered; infinite where not finite, None where not run."""
        if line is None or self.tuned is None:
            return None
        best = self.tuned["loss"]
        return float("inf") if line["loss"] is None else (line["loss"] - best) / (line["start"] - best)

    @property
    def runaway(self) -> bool:
        """Whether the sweep was given up, its best rate being at an end."""
        lr, (low, high) = self.tuned["lr"], LIMITS
        return not self.inside and not (low <= lr / 2 and 2 * lr <= high)

    @property
    def whole(self) -> bool:
        """Whether all has been run; a sweep is at its end where its best rate is inside, or was given up."""
        if self.share(self.published) is None or self.share(self.auto) is None:
            return False
        return self.inside or self.runaway


def lowest(lines: Iterable[Line]) -> Line | None:
    return min(lines, key=lambda line: (line["loss"] is None, line["loss"]), default=None)


def entries(data: Mapping[str, Any]) -> list[Entry]:
    """By label."""
    found = []
    for name, workload in data["workloads"].items():
        lines = [line for line in data["runs"] if line["workload"] == name]
        auto = next((line for line in lines if line["contender"] == "auto"), None)
        adam = {line["lr"]: line for line in lines if line["contender"] == "adam"}
        found.append(Entry(PEFT_METHODS[workload["method"]], auto, adam))
    return sorted(found, key=lambda one: one.method.label.lower())


def published(one: Entry) -> str:
    """The rate that counts, then PEFT's other ones."""
    others = ", ".join(rate(lr) for lr in one.method.published if lr != one.published["lr"])
    mark = "" if one.method.experiment else " \\*"
    return rate(one.published["lr"]) + (f" (also {others})" if others else mark)


def short(lr: float) -> str:
    """Two digits say enough of a rate that nobody chose."""
    return rate(float(f"{lr:.2g}"))


def loss(line: Line) -> str:
    return "not finite" if line["loss"] is None else f"{line['loss']:.4f}"


def table(found: Sequence[Entry]) -> str:
    rows = []
    for one in found:
        given = one.auto.get("rate")
        row = [one.method.label, published(one), short(given) if given else "–"]
        row += [short(one.tuned["lr"]) + (" (no end found)" if one.runaway else "")]
        row += [f"{one.tuned['start']:.3f}", *map(loss, (one.published, one.auto, one.tuned))]
        rows.append(row + [percent(one.share(line)) for line in (one.published, one.auto)])
    head = ["method", "PEFT's rate", "auto's rate", "tuned rate", "L₀", "at PEFT's rate", "auto", "L*"]
    return markdown([*head, "not recovered at PEFT's rate", "not recovered by auto"], rows)


def said(found: Sequence[Entry]) -> str:
    """What it adds up to: medians, the worst of "auto", and every method at which it leaves much."""
    auto = {one.method.label: one.share(one.auto) for one in found}
    theirs = {one.method.label: one.share(one.published) for one in found}
    lrs = [one.tuned["lr"] for one in found]
    words = [f"{len(lrs)} methods; tuned rates lie between {short(min(lrs))} and {short(max(lrs))}."]
    for name, shares in (('`learning_rate="auto"`', auto), ("PEFT's rates", theirs)):
        worst = max(shares, key=shares.get)
        middle = percent(median(shares.values()))
        words.append(
            f"{name}: {middle} not recovered in the median, {percent(shares[worst])} at worst ({worst})."
        )
    for bound in NAMED:
        names = sorted((name for name in auto if auto[name] > bound), key=auto.get, reverse=True)
        words.append(f"`auto` leaves more than {100 * bound:.0f} % at {', '.join(names) or 'none'}.")
    return " ".join(words)


def failures(data: Mapping[str, Any]) -> str:
    found = []
    for line in (line for line in data["runs"] if line.get("failed")):
        method = PEFT_METHODS[data["workloads"][line["workload"]]["method"]].label
        what = "auto" if line["lr"] is None else f"Adam at {rate(line['lr'])}"
        found.append(f"- {method}, {what}: {line['failed']}")
    return "\n".join(["Not trained:\n", *found]) if found else ""


def left_out(found: Sequence[Entry]) -> str:
    """What of PEFT's methods has no row, and why."""
    ran = [one.method for one in found]
    lines = [f"- `{name}`: {why}" for name, why in sorted(LEFT_OUT.items())]
    lines += [f"- {one.label}: not run to its end" for one in PEFT_METHODS.values() if one not in ran]
    return "\n".join(["Without a row:\n", *lines])


def peft_methods(results: Files) -> str:
    """A row per method under its conditions, what it adds up to, and what has none."""
    named = newest(results, KIND)
    if named is None:
        return missing("learning_rate --plan peft")
    name, data = named
    one = next(iter(data["workloads"].values()))
    found = [each for each in entries(data) if each.whole]
    work = (
        f"{one['task'].capitalize()}, batch {one['batch']}, {one['steps']} steps, {one['schedule']} schedule"
    )
    rates = f"PEFT's rates are those of `{SOURCE}` at `{SOURCE_COMMIT}`"
    head = f"{conditions(name, data)} {work}, seed 0. {rates}."
    shown = (said(found), table(found)) if found else ()
    parts = (head, *shown, failures(data), left_out(found))
    return "\n\n".join(part for part in parts if part)


def all_tables(data: Mapping[str, Any]) -> str:
    return peft_methods({"": data})
