"""``ffkernels analyze …``: one command for each figure and section of the paper.

Settings → the module's function → table, sentences, JSON and picture (``show.finish``), as the module makes
them of its data. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import typer

from ffkernels.analysis.options import command, integers, settings
from ffkernels.analysis.show import finish, watching, working
from ffkernels.training import options

app = typer.Typer(
    name="analyze",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The paper's figures: run the experiment, print what was seen, write its data and its picture.",
)


def _analysis(
    name: str, function: str, text: str, defaults: dict[str, Any], *, omit: tuple[str, ...] = (), **own: Any
) -> None:
    """Add a command that shows ``text``; ``defaults``, ``omit`` and ``own`` are those of ``options.command``.

    ``function``: ``module.function`` of this room; called with the settings and those of the command's own
    options that it has parameters for (the others are settings), and with a ``watch`` if it has that.
    """

    def run(ctx: typer.Context) -> None:
        file, _, of_file = function.partition(".")
        module = import_module(f"ffkernels.analysis.{file}")
        analysis = getattr(module, of_file)
        parameters = inspect.signature(analysis).parameters
        wanted = {option: _read(option, ctx.params[option]) for option in own if option in parameters}
        config, quiet = settings(ctx), ctx.params["quiet"]
        if "watch" in parameters:
            with watching(quiet) as watch:
                data = analysis(config, **wanted, watch=watch)
        else:
            with working(f"training, and looking at it for {name}", quiet):
                data = analysis(config, **wanted)
        finish(name, data, module, ctx.params["out"])

    app.command(name, help=text)(command(run, own, omit=omit, **defaults))


def _read(option: str, given: Any) -> Any:
    if option == "seeds":
        return options.seeds_of(given)
    return integers(given, f"--{option}") if option in ("at", "intervals", "ranks") else given


CHECKED = "Fast Forward runs: optimizer steps between test losses; stages have one, too."
RACE = {"lr": 3e-4, "batch_size": 32, "steps": 60, "test_examples": 128}

_analysis(
    "loss",
    "loss_curve.loss_curve",
    "Figs. 4 and 9: the loss during training, optimizer steps and Fast Forward steps told apart.",
    dict(lr=3e-4, steps=60, test_examples=128),
    evaluate_every=(3, "Optimizer steps between test losses."),
)

_analysis(
    "tau-sweep",
    "tau_sweep.tau_sweep",
    "Fig. 10: the loss along one update, repeated τ times: is it convex, where would a search stop?",
    dict(lr=3e-4, test_examples=96),
    omit=("steps",),
    at=("6,12,24", "Optimizer steps after which τ is swept."),
    taus=(100, "The largest τ."),
    fast_forward=(
        False,
        "Run stages too (--search, --interval, --max-tau), after the sweep where one is due.",
    ),
)

_analysis(
    "stages",
    "stage_taus.stage_taus",
    "Figs. 11 and 12: τ* over the stages, and against gradient norm and condition number.",
    dict(lr=3e-4, interval=3, steps=60, test_examples=8),
    omit=("seed",),
    seeds=("3", "How many (3: seeds 0, 1, 2), or which (0,7 or 7,)."),
)

_analysis(
    "gradients",
    "gradient_consistency.gradient_consistency",
    "Fig. 13: do the gradients of different batches agree, and does τ* follow how much they do?",
    dict(steps=60),
    batches=(8, "Disjoint training batches whose gradients are compared, at every point."),
)

_analysis(
    "similarity",
    "gradient_similarity.gradient_similarity",
    "Fig. 6: how much gradients resemble those of earlier steps, with and without Fast Forward.",
    dict(steps=60),
    window=(None, "Earlier steps to compare with, each kept in memory twice (default: all).", int),
)

_analysis(
    "plane",
    "loss_plane.loss_plane",
    "Fig. 5: the loss on the plane through the start and the ends of Adam and of Fast Forward.",
    dict(steps=120),
    until=("loss", "Fast Forward runs to Adam's test loss ('loss'), or for as many steps ('steps')."),
    grid=(21, "Points along each axis."),
    margin=(0.25, "Reach beyond the points, as a share of their extent."),
    examples=(64, "Test examples whose loss is shown."),
)

_analysis(
    "interval",
    "sweeps.interval",
    "Fig. 14: FLOPs and optimizer steps to Adam's test loss, for intervals from 1 to 10.",
    RACE,
    omit=("interval",),
    intervals=("1,2,3,4,5,6,7,8,9,10", "Which intervals, comma-separated."),
    check_every=(2, CHECKED),
)

_analysis(
    "rank",
    "sweeps.rank",
    "Fig. 7: FLOPs saved against Adam of the same rank and learning rate, rank by rank.",
    RACE,
    omit=("rank",),
    ranks=("1,4,16,64", "Which ranks, comma-separated."),
    scaling=("proportional", "proportional: alpha / rank is the same for all ranks; fixed: alpha is."),
    alpha=(16.0, "Scale of the adapter: at rank 8 (proportional) or at every rank (fixed)."),
    check_every=(2, CHECKED),
)

_analysis(
    "full-rank",
    "full_rank.full_rank",
    "Fig. 8: Fast Forward on LoRA of low and of full rank, attention-only and full fine-tuning.",
    dict(RACE, steps=48),
    full_lr=(None, "Learning rate where the model's own weights train (default: --lr).", float),
    check_every=(2, CHECKED),
)

_analysis(
    "convergence",
    "convergence.convergence",
    "Section 5.1: Adam and Fast Forward to convergence; after 3 failures Fast Forward is off for good.",
    dict(lr=3e-3, batch_size=16, steps=400, test_examples=128),
    window=(40, "Converged after so many optimizer steps without an improvement."),
    min_delta=(0.03, "What is an improvement of the test loss, in nats."),
    patience=(3, "Switch Fast Forward off after so many stages in a row without a step."),
    evaluate_every=(10, "Optimizer steps between test losses."),
)

_analysis(
    "accuracy",
    "accuracy.accuracy",
    "Section 5.2: multiple-choice accuracy before training, after Adam and after Fast Forward.",
    dict(RACE, test_examples=256),
    benchmark=(
        None,
        "JSONL file with question, choices, answer; or pubmedqa (default: the task's test examples).",
        str,
    ),
    questions=(200, "How many questions at most."),
    choices=(4, "Choices of a question made from test examples."),
    opening=(0.5, "Share of a test example's response that such a question gives away."),
    max_question_length=(
        None,
        "Tokens of a benchmark's question and choice (default: the model's, at most 1024).",
        int,
    ),
    check_every=(3, CHECKED),
)
