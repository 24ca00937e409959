"""The options that commands share, and the settings that a command line comes to.

    @app.command()
    def tokens(ctx: typer.Context, model: Model = "tiny", preset: Preset = None) -> None:
        config = training(ctx)

A command names its options; ``training`` and ``stages`` read their values from the context, where it also
stands which of them were given: a preset replaces the others. Only typer is imported here, so that ``--help``
is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ffkernels.engine.config import FastForwardConfig
    from ffkernels.training.config import TrainConfig

Preset = Annotated[
    str | None,
    typer.Option(
        help="Settings of the authors' script, authors-MODEL-TASK, or the paper's tables, paper-MODEL-TASK: "
        "of pythia-1.4b, -2.8b, -6.9b or llama3-8b and medical, instruction or chat. Options that are given "
        "as well win over them."
    ),
]
Model = Annotated[
    str, typer.Option(help="'tiny' (embedded), 'smollm2-135m', a folder, or a Hugging Face hub id.")
]
Attn = Annotated[
    str | None,
    typer.Option(help="Attention: sdpa, eager or flash_attention_2 (default: transformers' choice)."),
]
TaskName = Annotated[str, typer.Option(help="Data set: instruction, medical or chat.")]
Source = Annotated[
    str,
    typer.Option(help="Where a task's data come from: offline (embedded, or a PyPI package) or hub."),
]
ChatLoss = Annotated[
    str, typer.Option(help="What counts of the chat task: all tokens, or what the assistant says.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="File of JSON lines, instead of --task: text; prompt and response or completion; messages; "
        "ShareGPT's conversations; Alpaca's instruction, input, output."
    ),
]
TestData = Annotated[
    Path | None,
    typer.Option(help="With --data: the file that is tested on, --test-examples of it at most."),
]
Method = Annotated[
    str,
    typer.Option(
        help="What trains: a lora or dora adapter; full: every weight; full-attention: the weights of the "
        "attention projections."
    ),
]
Rank = Annotated[int, typer.Option(help="Rank of the adapter.")]
Alpha = Annotated[float, typer.Option(help="Scale of the adapter; it acts times alpha/rank.")]
Dropout = Annotated[float, typer.Option(help="Dropout on the adapter's input.")]
TargetModules = Annotated[
    str | None,
    typer.Option(help="Modules that train, comma-separated (default: attention projections)."),
]
Lr = Annotated[float, typer.Option(help="Learning rate after warm-up.")]
LrOrAuto = Annotated[
    str,
    typer.Option(
        help="Learning rate after warm-up; or auto: none to choose, it rises from far below and is moved by "
        "how each gradient agrees with the last update, with or without Fast Forward's stages."
    ),
]
Optimizer = Annotated[
    str, typer.Option(help="adamw, or lora-plus: a higher learning rate for the adapters' B matrices.")
]
LoraPlusRatio = Annotated[float, typer.Option(help="LoRA+: how many times as high that one is.")]
Schedule = Annotated[
    str, typer.Option(help="Learning rate over the steps: constant, linear or cosine (to 0).")
]
WarmupSteps = Annotated[int, typer.Option(help="Optimizer steps over which the learning rate rises.")]
BatchSize = Annotated[int, typer.Option(help="Examples per optimizer step.")]
MicroBatchSize = Annotated[
    int | None, typer.Option(help="Examples per forward and backward pass (default: the whole batch).")
]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the training data, instead of --steps.")]
MaxLength = Annotated[int, typer.Option(help="Tokens per example at most.")]
EvalTokens = Annotated[
    int | None,
    typer.Option(
        help="Padded tokens per forward of validation and test losses at most; changes memory and time, not "
        "the losses (default: 2048 on a CPU, 16384 elsewhere)."
    ),
]
TestExamples = Annotated[
    int,
    typer.Option(help="Held-out examples for the test loss, which is charged to nobody; 0: none."),
]
ValidationExamples = Annotated[int, typer.Option(help="Held-out examples Fast Forward searches with.")]
ResampleValidation = Annotated[
    int | None,
    typer.Option(
        help="Draw the --validation-examples anew before each Fast Forward stage, from so many held out "
        "instead (default: the same in every stage)."
    ),
]
Interval = Annotated[int, typer.Option(help="Optimizer steps from one Fast Forward stage to the next.")]
StageWarmup = Annotated[int, typer.Option(help="Optimizer steps before the first interval begins.")]
MaxTau = Annotated[int, typer.Option(help="Fast Forward steps per stage at most.")]
Patience = Annotated[
    str,
    typer.Option(
        help="auto: a stage where the agreement of gradients and updates says that it pays. A number: switch "
        "Fast Forward off after so many stages in a row without a step; 0 never does."
    ),
]
Impl = Annotated[str, typer.Option(help="What moves the weights: auto, torch, cpp, triton or cuda.")]
Search = Annotated[str, typer.Option(help="Fast Forward's search: parabolic or linear (the paper's).")]
Seeds = Annotated[str, typer.Option(help="How many (3: seeds 0, 1, 2), or which (0,7 or 7,).")]
Seed = Annotated[int, typer.Option(help="Of data split and order, adapter and dropout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[
    str, typer.Option(help="Of the frozen base model: float32, bfloat16 or float16; what trains is float32.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: torch's choice).")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]

# compare's --search: it runs each of them.
BOTH = "both"

AUTO = "auto"  # --lr, and FastForwardConfig.learning_rate

# Fields whose options are called otherwise.
OPTION = {"targets": "target_modules", "warmup": "stage_warmup", "peers": "peer", "searches": "search"}


def training(ctx: typer.Context, **fixed: Any) -> TrainConfig:
    """The training run that the command's options describe, without Fast Forward.

    A preset's values replace those of the options that were not given. ``fixed`` fields are the command's.

    Raises:
        ValueError: naming the field, the value and what is allowed; or an option that nothing would read.
    """
    from dataclasses import fields

    from ffkernels.training.config import TrainConfig

    names = [field.name for field in fields(TrainConfig) if field.name != "fast_forward"]
    values = {n: ctx.params[OPTION.get(n, n)] for n in names if OPTION.get(n, n) in ctx.params}
    for name in ("out", "data", "test_data"):
        if values.get(name) is not None:
            values[name] = str(values[name])
    if values.get("targets") is not None:
        values["targets"] = tuple(part.strip() for part in values["targets"].split(","))
    if values.get("lr") == AUTO:
        del values["lr"]  # any does: the groups' ratios are what is taken of it
    elif "lr" in values:
        values["lr"] = _number(values["lr"])
    if ctx.params.get("preset") is not None:
        values |= {n: value for n, value in preset_values(ctx).items() if n in names}
    config = TrainConfig(**{**values, **fixed})
    _refuse_meaningless(ctx, config)
    return config


def stages(ctx: typer.Context, **fixed: Any) -> FastForwardConfig:
    """When and how to Fast Forward, from the command's options and the preset's values for the others.

    ``fixed`` values are the command's.
    """
    from dataclasses import fields

    from ffkernels.engine.config import FastForwardConfig

    names = [field.name for field in fields(FastForwardConfig)]
    values = {n: ctx.params[OPTION.get(n, n)] for n in names if OPTION.get(n, n) in ctx.params}
    if "patience" in values:
        values["patience"] = _patience(values["patience"])
    of_preset = preset_values(ctx).get("fast_forward") if ctx.params.get("preset") is not None else None
    if of_preset is not None:
        values |= {n: getattr(of_preset, n) for n in names if not _given(ctx, n)}
    if ctx.params.get("lr") == AUTO:
        values["learning_rate"] = AUTO
    return FastForwardConfig(**{**values, **fixed})


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
    """The preset's values, but for those that the command line gives itself."""
    from ffkernels.training.presets import preset

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
    for unread, fields, because in (
        (config.method == "full", (*adapter, "targets"), f"{no_adapter} that it could be for"),
        (config.method == "full-attention", adapter, f"{no_adapter} that it could be for"),
        (config.data is not None, of_tasks, "--data is trained on instead of a task"),
        (config.task != "chat", ("chat_loss",), f"task={config.task!r} is no chat"),
        (not lora_plus, ("lora_plus_ratio",), "there is no optimizer lora-plus that it could be for"),
        (bool(_given(ctx, "epochs")), ("steps",), "--epochs says how long to train"),
    ):
        if unread and (wrong := _given(ctx, *fields)):
            raise ValueError(f"--{wrong[0].replace('_', '-')}: {because}; leave it out")
