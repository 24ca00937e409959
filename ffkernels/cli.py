"""The command line: ``ffkernels compare | train | tokens | report | analyze | doctor``.

Only typer is imported here; a command imports what it needs when it runs, so that ``--help`` is quick. The
options that commands share are in ``training/options.py``, where their values become settings.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from ffkernels.analysis.commands import app as analyze
from ffkernels.analysis.show import INTERRUPTED
from ffkernels.training import options

__all__ = ["app", "run"]

USER_ERROR = 2

app = typer.Typer(
    name="ffkernels",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fast Forward low-rank fine-tuning: compare it, train with it, report on runs, see what runs here.",
)
app.add_typer(analyze)


@app.command()
def compare(
    ctx: typer.Context,
    preset: options.Preset = None,
    model: options.Model = "tiny",
    attn: options.Attn = None,
    task: options.TaskName = "instruction",
    source: options.Source = "offline",
    chat_loss: options.ChatLoss = "all",
    data: options.Data = None,
    test_data: options.TestData = None,
    lr: options.Lr = 1e-4,
    steps: options.Steps = 120,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = 64,
    micro_batch_size: options.MicroBatchSize = None,
    seeds: options.Seeds = "1",
    search: Annotated[str, typer.Option(help="Fast Forward's searches: both, linear or parabolic.")] = "both",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside them: authors or peft-prototype (other Fast Forward loops, which take --interval "
            "and no other option of stages), salsa (a line search); all three need the repository; or "
            "lora-plus (an optimizer). Repeatable."
        ),
    ] = None,
    method: options.Method = "lora",
    rank: options.Rank = 8,
    alpha: options.Alpha = 16.0,
    dropout: options.Dropout = 0.0,
    target_modules: options.TargetModules = None,
    optimizer: options.Optimizer = "adamw",
    lora_plus_ratio: options.LoraPlusRatio = 16.0,
    schedule: options.Schedule = "constant",
    warmup_steps: options.WarmupSteps = 8,
    max_length: options.MaxLength = 64,
    test_examples: options.TestExamples = 1000,
    validation_examples: options.ValidationExamples = 32,
    eval_tokens: options.EvalTokens = None,
    interval: options.Interval = 6,
    stage_warmup: options.StageWarmup = 0,
    max_tau: options.MaxTau = 1024,
    patience: options.Patience = "auto",
    impl: options.Impl = "auto",
    tuned_lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the tuned Adam row (default: for tiny as measured, 1e-2 on instruction, "
            "2e-2 on the others, called untuned at another batch size, length, schedule or dtype; for other "
            "models, data and adapters 3e-3, called untuned; where whole weights train --sweep)."
        ),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Find the tuned learning rate first, from 1e-5 to 2e-2; takes longer."),
    ] = False,
    evaluate_every: Annotated[int, typer.Option(help="Adam run: optimizer steps between test losses.")] = 10,
    check_every: Annotated[
        int, typer.Option(help="Runs with a target: optimizer steps between test losses.")
    ] = 3,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    out: Annotated[Path, typer.Option(help="Folder of logs and report; overwritten.")] = Path("runs/compare"),
    quiet: options.Quiet = False,
) -> None:
    """Adam against Fast Forward to the same test loss, in FLOPs and in seconds: the paper's protocol.

    Adam runs --steps; its final test loss is the target. Fast Forward runs until it is there, with the
    paper's linear search and with the parabolic one; then Adam with no learning rate given, as in train --lr
    auto; then Adam with a tuned learning rate, which is what you would try first: see --tuned-lr and --sweep.
    """
    from ffkernels.reporting.machine import command_line
    from ffkernels.training.compare import Comparison, Interrupted
    from ffkernels.training.compare import compare as run_comparison
    from ffkernels.training.progress import ProgressBars

    base = options.training(ctx)
    searches = ("linear", "parabolic") if search == options.BOTH else (search,)
    comparison = Comparison(
        base,
        seeds=options.seeds_of(seeds),
        searches=searches,
        peers=tuple(peer or ()),
        fast_forward=options.stages(ctx, search=searches[0]),
        tuned_lr=tuned_lr,
        sweep=sweep,
        check_every=check_every,
    )
    console = _console()
    try:
        with ProgressBars(console, quiet, tokens=True, runs=comparison.runs) as bars:
            results, protocol = run_comparison(comparison, on_run=bars.start, on_event=bars.event)
    except Interrupted as error:
        typer.echo(f"interrupted in {error}; finished runs are in {out}: ffkernels report {out}/*.jsonl")
        raise typer.Exit(INTERRUPTED) from None
    provenance = {"command": command_line(sys.argv[1:]), "date": date.today().isoformat()}
    _write_report([result.log for result in results], out, {**provenance, **base.to_dict(), **protocol})


@app.command()
def train(
    ctx: typer.Context,
    preset: options.Preset = None,
    model: options.Model = "tiny",
    attn: options.Attn = None,
    task: options.TaskName = "instruction",
    source: options.Source = "offline",
    chat_loss: options.ChatLoss = "all",
    data: options.Data = None,
    test_data: options.TestData = None,
    fast_forward: Annotated[
        bool,
        typer.Option(
            "--fast-forward/--no-fast-forward",
            help="Fast Forward, or the plain optimizer, which has no stages to set anything of.",
        ),
    ] = True,
    search: options.Search = "parabolic",
    interval: options.Interval = 6,
    stage_warmup: options.StageWarmup = 0,
    max_tau: options.MaxTau = 1024,
    patience: options.Patience = "auto",
    impl: options.Impl = "auto",
    method: options.Method = "lora",
    rank: options.Rank = 8,
    alpha: options.Alpha = 16.0,
    dropout: options.Dropout = 0.0,
    target_modules: options.TargetModules = None,
    lr: options.LrOrAuto = "1e-4",
    optimizer: options.Optimizer = "adamw",
    lora_plus_ratio: options.LoraPlusRatio = 16.0,
    schedule: options.Schedule = "constant",
    warmup_steps: options.WarmupSteps = 8,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip the gradient's norm (default: no).")
    ] = None,
    steps: options.Steps = 120,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = 64,
    micro_batch_size: options.MicroBatchSize = None,
    max_length: options.MaxLength = 64,
    test_examples: options.TestExamples = 1000,
    validation_examples: options.ValidationExamples = 32,
    resample_validation: options.ResampleValidation = None,
    eval_tokens: options.EvalTokens = None,
    evaluate_every: Annotated[
        int, typer.Option(help="Optimizer steps between test losses; 0: at both ends.")
    ] = 10,
    target_loss: Annotated[float | None, typer.Option(help="Stop at this test loss (default: no).")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Optimizer steps between checkpoints; 0: at the end.")
    ] = 0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    threads: options.Threads = None,
    name: Annotated[str, typer.Option(help="The run's name.")] = "run",
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run's checkpoint stands.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Fine-tune, by default an adapter and with Fast Forward; writes OUT/NAME.jsonl and OUT/NAME/."""
    from ffkernels.training.checkpoint import on_disk
    from ffkernels.training.progress import ProgressBars, how_it_ended
    from ffkernels.training.trainer import train as run_training

    if not fast_forward and resample_validation is not None:
        raise ValueError("--resample-validation is Fast Forward's: leave out --no-fast-forward")
    stages = options.stages(ctx) if fast_forward else None
    if not fast_forward and lr == options.AUTO:
        stages = options.stages(ctx, interval=None)
    config = options.training(ctx, fast_forward=stages)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: give one of them")
    log = out / f"{name}.jsonl"
    if log.exists() and log.stat().st_size and not resume and not overwrite:
        raise ValueError(f"{log} exists: --resume goes on, --overwrite replaces it, or take another --name")
    console = _console()
    try:
        with ProgressBars(console, quiet, tokens=True) as bars:
            bars.start(config)
            result = run_training(config, resume=resume, on_event=bars.event)
    except KeyboardInterrupt:  # the second, or one before the first step
        typer.echo(f"Ended at once. {on_disk(out / name)}")
        raise typer.Exit(INTERRUPTED) from None
    for line in how_it_ended(result, config.method):
        typer.echo(line)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
def tokens(
    ctx: typer.Context,
    preset: options.Preset = None,
    model: options.Model = "tiny",
    task: options.TaskName = "instruction",
    source: options.Source = "offline",
    chat_loss: options.ChatLoss = "all",
    data: options.Data = None,
    test_data: options.TestData = None,
    max_length: options.MaxLength = 64,
    test_examples: options.TestExamples = 1000,
    validation_examples: options.ValidationExamples = 32,
    seed: options.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """How many tokens a task has under a model's tokenizer, and what --max-length cuts off."""
    import json

    from ffkernels.training.models import load_tokenizer
    from ffkernels.training.progress import token_table
    from ffkernels.training.session import prepare_task

    config = options.training(ctx)
    prepared = prepare_task(config, load_tokenizer(config.model))
    statistics = prepared.statistics()
    if as_json:
        typer.echo(json.dumps(statistics, indent=2))
    else:
        _console().print(token_table(prepared.name, statistics))
    for remark in prepared.remarks:
        typer.echo(remark, err=as_json)


@app.command()
def report(
    logs: Annotated[list[Path], typer.Argument(help="Run logs: runs/*.jsonl")],
    out: Annotated[Path, typer.Option(help="Folder for report and plots.")] = Path("report"),
) -> None:
    """FLOPs and seconds of finished runs: a table here, and report.md, report.json and plots in OUT."""
    missing = [str(log) for log in logs if not log.is_file()]
    if missing:
        raise ValueError(f"no such run log: {', '.join(missing)}")
    _write_report(logs, out, None)


@app.command()
def doctor(
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Compile the C++ ops, and with nvcc the CUDA ones, into your cache first."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    device: options.Device = "auto",
) -> None:
    """Which kernels and which executor would run here, why, and how to get the faster ones."""
    import json

    from ffkernels import ops
    from ffkernels.doctor import describe, diagnose

    if build:
        # Who asks may have added a compiler's OpenMP runtime or a newer toolkit since.
        cuda = [ops.build_cuda(again=True)] if ops.find_nvcc() else []
        for path in (ops.build_native(again=True), *cuda):
            if not as_json:
                typer.echo(f"built {path}")
    diagnosis = diagnose(device)
    typer.echo(json.dumps(diagnosis, indent=2) if as_json else describe(diagnosis))


def _write_report(logs: list[Path], out: Path, config: dict[str, Any] | None) -> None:
    from ffkernels.reporting.recorder import read_run
    from ffkernels.reporting.report import build_report, print_table

    built = build_report([read_run(log) for log in logs], out, config=config)
    print_table(built, _console())
    typer.echo(f"\nThe report is in {out}: report.md, report.json and the plots.")


def _console() -> Any:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no width; the table needs this much
    return console


def run(arguments: list[str] | None = None) -> None:
    """The ``ffkernels`` command: one clear line and exit code 2 where the user can help it."""
    _show_notices_as_lines()
    try:
        app(arguments, standalone_mode=True)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FFKERNELS_TRACEBACK") or not _users(error):
            raise
        typer.echo(f"ffkernels: {_in_options(str(error))}", err=True)
        sys.exit(USER_ERROR)


def _in_options(message: str) -> str:
    """A message that begins with a setting, ``eval_tokens=0``, with the option of that setting."""
    field, equals, rest = message.partition("=")
    name = options.OPTION.get(field, field)
    commands = typer.main.get_command(app).commands.values()
    option = next((p.opts[0] for command in commands for p in command.params if p.name == name), None)
    return f"{option}={rest}" if equals and option else message


def _show_notices_as_lines() -> None:
    """A notice of this package is meant for the person at the terminal: without file, line and source."""
    show = warnings.showwarning

    def show_notice(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__name__ == "FFKernelsNotice":
            typer.echo(f"note: {message}", err=True)
        else:
            show(message, category, *where, **more)

    warnings.showwarning = show_notice


def _users(error: Exception) -> bool:
    """Whether this package or a peer raised the error itself, for the user to read.

    Others keep their traceback.
    """
    if isinstance(error, OSError):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    package = Path(__file__).parent
    ours = (package, package.parent / "benchmarks" / "peers")
    return any(Path(raised_in).is_relative_to(folder) for folder in ours)
