"""Running the rounds: each one call of `compare`, into the document, within the time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.end_to_end.plan import Cell, Forecast, Plan
from benchmarks.end_to_end.record import add_round, cell_of, finished, finished_logs, round_of
from benchmarks.record import now, write
from benchmarks.tables import rate
from ffkernels.training.compare import Comparison, Interrupted, compare
from ffkernels.training.config import TrainConfig

# What ends one round and not the others: Adam diverged, the batch is too big, a task's package is missing.
NOT_POSSIBLE = (ValueError, RuntimeError)


class Rounds:
    """Measures what a plan has and a document has not; the document is written after every round."""

    def __init__(self, plan: Plan, document: dict[str, Any], out: Path, minutes: float | None) -> None:
        self.plan, self.document, self.out = plan, document, out
        self.begin = perf_counter()
        self.deadline = None if minutes is None else self.begin + 60 * minutes
        self.forecast = Forecast()
        self._before = document["seconds"]

    def todo(self) -> list[tuple[Cell, int]]:
        return [(cell, seed) for cell, seed in self.plan.rounds() if not finished(self.document, cell, seed)]

    def expected(self, rounds: list[tuple[Cell, int]]) -> float:
        """Seconds for these rounds; a task's tuned learning rate is looked for once."""
        total, swept = 0.0, set()
        with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
            for cell, seed in rounds:
                tuned = self.plan.known_rate(cell, self.document["tuned"])
                if tuned is None and (cell.lr is None or cell.task in swept):
                    tuned = 1e-2  # by then one is known; any will do for a forecast
                swept.add(cell.task)
                try:
                    total += self.forecast.seconds(self.plan.comparison(cell, seed, tuned, Path(folder)))
                except NOT_POSSIBLE:  # said when the round's turn has come
                    continue
        return total

    def run(self) -> bool:
        """Measure what is left; False after Ctrl-C."""
        planned = {(cell.name, seed) for cell, seed in self.plan.rounds()}
        # What another plan for the same file has left out is still not there.
        self.document["left_out"] = [
            one for one in self.document["left_out"] if (one["cell"], one["seed"]) not in planned
        ]
        todo, begun = self.todo(), False
        for number, (cell, seed) in enumerate(todo):
            # The run logs: what is wanted of them goes into the document.
            with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
                try:
                    tuned = self.plan.known_rate(cell, self.document["tuned"])
                    comparison = self.plan.comparison(cell, seed, tuned, Path(folder))
                    expected = self.forecast.seconds(comparison)
                except NOT_POSSIBLE as error:
                    self._leave_out(cell, seed, reason_of(error))
                    continue
                left = self._left()
                # The first is begun in any case: what it finishes in the time is kept.
                if left is not None and expected > left and (begun or left <= 0):
                    self._leave_out(
                        cell, seed, f"it takes about {expected:.0f} s, and {max(0.0, left):.0f} s were left"
                    )
                    continue
                begun = True
                rest = clock(self.expected(todo[number:]))
                print(
                    f"[{number + 1}/{len(todo)}] {cell.name}, seed {seed}: about {clock(expected)}, "
                    f"with all that follows about {rest}",
                    flush=True,
                )
                try:
                    if not self._round(cell, seed, comparison, Path(folder)):
                        return False
                except NOT_POSSIBLE as error:
                    self._leave_out(cell, seed, reason_of(error))
                self._write()
        self._write()
        return True

    def _round(self, cell: Cell, seed: int, comparison: Comparison, folder: Path) -> bool:
        """Measure one round and take it into the document; False when Ctrl-C ended it."""
        begin, late, running = perf_counter(), False, ""

        def on_run(config: TrainConfig) -> None:
            nonlocal running
            running = config.name

        def on_event(event: dict[str, Any]) -> None:
            nonlocal late
            if event["event"] == "end":
                print(
                    f"    {running:14} {event['stopped_because']} after {event['optimizer_steps']} steps, "
                    f"test loss {event['test_loss']:.4f}, {event['seconds']['total']:.1f} s",
                    flush=True,
                )
            left = self._left()
            if left is not None and left < 0:
                late = True
                raise KeyboardInterrupt

        stopped, protocol = None, None
        try:
            _, protocol = compare(comparison, on_run=on_run, on_event=on_event)
        except Interrupted as interrupted:
            stopped = f"stopped in {interrupted}: {'no time was left' if late else 'Ctrl-C'}"
        seconds = perf_counter() - begin
        logs = finished_logs(folder)
        if any(log.name == f"adam-s{seed}" for log in logs):
            one = {
                "seed": seed,
                "complete": stopped is None,
                "measured_at": now(),
                "git_commit": self.document["versions"].get("git_commit"),
                "wall_seconds": round(seconds, 1),
                **round_of(logs, comparison.tolerance),
            }
            add_round(cell_of(self.document, cell, comparison.base.lr), one)
            for line in said(one):
                print(f"    {line}", flush=True)
        if protocol is not None:
            self.forecast.learn(comparison, seconds)
            self._keep_tuned_rate(cell, seed, protocol)
        if stopped is not None:
            self._leave_out(cell, seed, stopped)
            self._write()
        return stopped is None or late

    def _keep_tuned_rate(self, cell: Cell, seed: int, protocol: dict[str, Any]) -> None:
        source = protocol["tuned_lr_source"]
        if source == "sweep":
            source = f"sweep in {cell.name}, seed {seed}"
            print(f"    tuned learning rate of {cell.task}: {rate(protocol['tuned_lr'])}", flush=True)
        elif self.plan.tuned_lr is None:
            source = "measured before"
        self.document["tuned"].setdefault(cell.task, {"lr": protocol["tuned_lr"], "source": source})

    def _left(self) -> float | None:
        return None if self.deadline is None else self.deadline - perf_counter()

    def _leave_out(self, cell: Cell, seed: int, reason: str) -> None:
        self.document["left_out"].append({"cell": cell.name, "seed": seed, "reason": reason})
        print(f"left out: {cell.name}, seed {seed}: {reason}", flush=True)

    def _write(self) -> None:
        self.document["seconds"] = round(self._before + perf_counter() - self.begin, 1)
        self.document["measured_at"] = now()
        write(self.document, self.out)


def reason_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def said(one: dict[str, Any]) -> list[str]:
    """The savings of a round, a line each."""
    lines = []
    for entry in one["savings"]:
        if entry["flops_measured"] is None:
            lines.append(f"{entry['name']}: {entry['reason']}")
        else:
            flops, paper, seconds = (100 * entry[k] for k in ("flops_measured", "flops_paper", "seconds"))
            lines.append(
                f"{entry['name']} saves {flops:.0f} % of the FLOPs ({paper:.0f} % by the paper's count) and "
                f"{seconds:.0f} % of the time"
            )
    return lines


def clock(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
