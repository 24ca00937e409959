"""What a person sees while runs go on: a bar in a terminal, a line per run elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ffkernels.reporting.numbers import percent
from ffkernels.reporting.terminal import bare_table
from ffkernels.training.config import ADAPTERS, TrainConfig
from ffkernels.training.requirements import no_progress_bars
from ffkernels.training.trainer import NOT_FINITE

if TYPE_CHECKING:
    from ffkernels.training.trainer import RunResult


class TimeLeft:
    """How long several ``runs``, one after the other, will still take, told when each of them begins.

        left = what the present run needs at its steps' pace + runs that have not begun · the longest so far

    An estimate: a run may reach its target before its last step, and one with long stages outlast those
    before. ``clock`` gives seconds.

    Attributes:
        begun: how many have begun.
    """

    def __init__(self, runs: int, clock: Callable[[], float] = perf_counter) -> None:
        self.runs, self.begun = runs, 0
        self._clock, self._since, self._longest, self._prepared = clock, 0.0, 0.0, 0.0

    def begin(self) -> None:
        now = self._clock()
        if self.begun:
            self._longest = max(self._longest, now - self._since)
        self.begun, self._since, self._prepared = self.begun + 1, now, 0.0

    def prepared(self) -> None:
        """The present run has its model and data: its steps begin."""
        self._prepared = self._clock() - self._since

    def seconds(self, done: float) -> float | None:
        """Left when a share ``done`` of the present run's steps is done; None where nothing tells yet."""
        if not done:
            return (self.runs - self.begun + 1) * self._longest or None
        steps = (self._clock() - self._since - self._prepared) / done
        return steps * (1 - done) + (self.runs - self.begun) * max(self._longest, self._prepared + steps)


class Remaining(TimeRemainingColumn):
    """Of all runs what ``TimeLeft`` says; of one its own pace, at most: it may reach its target earlier."""

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            return Text(task.fields["left"])
        return Text("≤ ") + super().render(task) + Text(" left")


class ProgressBars:
    """A context manager with one bar per run, fed by the trainer's events.

    ``start(config)`` begins a run; ``event(event)`` is an ``on_event``. With ``quiet`` both do nothing. Where
    no bar of ours is drawn, transformers draws none either.
    With ``tokens`` a run's data are told in a line at its start. Of several ``runs``, a comparison's, it is
    told how long all of them will take.
    """

    def __init__(self, console: Console, quiet: bool = False, tokens: bool = False, runs: int = 1) -> None:
        self.console, self.quiet, self.tokens = console, quiet, tokens
        self._live = not quiet and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            Remaining(),
            console=console,
            disable=not self._live,
        )
        self._transformers = no_progress_bars(not self._live)
        self._task: Any = None
        self._all: Any = None  # the bar of all runs
        self._time_left, self._told_left = TimeLeft(runs), runs == 1
        self._name, self._steps, self._test = "", 0, ""
        self._told: set[str] = set()

    def __enter__(self) -> ProgressBars:
        self._transformers.__enter__()
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        self._transformers.__exit__(None, None, None)

    def start(self, config: TrainConfig) -> None:
        self._name, self._steps, self._test = config.name, config.steps, ""
        left, runs = self._time_left, self._time_left.runs
        if runs > 1 and self._all is None:
            self._all = self._progress.add_task("all runs", total=runs, note="", left="")
        left.begin()
        self._task = self._progress.add_task(config.name, total=config.steps, note="")
        self._show_left(0)
        until = f" or test loss {config.target_loss:.4f}" if config.target_loss is not None else ""
        length = f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"
        of_all = f"; run {', '.join([f'{left.begun} of {runs}', *self._left(0)])}" if runs > 1 else ""
        self._line(f"{config.name}: {length}{until}{of_all}")

    def event(self, event: dict[str, Any]) -> None:
        kind, step = event["event"], event.get("optimizer_step")
        if kind == "run":
            self._steps = event["config"]["steps"]
            self._time_left.prepared()
            if self.tokens:
                self._tell(token_line(event["tokens"]), f"{self._name}: ")
            for remark in event["remarks"]:
                self._tell(remark)
            self._progress.update(self._task, total=self._steps)
        elif kind == "test":
            self._test = f"test loss {event['loss']:.4f}"
            self._progress.update(self._task, completed=step, note=self._test)
        elif kind == "step":
            self._progress.update(self._task, completed=step)
            self._show_left(step)
        elif kind in ("stage_begins", "stage"):
            note = "Fast Forward stage …" if kind == "stage_begins" else f"τ = {event['tau']}"
            self._progress.update(self._task, note=f"{self._test}  {note}")
        elif kind == "interrupt":
            what = "Fast Forward stage" if event["in_stage"] else "step"
            how = " and is saved; a second Ctrl-C ends it at once, unsaved" if event["save"] else ""
            self.console.print(f"Ctrl-C: {self._name} ends after this {what}{how}", highlight=False)
        elif kind == "end":
            # A run that stopped early is done: its bar is full at the steps it needed.
            steps, tested = event["optimizer_steps"], event["test_seconds"]
            self._progress.update(self._task, completed=steps, total=steps)
            self._show_left(steps, ended=True)
            tests = f", and {tested:.1f} s for test losses" if tested else ""
            self._line(
                f"{self._name}: {event['stopped_because']} after {steps} steps,"
                f"{_test_loss(event['test_loss'])} {event['seconds']['total']:.1f} s{tests}"
            )

    def _line(self, text: str) -> None:
        """Where no bar is drawn."""
        if not self._live and not self.quiet:
            self.console.print(text, highlight=False)

    def _left(self, steps: int) -> list[str]:
        """What all runs still take, where something tells; of the present one so many steps are done."""
        seconds = self._time_left.seconds(steps / self._steps)
        return [] if seconds is None else [f"about {timedelta(seconds=math.ceil(seconds))} left"]

    def _show_left(self, steps: int, ended: bool = False) -> None:
        if self._all is None:
            return
        begun, left = self._time_left.begun, self._left(self._steps if ended else steps)
        short = "".join(left).replace("about", "≈")  # a bar has little room
        self._progress.update(self._all, completed=begun - (not ended), left=short)
        # Without a bar each run's beginning tells it, and of the first its tenth part.
        if not self._told_left and 10 * steps >= self._steps:
            self._told_left = True
            self._line(f"All {self._time_left.runs} runs: {left[0]}")

    def _tell(self, remark: str, whose: str = "") -> None:
        """Once, also where several runs share the data."""
        if not self.quiet and remark not in self._told:
            self._told.add(remark)
            self.console.print(whose + remark, highlight=False, markup=False)


def _test_loss(loss: float) -> str:
    """Nothing where none was measured."""
    return "" if math.isnan(loss) else f" test loss {loss:.4f},"


def token_line(statistics: dict[str, dict[str, Any]]) -> str:
    """What a run trains on, in a line; ``statistics`` as ``Task.statistics`` gives them."""
    train = statistics["train"]
    measured = "" if train["measured"] == train["examples"] else f"the first {train['measured']:,} have "
    length = train["length"]
    return (
        f"{train['examples']:,} training examples; {measured}{train['tokens']:,} tokens, of which the loss "
        f"counts {train['labelled_tokens']:,}; length {length['median']} in the median, {length['max']} at "
        f"most; {round(train['share_cut'] * train['measured']):,} cut"
    )


def token_table(name: str, statistics: dict[str, dict[str, Any]]) -> Table:
    """The same for every split, as a table."""
    lengths, rows = ("min", "median", "p95", "max"), []
    for split, numbers in statistics.items():
        counts = (f"{numbers[key]:,}" for key in ("examples", "measured", "tokens", "labelled_tokens"))
        cut = percent(numbers["share_cut"], 1)
        rows.append([split, *counts, cut, *(str(numbers["length"][key]) for key in lengths)])
    header = ("split", "examples", "measured", "tokens", "labelled", "cut", *lengths)
    return bare_table(header, rows, title=name)


def how_it_ended(result: RunResult, method: str = "lora") -> list[str]:
    """A finished run in lines: why it ended, what it cost, where its files are."""
    lines = [
        f"{result.stopped_because} after {result.optimizer_steps} steps:{_test_loss(result.test_loss)} "
        f"{result.seconds['total']:.1f} s, {result.flops['measured']:.3g} FLOPs (measured)"
    ]
    if result.stopped_because == NOT_FINITE:
        unsaved = "These weights were not saved, nor an earlier checkpoint replaced; the log is"
        return [*lines, f"{unsaved} {result.log}.", "Try a lower learning rate."]
    saved, loaded = "adapter", "PeftModel.from_pretrained"
    if method not in ADAPTERS:
        saved, loaded = "model", f"--model {result.folder}, or from_pretrained"
    lines.append(f"The {saved} is in {result.folder} ({loaded}), the log in {result.log}.")
    return [*lines, "Go on with the same command and --resume."] if result.interrupted else lines
