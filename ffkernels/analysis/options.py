"""The options that every analyze command shares, and the training settings they come to.

    @shared_options(steps=48, omit=("schedule",))
    def tau_sweep(flags: dict[str, Any], at: Annotated[str, typer.Option(help="…")] = "6,12,24") -> None:
        config = settings(**flags)

``shared_options`` puts the options below behind the command's own, with the defaults given there; the command
gets their values as the dict ``flags``. Only typer is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from ffkernels.training.config import TrainConfig

__all__ = ["integers", "seeds_of", "settings", "shared_options"]

Command = Callable[..., None]

# Name: (type with its help, default).
SHARED: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[
            str, typer.Option(help="'tiny' (embedded), 'smollm2-135m', a folder, or a Hugging Face hub id.")
        ],
        "tiny",
    ),
    "task": (
        Annotated[str, typer.Option(help="Data set: 'instruction', 'medical' or 'chat'.")],
        "instruction",
    ),
    "source": (
        Annotated[str, typer.Option(help="Where a task's data come from: 'offline' or 'hub'.")],
        "offline",
    ),
    "data": (
        Annotated[
            Path | None,
            typer.Option(help="JSONL file with text, prompt/response or messages lines, instead of --task."),
        ],
        None,
    ),
    "method": (
        Annotated[str, typer.Option(help="What trains: lora, dora, full or full-attention.")],
        "lora",
    ),
    "rank": (Annotated[int, typer.Option(help="Rank of the adapter.")], 8),
    "alpha": (Annotated[float, typer.Option(help="Scale of the adapter; it acts times alpha/rank.")], 16.0),
    "lr": (Annotated[float, typer.Option(help="Learning rate after warm-up.")], 1e-4),
    "warmup_steps": (
        Annotated[int, typer.Option(help="Optimizer steps over which the learning rate rises.")],
        8,
    ),
    "batch_size": (Annotated[int, typer.Option(help="Examples per optimizer step.")], 64),
    "micro_batch_size": (
        Annotated[
            int | None,
            typer.Option(help="Examples per forward and backward pass (default: the whole batch)."),
        ],
        None,
    ),
    "steps": (Annotated[int, typer.Option(help="Optimizer steps.")], 120),
    "max_length": (Annotated[int, typer.Option(help="Tokens per example at most.")], 64),
    "test_examples": (Annotated[int, typer.Option(help="Held-out examples for the test loss.")], 1000),
    "validation_examples": (
        Annotated[int, typer.Option(help="Held-out examples Fast Forward searches with.")],
        32,
    ),
    "search": (
        Annotated[str, typer.Option(help="Fast Forward's search: parabolic or linear (the paper's).")],
        "parabolic",
    ),
    "interval": (
        Annotated[int, typer.Option(help="Optimizer steps from one Fast Forward stage to the next.")],
        6,
    ),
    "max_tau": (Annotated[int, typer.Option(help="Fast Forward steps per stage at most.")], 1024),
    "seed": (Annotated[int, typer.Option(help="Of data split and order, adapter and dropout.")], 0),
    "attn": (
        Annotated[
            str | None,
            typer.Option(help="Attention: sdpa, eager or flash_attention_2 (default: the model's own)."),
        ],
        None,
    ),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")], "auto"),
    "dtype": (
        Annotated[str, typer.Option(help="Of the frozen base model: float32, bfloat16 or float16.")],
        "float32",
    ),
    "threads": (Annotated[int | None, typer.Option(help="CPU threads (default: torch's choice).")], None),
    "out": (
        Annotated[Path, typer.Option(help="Folder of the JSON file and the picture.")],
        Path("runs/analyze"),
    ),
    "quiet": (Annotated[bool, typer.Option("--quiet", help="No progress line.")], False),
}
STAGE_FLAGS = ("search", "interval", "max_tau")
NOT_SETTINGS = (*STAGE_FLAGS, "out", "quiet")


def shared_options(*, omit: Iterable[str] = (), **defaults: Any) -> Callable[[Command], Command]:
    """Give a command that takes ``flags`` and options of its own the shared options too.

    ``omit`` names shared options the command has no use for (``settings`` then takes their default), the
    keywords change defaults. An option of the command's own replaces the shared one of its name.
    """
    omit = set(omit)
    unknown = sorted((omit | defaults.keys()) - SHARED.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no shared option; there are {', '.join(SHARED)}")

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command).parameters.values())[1:]
        hints = get_type_hints(command, include_extras=True)
        names = {parameter.name for parameter in own}
        shared = [name for name in SHARED if name not in omit and name not in names]

        @wraps(command)
        def with_flags(**values: Any) -> None:
            flags = {name: values.pop(name) for name in shared}
            command(flags, **values)

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=kind, annotation=hints[p.name]) for p in own]
        for name in shared:
            annotation, default = SHARED[name]
            default = defaults.get(name, default)
            parameters.append(inspect.Parameter(name, kind, default=default, annotation=annotation))
        with_flags.__signature__ = inspect.Signature(parameters)
        with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_flags

    return decorate


def settings(**flags: Any) -> TrainConfig:
    """The training run that the shared options describe, with Fast Forward; what is not given is default.

    Fast Forward is never switched off for good (``patience=None``): an analysis wants every stage. Keywords
    that are no shared option are fields of ``TrainConfig`` or ``FastForwardConfig``.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    from dataclasses import fields

    from ffkernels.engine.config import FastForwardConfig
    from ffkernels.training.config import TrainConfig

    flags = {**{name: default for name, (_, default) in SHARED.items()}, **flags}
    if flags["data"] is not None:
        flags["data"] = str(flags["data"])
    of_stages = {f.name for f in fields(FastForwardConfig)} - {"warmup"}  # --warmup-steps is another thing
    stages = {name: flags.pop(name) for name in list(flags) if name in of_stages}
    stages = {"patience": None, **stages}
    training = {name: value for name, value in flags.items() if name not in NOT_SETTINGS}
    return TrainConfig(fast_forward=FastForwardConfig(**stages), **training)


def integers(text: str, option: str, low: int = 1) -> tuple[int, ...]:
    """``"6,12,24"`` as rising integers of at least ``low``; an error names the ``option``."""
    try:
        values = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        values = ()
    if not values or values[0] < low:
        raise ValueError(f"{option}={text!r}: must be integers of at least {low}, such as 6,12,24")
    return values


def seeds_of(text: str) -> tuple[int, ...]:
    """``"3"`` is three seeds 0, 1, 2; ``"0,7"`` and ``"7,"`` name them."""
    try:
        if "," in text:
            seeds = tuple(int(part) for part in text.split(",") if part.strip())
        else:
            seeds = tuple(range(int(text)))
    except ValueError:
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={text!r}: must be a count such as 3, or a list such as 0,7 or 0,")
    return seeds
