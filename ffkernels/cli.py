"""The command line: ``ffkernels compare | train | tokens | report | analyze | doctor``.

A command imports what it needs when it runs, so that ``--help`` is quick. The options that commands share are
in ``training/options.py``, where their values become settings.
"""

from __future__ import annotations

import json
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

USER_ERROR = 2

app = typer.Typer(
    name="ffkernels",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fast Forward low-rank fine-tuning: compare it, train with it, report on runs, see what runs here.",
)
app.add_typer(analyze)

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]

DATA = "task source chat_loss data test_data"
ADAPTER = "method rank alpha dropout target_modules"
OPTIMIZER = "optimizer lora_plus_ratio schedule warmup_steps"
LENGTH = "steps epochs batch_size micro_batch_size max_length"
HELD_OUT = "test_examples validation_examples"
STAGES = "interval stage_warmup max_tau patience impl"
MACHINE = "device dtype threads quiet"


@app.command()
@options.taking(
    f"preset model attn {DATA} lr {LENGTH} seeds {ADAPTER} {OPTIMIZER} {HELD_OUT} eval_tokens {STAGES} "
    f"{MACHINE}"
)
def compare(
    ctx: typer.Context,
    search: Annotated[str, typer.Option(help="Fast Forward's searches: both, linear or parabolic.")] = "both",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Beside them: authors or peft-prototype (other Fast Forward loops, which take --interval "
            "and no other option of stages), salsa (a line search); all three need the repository; or "
            "lora-plus (an optimizer). Repeatable."
        ),
    ] = None,
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
    out: Annotated[Path, typer.Option(help="Folder of logs and report; overwritten.")] = Path("runs/compare"),
) -> None:
    """Adam against Fast Forward to the same test loss, in FLOPs and in seconds: the paper's protocol.

    Adam runs --steps; its final test loss is the target. Fast Forward runs until it is there, with the
    paper's linear search and with the parabolic one; then Adam with no learning rate given, as in train --lr
    auto; then Adam with a tuned learning rate, which is what you would try first: see --tuned-lr and --sweep.
    """
    from ffkernels.reporting.machine import command_line
    from ffkernels.reporting.terminal import wide_console
    from ffkernels.training.compare import Comparison, Interrupted
    from ffkernels.training.compare import compare as run_comparison
    from ffkernels.training.progress import ProgressBars

    base = options.training(ctx)
    searches = ("linear", "parabolic") if search == options.BOTH else (search,)
    comparison = Comparison(
        base,
        seeds=options.seeds_of(ctx.params["seeds"]),
        searches=searches,
        peers=tuple(peer or ()),
        fast_forward=options.stages(ctx, search=searches[0]),
        tuned_lr=tuned_lr,
        sweep=sweep,
        check_every=check_every,
    )
    try:
        with ProgressBars(wide_console(), ctx.params["quiet"], tokens=True, runs=comparison.runs) as bars:
            results, protocol = run_comparison(comparison, on_run=bars.start, on_event=bars.event)
    except Interrupted as error:
        typer.echo(f"interrupted in {error}; finished runs are in {out}: ffkernels report {out}/*.jsonl")
        raise typer.Exit(INTERRUPTED) from None
    provenance = {"command": command_line(sys.argv[1:]), "date": date.today().isoformat()}
    _write_report([result.log for result in results], out, {**provenance, **base.to_dict(), **protocol})


@app.command()
@options.taking(
    f"preset model attn {DATA} search {STAGES} {ADAPTER} {OPTIMIZER} weight_decay max_grad_norm {LENGTH} "
    f"{HELD_OUT} resample_validation eval_tokens evaluate_every target_loss checkpoint_every seed {MACHINE} "
    "name out"
)
def train(
    ctx: typer.Context,
    fast_forward: Annotated[
        bool,
        typer.Option(
            "--fast-forward/--no-fast-forward",
            help="Fast Forward, or the plain optimizer, which has no stages to set anything of.",
        ),
    ] = True,
    lr: Annotated[
        str,
        typer.Option(
            help="Learning rate after warm-up; or auto: none to choose, it rises from far below and is moved "
            "by how each gradient agrees with the last update, with or without Fast Forward's stages."
        ),
    ] = "1e-4",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run's checkpoint stands.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")
    ] = False,
) -> None:
    """Fine-tune, by default an adapter and with Fast Forward; writes OUT/NAME.jsonl and OUT/NAME/."""
    from ffkernels.reporting.terminal import wide_console
    from ffkernels.training.checkpoint import on_disk
    from ffkernels.training.progress import ProgressBars, how_it_ended
    from ffkernels.training.trainer import train as run_training

    if not fast_forward and ctx.params["resample_validation"] is not None:
        raise ValueError("--resample-validation is Fast Forward's: leave out --no-fast-forward")
    stages = options.stages(ctx) if fast_forward else None
    if not fast_forward and lr == options.AUTO:
        stages = options.stages(ctx, interval=None)
    config = options.training(ctx, fast_forward=stages)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: give one of them")
    name, folder = config.name, Path(config.out) / config.name
    log = folder.with_name(f"{name}.jsonl")
    if log.exists() and log.stat().st_size and not resume and not overwrite:
        raise ValueError(f"{log} exists: --resume goes on, --overwrite replaces it, or take another --name")
    try:
        with ProgressBars(wide_console(), ctx.params["quiet"], tokens=True) as bars:
            bars.start(config)
            result = run_training(config, resume=resume, on_event=bars.event)
    except KeyboardInterrupt:  # the second, or one before the first step
        typer.echo(f"Ended at once. {on_disk(folder)}")
        raise typer.Exit(INTERRUPTED) from None
    for line in how_it_ended(result, config.method):
        typer.echo(line)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command()
@options.taking(f"preset model {DATA} max_length {HELD_OUT} seed")
def tokens(ctx: typer.Context, as_json: Json = False) -> None:
    """How many tokens a task has under a model's tokenizer, and what --max-length cuts off."""
    from ffkernels.reporting.terminal import wide_console
    from ffkernels.training.models import load_tokenizer
    from ffkernels.training.progress import token_table
    from ffkernels.training.session import prepare_task

    config = options.training(ctx)
    prepared = prepare_task(config, load_tokenizer(config.model))
    statistics = prepared.statistics()
    if as_json:
        typer.echo(json.dumps(statistics, indent=2))
    else:
        wide_console().print(token_table(prepared.name, statistics))
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
@options.taking("device")
def doctor(
    ctx: typer.Context,
    build: Annotated[
        bool,
        typer.Option(
            "--build", help="Compile the C++ ops, and with nvcc the CUDA ones, into your cache first."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Which kernels and which executor would run here, why, and how to get the faster ones."""
    from ffkernels import ops
    from ffkernels.doctor import describe, diagnose

    if build:
        # Who asks may have added a compiler's OpenMP runtime or a newer toolkit since.
        cuda = [ops.build_cuda(again=True)] if ops.find_nvcc() else []
        for path in (ops.build_native(again=True), *cuda):
            if not as_json:
                typer.echo(f"built {path}")
    diagnosis = diagnose(ctx.params["device"])
    typer.echo(json.dumps(diagnosis, indent=2) if as_json else describe(diagnosis))


def _write_report(logs: list[Path], out: Path, config: dict[str, Any] | None) -> None:
    from ffkernels.reporting.recorder import read_run
    from ffkernels.reporting.report import build_report, print_table

    built = build_report([read_run(log) for log in logs], out, config=config)
    print_table(built)
    typer.echo(f"\nThe report is in {out}: report.md, report.json and the plots.")


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
