"""The options that commands share, and the settings that a command line comes to.

    @app.command()
    @taking("preset model lr")
    def tokens(ctx: typer.Context) -> None:
        config = training(ctx)

Their defaults stand in ``TrainConfig`` and ``FastForwardConfig``. ``training`` and ``stages`` read from
the context also which of them were given: a preset replaces the others. No torch is imported here, for
``--help``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.config import TrainConfig

# compare's --search: it runs each of them.
BOTH = "both"

AUTO = "auto"  # --lr, and FastForwardConfig.learning_rate

# Fields whose options are called otherwise.
OPTION = {"targets": "target_modules", "warmup": "stage_warmup", "peers": "peer", "searches": "search"}

# Options whose text becomes a field's value below, or that are shown as paths.
_KINDS = {"out": Path, "data": Path | None, "test_data": Path | None, "targets": str | None}

# Of FastForwardConfig's fields, what their options say.
_STAGES = {
    "search": (str, "Fast Forward's search: parabolic or linear (the paper's)."),
    "interval": (int, "Optimizer steps from one Fast Forward stage to the next."),
    "warmup": (int, "Optimizer steps before the first interval begins."),
    "max_tau": (int, "Fast Forward steps per stage at most."),
    "patience": (
        str,
        "auto: a stage where the agreement of gradients and updates says that it pays. A number: switch "
        "Fast Forward off after so many stages in a row without a step; 0 never does.",
    ),
    "impl": (str, "What moves the weights: auto, torch, cpp, triton or cuda."),
}


def _options() -> dict[str, tuple[Any, Any]]:
    """By name, each option's type with its help, and its default."""
    kinds, stages = get_type_hints(TrainConfig), {field.name: field for field in fields(FastForwardConfig)}
    found = {
        field.name: (_KINDS.get(field.name, kinds[field.name]), field.metadata["help"], field.default)
        for field in fields(TrainConfig)
        if field.name != "fast_forward"
    }
    found |= {name: (kind, help, stages[name].default) for name, (kind, help) in _STAGES.items()}
    return {
        OPTION.get(name, name): (Annotated[kind, typer.Option(help=help)], default)
        for name, (kind, help, default) in found.items()
    }


OPTIONS = _options() | {
    "preset": (
        Annotated[
            str | None,
            typer.Option(
                help="Settings of the authors' script, authors-MODEL-TASK, or the paper's tables, "
                "paper-MODEL-TASK: of pythia-1.4b, -2.8b, -6.9b or llama3-8b and medical, instruction or "
                "chat. Options that are given as well win over them."
            ),
        ],
        None,
    ),
    "seeds": (
        Annotated[str, typer.Option(help="How many (3: seeds 0, 1, 2), or which (0,7 or 7,).")],
        "1",
    ),
    "quiet": (Annotated[bool, typer.Option("--quiet", help="No progress bar.")], False),
}


def taking(names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, which takes the context and options of its own, those of ``OPTIONS`` before them.

    The command finds the values of these options in its context.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters

        @wraps(command)
        def with_shared(**values: Any) -> None:
            command(**{name: values[name] for name in own})

        shared = {name: OPTIONS[name] for name in names.split()}
        return declared(with_shared, shared | {name: (p.annotation, p.default) for name, p in own.items()})

    return decorate


def declared(command: Callable[..., None], parameters: Mapping[str, tuple[Any, Any]]) -> Callable[..., None]:
    """``command`` as typer is to see it: with keyword ``parameters``, by name their type and default."""
    command.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for name, (annotation, default) in parameters.items()
    )
    return command


def training(ctx: typer.Context, **fixed: Any) -> TrainConfig:
    """The training run that the command's options describe, without Fast Forward.

    A preset's values replace those of the options that were not given. ``fixed`` fields are the command's.

    Raises:
        ValueError: naming the field, the value and what is allowed; or an option that nothing would read.
    """
    values = _values(ctx, TrainConfig)
    values |= {name: str(value) for name, value in values.items() if isinstance(value, Path)}
    if values.get("targets") is not None:
        values["targets"] = tuple(part.strip() for part in values["targets"].split(","))
    if values.get("lr") == AUTO:
        del values["lr"]  # any does: the groups' ratios are what is taken of it
    elif "lr" in values:
        values["lr"] = _number(values["lr"])
    config = TrainConfig(**{**values, **preset_values(ctx), "fast_forward": None, **fixed})
    _refuse_meaningless(ctx, config)
    return config


def stages(ctx: typer.Context, **fixed: Any) -> FastForwardConfig:
    """When and how to Fast Forward, from the command's options and the preset's values for the others.

    ``fixed`` values are the command's.
    """
    values = _values(ctx, FastForwardConfig)
    if "patience" in values:
        values["patience"] = _patience(values["patience"])
    if (of_preset := preset_values(ctx).get("fast_forward")) is not None:
        values |= {n: value for n, value in of_preset.to_dict().items() if not _given(ctx, n)}
    if ctx.params.get("lr") == AUTO:
        values["learning_rate"] = AUTO
    return FastForwardConfig(**{**values, **fixed})


def _values(ctx: typer.Context, cls: type) -> dict[str, Any]:
    """The fields of a configuration that have options here."""
    options = {field.name: OPTION.get(field.name, field.name) for field in fields(cls)}
    return {name: ctx.params[option] for name, option in options.items() if option in ctx.params}


def _number(given: str | float) -> float:
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"lr={given!r}: must be a number above 0, or auto") from None


def _patience(given: str | int) -> str | int | None:
    try:
        return int(given) or None
    except ValueError:
        return given  # FastForwardConfig says what is allowed


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


def _given(ctx: typer.Context, *fields: str) -> list[str]:
    """Of these settings, the options that stand on the command line."""
    options = [OPTION.get(field, field) for field in fields]
    return [o for o in options if o in ctx.params and ctx.get_parameter_source(o).name == "COMMANDLINE"]


def preset_values(ctx: typer.Context) -> dict[str, Any]:
    """The preset's values, where there is one, but for those that the command line gives itself."""
    from ffkernels.training.presets import preset

    if ctx.params.get("preset") is None:
        return {}
    values = {name: value for name, value in preset(ctx.params["preset"]).items() if not _given(ctx, name)}
    if _given(ctx, "steps"):
        values.pop("epochs", None)  # they would replace the steps that were asked for
    if _given(ctx, "data"):
        values.pop("task", None)
    return values


def _refuse_meaningless(ctx: typer.Context, config: TrainConfig) -> None:
    """Raise ValueError for options that stand on the command line and that nothing would read."""
    lora_plus = "lora-plus" in (config.optimizer, *(ctx.params.get("peer") or ()))
    adapter, no_adapter = ("rank", "alpha", "dropout"), f"method={config.method!r} has no adapter"
    of_tasks = ("task", "source", "chat_loss")
    for unread, names, because in (
        (config.method == "full", (*adapter, "targets"), f"{no_adapter} that it could be for"),
        (config.method == "full-attention", adapter, f"{no_adapter} that it could be for"),
        (config.data is not None, of_tasks, "--data is trained on instead of a task"),
        (config.task != "chat", ("chat_loss",), f"task={config.task!r} is no chat"),
        (not lora_plus, ("lora_plus_ratio",), "there is no optimizer lora-plus that it could be for"),
        (bool(_given(ctx, "epochs")), ("steps",), "--epochs says how long to train"),
    ):
        if unread and (wrong := _given(ctx, *names)):
            raise ValueError(f"--{wrong[0].replace('_', '-')}: {because}; leave it out")
