"""The options that every analyze command shares, and the training settings they come to.

    @shared_options(omit=("steps",), lr=3e-4)
    def tau_sweep(ctx: typer.Context, at: Annotated[str, typer.Option(help="…")] = "6,12,24") -> None:
        config = settings(ctx)

``shared_options`` puts the options below behind the command's own, with the defaults given there, and
``settings`` reads them from the context. Only typer is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ffkernels.training import options

if TYPE_CHECKING:
    from ffkernels.training.config import TrainConfig

__all__ = ["integers", "settings", "shared_options"]

Command = Callable[..., None]

Out = Annotated[Path, typer.Option(help="Folder of the JSON file and the picture.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress line.")]

# Name: (type with its help, default).
SHARED: dict[str, tuple[Any, Any]] = {
    "preset": (options.Preset, None),
    "model": (options.Model, "tiny"),
    "task": (options.TaskName, "instruction"),
    "source": (options.Source, "offline"),
    "chat_loss": (options.ChatLoss, "all"),
    "data": (options.Data, None),
    "test_data": (options.TestData, None),
    "method": (options.Method, "lora"),
    "rank": (options.Rank, 8),
    "alpha": (options.Alpha, 16.0),
    "dropout": (options.Dropout, 0.0),
    "target_modules": (options.TargetModules, None),
    "lr": (options.Lr, 1e-4),
    "warmup_steps": (options.WarmupSteps, 8),
    "batch_size": (options.BatchSize, 64),
    "micro_batch_size": (options.MicroBatchSize, None),
    "steps": (options.Steps, 120),
    "max_length": (options.MaxLength, 64),
    "test_examples": (options.TestExamples, 1000),
    "validation_examples": (options.ValidationExamples, 32),
    "eval_tokens": (options.EvalTokens, None),
    "search": (options.Search, "parabolic"),
    "interval": (options.Interval, 6),
    "max_tau": (options.MaxTau, 1024),
    "seed": (options.Seed, 0),
    "attn": (options.Attn, None),
    "device": (options.Device, "auto"),
    "dtype": (options.Dtype, "float32"),
    "threads": (options.Threads, None),
    "out": (Out, Path("runs/analyze")),
    "quiet": (Quiet, False),
}


def shared_options(*, omit: Iterable[str] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Give a command that takes the context and options of its own the shared options too.

    ``omit`` names shared options the command has no use for, the keywords change defaults. An option of the
    command's own replaces the shared one of its name.
    """
    omit = set(omit)
    unknown = sorted((omit | defaults.keys()) - SHARED.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no shared option; there are {', '.join(SHARED)}")

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        own = list(inspect.signature(command).parameters.values())
        names = {parameter.name for parameter in own}
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=kind, annotation=hints[p.name]) for p in own]
        for name, (annotation, default) in SHARED.items():
            if name not in omit and name not in names:
                default = defaults.get(name, default)
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))

        @wraps(command)
        def with_shared(**values: Any) -> None:
            command(**{name: value for name, value in values.items() if name in names})

        with_shared.__signature__ = inspect.Signature(parameters)
        with_shared.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_shared

    return decorate


def settings(ctx: typer.Context) -> TrainConfig:
    """The training run that the command's options describe, with Fast Forward.

    It is never switched off for good (``patience=None``), unless the command has that option: an analysis
    wants every stage.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    fixed = {} if "patience" in ctx.params else {"patience": None}
    config = options.training(ctx, fast_forward=options.stages(ctx, **fixed))
    if config.test_examples == 0:
        raise ValueError("test_examples=0: must be at least 1: an analysis measures test losses")
    return config


def integers(text: str, option: str, low: int = 1) -> tuple[int, ...]:
    """``"6,12,24"`` as rising integers of at least ``low``; an error names the ``option``."""
    try:
        values = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        values = ()
    if not values or values[0] < low:
        raise ValueError(f"{option}={text!r}: must be integers of at least {low}, such as 6,12,24")
    return values
