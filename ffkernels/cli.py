"""The command line: ``ffkernels compare | train | report | doctor``.

Only typer is imported here; a command imports what it needs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import traceback
import warnings
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "run"]

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="ffkernels",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fast Forward low-rank fine-tuning: compare it, train with it, report on runs, see what runs here.",
)

Model = Annotated[
    str, typer.Option(help="'tiny' (embedded), 'smollm2-135m', a folder, or a Hugging Face hub id.")
]
TaskName = Annotated[str, typer.Option(help="Data set: 'instruction' is embedded.")]
Data = Annotated[
    Path | None,
    typer.Option(help="JSONL file with text, prompt/response or messages lines, instead of --task."),
]
Method = Annotated[str, typer.Option(help="Adapter: lora or dora.")]
Rank = Annotated[int, typer.Option(help="Rank of the adapter.")]
Alpha = Annotated[float, typer.Option(help="Scale of the adapter; it acts times alpha/rank.")]
Lr = Annotated[float, typer.Option(help="Learning rate after warm-up.")]
Schedule = Annotated[
    str, typer.Option(help="Learning rate over the steps: constant, linear or cosine (to 0).")
]
WarmupSteps = Annotated[int, typer.Option(help="Optimizer steps over which the learning rate rises.")]
BatchSize = Annotated[int, typer.Option(help="Examples per optimizer step.")]
MicroBatchSize = Annotated[
    int | None, typer.Option(help="Examples per forward and backward pass [default: the whole batch].")
]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the training data, instead of --steps.")]
MaxLength = Annotated[int, typer.Option(help="Tokens per example at most.")]
TestExamples = Annotated[
    int, typer.Option(help="Held-out examples for the test loss, which is charged to nobody.")
]
ValidationExamples = Annotated[int, typer.Option(help="Held-out examples Fast Forward searches with.")]
Interval = Annotated[int, typer.Option(help="Optimizer steps from one Fast Forward stage to the next.")]
StageWarmup = Annotated[int, typer.Option(help="Optimizer steps before the first interval begins.")]
MaxTau = Annotated[int, typer.Option(help="Fast Forward steps per stage at most.")]
Patience = Annotated[
    int,
    typer.Option(help="Switch Fast Forward off after so many stages in a row without a step; 0 never does."),
]
Impl = Annotated[str, typer.Option(help="What moves the weights: auto, torch, cpp, triton or cuda.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="Of the frozen base model: float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads [default: torch's choice].")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def compare(
    model: Model = "tiny",
    task: TaskName = "instruction",
    data: Data = None,
    lr: Lr = 1e-4,
    steps: Steps = 120,
    epochs: Epochs = None,
    batch_size: BatchSize = 64,
    micro_batch_size: MicroBatchSize = None,
    seeds: Annotated[str, typer.Option(help="How many (3: seeds 0, 1, 2), or which (0,7 or 7,).")] = "1",
    search: Annotated[str, typer.Option(help="Fast Forward's searches: both, linear or parabolic.")] = "both",
    method: Method = "lora",
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    schedule: Schedule = "constant",
    warmup_steps: WarmupSteps = 8,
    max_length: MaxLength = 64,
    test_examples: TestExamples = 1000,
    validation_examples: ValidationExamples = 32,
    interval: Interval = 6,
    stage_warmup: StageWarmup = 0,
    max_tau: MaxTau = 1024,
    patience: Patience = 3,
    impl: Impl = "auto",
    tuned_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the tuned Adam row [default: measured for tiny].")
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Find the tuned learning rate first; takes longer.")
    ] = False,
    evaluate_every: Annotated[int, typer.Option(help="Adam run: optimizer steps between test losses.")] = 10,
    check_every: Annotated[
        int, typer.Option(help="Runs with a target: optimizer steps between test losses.")
    ] = 3,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder of logs and report; overwritten.")] = Path("runs/compare"),
    quiet: Quiet = False,
) -> None:
    """Adam against Fast Forward to the same test loss, in FLOPs and in seconds: the paper's protocol.

    Adam runs --steps; its final test loss is the target. Fast Forward runs until it is there, with the
    paper's linear search and with the parabolic one; then Adam with a tuned learning rate, which is what you
    would try first.
    """
    from ffkernels.engine.config import FastForwardConfig
    from ffkernels.training.compare import Comparison, Interrupted
    from ffkernels.training.compare import compare as run_comparison
    from ffkernels.training.config import TrainConfig
    from ffkernels.training.progress import ProgressBars

    base = TrainConfig(
        out=str(out),
        model=model,
        task=task,
        data=str(data) if data is not None else None,
        method=method,
        rank=rank,
        alpha=alpha,
        lr=lr,
        schedule=schedule,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        steps=steps,
        epochs=epochs,
        max_length=max_length,
        test_examples=test_examples,
        validation_examples=validation_examples,
        evaluate_every=evaluate_every,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    comparison = Comparison(
        base,
        seeds=_seeds(seeds),
        searches=("linear", "parabolic") if search == "both" else (search,),
        fast_forward=FastForwardConfig(
            interval=interval, warmup=stage_warmup, max_tau=max_tau, patience=patience or None, impl=impl
        ),
        tuned_lr=tuned_lr,
        sweep=sweep,
        check_every=check_every,
    )
    console = _console()
    with ProgressBars(console, quiet) as bars:
        try:
            results, protocol = run_comparison(comparison, on_run=bars.start, on_event=bars.event)
        except Interrupted as error:
            typer.echo(f"interrupted in {error}; finished runs are in {out}: ffkernels report {out}/*.jsonl")
            raise typer.Exit(INTERRUPTED) from None
    provenance = {"command": _command(sys.argv[1:]), "date": date.today().isoformat()}
    _write_report([result.log for result in results], out, {**provenance, **base.to_dict(), **protocol})


@app.command()
def train(
    model: Model = "tiny",
    task: TaskName = "instruction",
    data: Data = None,
    fast_forward: Annotated[
        bool, typer.Option("--fast-forward/--no-fast-forward", help="Fast Forward, or the plain optimizer.")
    ] = True,
    search: Annotated[
        str, typer.Option(help="Fast Forward's search: parabolic or linear (the paper's).")
    ] = "parabolic",
    interval: Interval = 6,
    stage_warmup: StageWarmup = 0,
    max_tau: MaxTau = 1024,
    patience: Patience = 3,
    impl: Impl = "auto",
    method: Method = "lora",
    rank: Rank = 8,
    alpha: Alpha = 16.0,
    dropout: Annotated[float, typer.Option(help="Dropout on the adapter's input.")] = 0.0,
    target_modules: Annotated[
        str | None,
        typer.Option(help="Modules with an adapter, comma-separated [default: attention projections]."),
    ] = None,
    lr: Lr = 1e-4,
    schedule: Schedule = "constant",
    warmup_steps: WarmupSteps = 8,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip the gradient's norm [default: no].")
    ] = None,
    steps: Steps = 120,
    epochs: Epochs = None,
    batch_size: BatchSize = 64,
    micro_batch_size: MicroBatchSize = None,
    max_length: MaxLength = 64,
    test_examples: TestExamples = 1000,
    validation_examples: ValidationExamples = 32,
    evaluate_every: Annotated[
        int, typer.Option(help="Optimizer steps between test losses; 0: at both ends.")
    ] = 10,
    target_loss: Annotated[float | None, typer.Option(help="Stop at this test loss [default: no].")] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Optimizer steps between checkpoints; 0: at the end.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of data split and order, adapter and dropout.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    threads: Threads = None,
    name: Annotated[str, typer.Option(help="The run's name.")] = "run",
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run's checkpoint stands.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune an adapter, by default with Fast Forward; writes OUT/NAME.jsonl and OUT/NAME/."""
    from ffkernels.engine.config import FastForwardConfig
    from ffkernels.training.config import TrainConfig
    from ffkernels.training.progress import ProgressBars, how_it_ended
    from ffkernels.training.trainer import train as run_training

    stages = FastForwardConfig(
        interval=interval,
        warmup=stage_warmup,
        search=search,
        max_tau=max_tau,
        patience=patience or None,
        impl=impl,
    )
    config = TrainConfig(
        name=name,
        out=str(out),
        model=model,
        task=task,
        data=str(data) if data is not None else None,
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(part.strip() for part in target_modules.split(",")) if target_modules else None,
        lr=lr,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        schedule=schedule,
        warmup_steps=warmup_steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        steps=steps,
        epochs=epochs,
        max_length=max_length,
        test_examples=test_examples,
        validation_examples=validation_examples,
        evaluate_every=evaluate_every,
        target_loss=target_loss,
        checkpoint_every=checkpoint_every,
        fast_forward=stages if fast_forward else None,
        seed=seed,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: give one of them")
    log = out / f"{name}.jsonl"
    if log.exists() and not resume and not overwrite:
        raise ValueError(f"{log} exists: --resume goes on, --overwrite replaces it, or take another --name")
    console = _console()
    with ProgressBars(console, quiet) as bars:
        bars.start(config)
        result = run_training(config, resume=resume, on_event=bars.event)
    for line in how_it_ended(result):
        typer.echo(line)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


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
    device: Device = "auto",
) -> None:
    """Which kernels and which executor would run here, why, and how to get the faster ones."""
    import json

    from ffkernels import ops
    from ffkernels.doctor import describe, diagnose

    if build:
        for path in (ops.build_native(), *([ops.build_cuda()] if ops.find_nvcc() else [])):
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


def _seeds(text: str) -> tuple[int, ...]:
    """``"3"`` is three seeds 0, 1, 2; ``"0,7"`` and ``"7,"`` name them."""
    try:
        if "," in text:
            seeds = tuple(int(part) for part in text.split(",") if part.strip())
        else:
            seeds = tuple(range(int(text)))
    except ValueError:
        seeds = ()
    if not seeds:
        raise ValueError(f"seeds={text!r}: must be a count such as 3, or a list such as 0,7 or 0,")
    return seeds


def _command(arguments: list[str]) -> str:
    """The command as a report tells it: of absolute paths the last part, not somebody's folders."""
    return shlex.join(["ffkernels", *(re.sub(r"(^|=)[/~].*/", r"\1", part) for part in arguments)])


def run(arguments: list[str] | None = None) -> None:
    """The ``ffkernels`` command: one clear line and exit code 2 where the user can help it."""
    _show_notices_as_lines()
    try:
        app(arguments, standalone_mode=True)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FFKERNELS_TRACEBACK") or not _users(error):
            raise
        typer.echo(f"ffkernels: {error}", err=True)
        sys.exit(USER_ERROR)


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
    """Whether this package raised the error itself, for the user to read; others keep their traceback."""
    if isinstance(error, OSError):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)
