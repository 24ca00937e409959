"""What a person sees while runs go on: a bar in a terminal, a line per run elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ffkernels.training.config import TrainConfig
from ffkernels.training.trainer import NOT_FINITE

if TYPE_CHECKING:
    from ffkernels.training.trainer import RunResult

__all__ = ["ProgressBars", "how_it_ended"]


class ProgressBars:
    """A context manager with one bar per run, fed by the trainer's events.

    ``start(config)`` begins a run; ``event(event)`` is an ``on_event``. With ``quiet`` both do nothing.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self._live = not quiet and console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
        )
        self._task: Any = None
        self._name, self._steps, self._test = "", 0, ""

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def start(self, config: TrainConfig) -> None:
        self._name, self._steps, self._test = config.name, config.steps, ""
        self._task = self._progress.add_task(config.name, total=config.steps, note="")
        if not self._live and not self.quiet:
            until = f" or test loss {config.target_loss:.4f}" if config.target_loss is not None else ""
            length = f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"
            self.console.print(f"{config.name}: {length}{until}", highlight=False)

    def event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "run":
            self._steps = event["config"]["steps"]
            self._progress.update(self._task, total=self._steps)
        elif kind == "test":
            self._test = f"test loss {event['loss']:.4f}"
            self._progress.update(self._task, completed=event["optimizer_step"], note=self._test)
        elif kind == "step":
            self._progress.update(self._task, completed=event["optimizer_step"])
        elif kind == "stage":
            self._progress.update(self._task, note=f"{self._test}  τ = {event['tau']}")
        elif kind == "end":
            # A run that stopped early is done: its bar is full at the steps it needed.
            self._progress.update(
                self._task, completed=event["optimizer_steps"], total=event["optimizer_steps"]
            )
            if not self._live and not self.quiet:
                self.console.print(
                    f"{self._name}: {event['stopped_because']} after {event['optimizer_steps']} steps, "
                    f"test loss {event['test_loss']:.4f}, {event['seconds']['total']:.1f} s",
                    highlight=False,
                )


def how_it_ended(result: RunResult) -> list[str]:
    """A finished run in lines: why it ended, what it cost, where its files are."""
    lines = [
        f"{result.stopped_because} after {result.optimizer_steps} steps: test loss {result.test_loss:.4f}, "
        f"{result.seconds['total']:.1f} s, {result.flops['measured']:.3g} FLOPs (measured)"
    ]
    if result.stopped_because == NOT_FINITE:
        lines.append(
            f"These weights were not saved, nor an earlier checkpoint replaced; the log is {result.log}."
        )
        lines.append("Try a lower learning rate.")
    else:
        lines.append(
            f"The adapter is in {result.folder} (PeftModel.from_pretrained), the log in {result.log}."
        )
    return [*lines, "Go on with the same command and --resume."] if result.interrupted else lines
