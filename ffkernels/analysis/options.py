"""The options that every analyze command shares, and the training settings they come to.

    command(act, {"at": ("6,12,24", "Optimizer steps after which …")}, omit=("steps",), lr=3e-4)

is a command with the option ``--at`` and the shared ones, and of another learning rate; ``act(ctx)`` asks
``settings(ctx)`` for what they come to. Only typer is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ffkernels.training import options

if TYPE_CHECKING:
    from ffkernels.training.config import TrainConfig


OF_TRAINING = (
    "preset model task source chat_loss data test_data method rank alpha dropout target_modules lr "
    "warmup_steps batch_size micro_batch_size steps max_length test_examples validation_examples eval_tokens "
    "search interval max_tau seed attn device dtype threads"
).split()
Out = Annotated[Path, typer.Option(help="Folder of the JSON file and the picture.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress line.")]
# Name: (type with its help, default).
SHARED: dict[str, tuple[Any, Any]] = {name: options.OPTIONS[name] for name in OF_TRAINING}
SHARED |= {"out": (Out, Path("runs/analyze")), "quiet": (Quiet, False)}


def command(
    act: Callable[[typer.Context], None],
    own: Mapping[str, tuple[Any, ...]],
    *,
    omit: Iterable[str] = (),
    **defaults: Any,
) -> Callable[..., None]:
    """``act`` as a typer command that has options of its own and the shared ones, read from the context.

    ``own`` options are (default, help), with a default of None (None, help, type); one of a shared option's
    name replaces it. ``omit`` names shared options of no use here, the keywords change defaults.
    """
    unknown = sorted((set(omit) | defaults.keys()) - SHARED.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no shared option; there are {', '.join(SHARED)}")
    parameters: dict[str, tuple[Any, Any]] = {"ctx": (typer.Context, inspect.Parameter.empty)}
    for name, (default, text, *kind) in own.items():
        annotation = kind[0] | None if kind else type(default)
        parameters[name] = (Annotated[annotation, typer.Option(help=text)], default)
    for name, (annotation, default) in SHARED.items():
        if name not in omit and name not in own:
            parameters[name] = (annotation, defaults.get(name, default))

    def run(ctx: typer.Context, **_: Any) -> None:
        act(ctx)

    return options.declared(run, parameters)


def settings(ctx: typer.Context) -> TrainConfig:
    """The training run that the command's options describe, with Fast Forward.

    It is never switched off for good (``patience=None``), unless the command has that option: an analysis
    wants every stage. ``--no-fast-forward``, where a command has that, leaves the plain optimizer.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    fixed = {} if "patience" in ctx.params else {"patience": None}
    config = options.training(ctx, fast_forward=options.stages(ctx, **fixed))
    if config.test_examples == 0:
        raise ValueError("test_examples=0: must be at least 1: an analysis measures test losses")
    return config if ctx.params.get("fast_forward", True) else replace(config, fast_forward=None)


def integers(text: str, option: str) -> tuple[int, ...]:
    """``"6,12,24"`` as rising integers of at least 1; an error names the ``option``."""
    try:
        values = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        values = ()
    if not values or values[0] < 1:
        raise ValueError(f"{option}={text!r}: must be integers of at least 1, such as 6,12,24")
    return values
