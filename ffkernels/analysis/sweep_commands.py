"""The analyze commands that train several times: interval, rank, full-rank, convergence, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ffkernels.analysis.options import integers, settings, shared_options
from ffkernels.analysis.show import finish, percent, than_adam, watching

__all__ = ["COMMANDS"]

CheckEvery = Annotated[
    int, typer.Option(help="Fast Forward runs: optimizer steps between test losses; stages have one, too.")
]


@shared_options(omit=("interval",), lr=3e-4, batch_size=32, steps=60, test_examples=128)
def interval(
    ctx: typer.Context,
    intervals: Annotated[
        str, typer.Option(help="Which intervals, comma-separated.")
    ] = "1,2,3,4,5,6,7,8,9,10",
    check_every: CheckEvery = 2,
) -> None:
    """Fig. 14: FLOPs and optimizer steps to Adam's test loss, for intervals from 1 to 10."""
    from ffkernels.analysis import interval_sweep as analysis

    wanted, config = integers(intervals, "--intervals"), settings(ctx)
    with watching(ctx.params) as watch:
        data = analysis.interval(config, intervals=wanted, check_every=check_every, watch=watch)
    finish(
        "interval",
        data,
        analysis.draw,
        ctx.params,
        header=["interval", "optimizer steps", "stages", "Σ τ*", *SAVED],
        rows=[["Adam", data["adam"]["optimizer_steps"], None, None, None, None]]
        + [[str(run["interval"]), *_cells(run)] for run in data["runs"]],
        seen=_best(data["runs"], "interval", "at interval"),
    )


@shared_options(omit=("rank", "alpha"), lr=3e-4, batch_size=32, steps=60, test_examples=128)
def rank(
    ctx: typer.Context,
    ranks: Annotated[str, typer.Option(help="Which ranks, comma-separated.")] = "1,4,16,64",
    scaling: Annotated[
        str,
        typer.Option(help="proportional: alpha / rank is the same for all ranks; fixed: alpha is."),
    ] = "proportional",
    alpha: Annotated[
        float, typer.Option(help="Scale of the adapter: at rank 8 (proportional) or at every rank (fixed).")
    ] = 16.0,
    check_every: CheckEvery = 2,
) -> None:
    """Fig. 7: FLOPs saved against Adam of the same rank and learning rate, rank by rank."""
    from ffkernels.analysis import rank_sweep as analysis

    wanted, config = integers(ranks, "--ranks"), settings(ctx)
    with watching(ctx.params) as watch:
        data = analysis.rank(config, ranks=wanted, scaling=scaling, check_every=check_every, watch=watch)
    runs = [{**run["ff"], **{k: run[k] for k in ("rank", "alpha", "trainable")}} for run in data["runs"]]
    finish(
        "rank",
        data,
        analysis.draw,
        ctx.params,
        header=["rank", "alpha", "weights", "Adam's test loss", "optimizer steps", "stages", "Σ τ*", *SAVED],
        rows=[
            [
                str(run["rank"]),
                f"{run['alpha']:g}",
                run["trainable"],
                whole["adam"]["test_loss"],
                *_cells(run),
            ]
            for run, whole in zip(runs, data["runs"], strict=True)
        ],
        seen=_best(runs, "rank", "at rank"),
    )


@shared_options(lr=3e-4, batch_size=32, steps=48, test_examples=128)
def full_rank(
    ctx: typer.Context,
    full_lr: Annotated[
        float | None,
        typer.Option(help="Learning rate where the model's own weights train (default: --lr)."),
    ] = None,
    check_every: CheckEvery = 2,
) -> None:
    """Fig. 8: Fast Forward on LoRA of low and of full rank, attention-only and full fine-tuning."""
    from ffkernels.analysis import full_rank as analysis

    config = settings(ctx)
    with watching(ctx.params) as watch:
        data = analysis.full_rank(config, full_lr=full_lr, check_every=check_every, watch=watch)
    runs = data["runs"]
    seen = []
    for run in runs:
        stages = len(run["ff"]["stages"])
        took = f"{run['name']}: {stages} stages took {run['ff_steps']} steps"
        none = f", {run['stages_without_a_step']} of them none" if run["stages_without_a_step"] else ""
        saved = run["ff"]["saved"]
        cost = (
            f"Adam's test loss for {than_adam(saved['measured'])}"
            if saved
            else f"Adam's test loss was not reached in {run['ff']['optimizer_steps']} optimizer steps"
        )
        seen.append(f"{took}{none}; {cost}.")
    finish(
        "full-rank",
        data,
        analysis.draw,
        ctx.params,
        header=[
            "what trains",
            "weights",
            "lr",
            "Adam's test loss",
            "optimizer steps",
            "stages",
            "Σ τ*",
            *SAVED,
        ],
        rows=[
            [run["name"], run["trainable"], run["lr"], run["adam"]["test_loss"], *_cells(run["ff"])]
            for run in runs
        ],
        seen=seen,
    )


@shared_options(lr=3e-3, batch_size=16, steps=400, test_examples=128)
def convergence(
    ctx: typer.Context,
    window: Annotated[
        int, typer.Option(help="Converged after so many optimizer steps without an improvement.")
    ] = 40,
    min_delta: Annotated[
        float, typer.Option(help="What is an improvement of the test loss, in nats.")
    ] = 0.03,
    patience: Annotated[
        int, typer.Option(help="Switch Fast Forward off after so many stages in a row without a step.")
    ] = 3,
    evaluate_every: Annotated[int, typer.Option(help="Optimizer steps between test losses.")] = 10,
) -> None:
    """Section 5.1: Adam and Fast Forward to convergence; after 3 failures Fast Forward is off for good."""
    from ffkernels.analysis import convergence as analysis

    config = settings(ctx)
    with watching(ctx.params) as watch:
        data = analysis.convergence(config, window=window, min_delta=min_delta, watch=watch)
    titles = {"adam": "Adam", "ff": "with Fast Forward"}
    finish(
        "convergence",
        data,
        analysis.draw,
        ctx.params,
        header=["run", "converged", "optimizer steps", "test loss", "lowest", "FLOPs (paper)", "(measured)"],
        rows=[
            [
                titles[run["name"]],
                "yes" if run["converged"] else "no",
                run["optimizer_steps"],
                run["test_loss"],
                run["best_test_loss"],
                float(run["flops"]["paper"]),
                float(run["flops"]["measured"]),
            ]
            for run in data["runs"]
        ],
        seen=analysis.what_was_seen(data),
    )


@shared_options(lr=3e-4, steps=60, batch_size=32, test_examples=256)
def accuracy(
    ctx: typer.Context,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="JSONL file with question, choices, answer; or pubmedqa (default: the task's test examples)."
        ),
    ] = None,
    questions: Annotated[int, typer.Option(help="How many questions at most.")] = 200,
    choices: Annotated[int, typer.Option(help="Choices of a question made from test examples.")] = 4,
    opening: Annotated[
        float, typer.Option(help="Share of a test example's response that such a question gives away.")
    ] = 0.5,
    max_question_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a benchmark's question and choice (default: the model's, at most 1024)."
        ),
    ] = None,
    check_every: CheckEvery = 3,
) -> None:
    """Section 5.2: multiple-choice accuracy before training, after Adam and after Fast Forward."""
    from ffkernels.analysis import accuracy as analysis

    config = settings(ctx)
    with watching(ctx.params) as watch:
        data = analysis.accuracy(
            config,
            benchmark=benchmark,
            questions=questions,
            choices=choices,
            opening=opening,
            max_question_length=max_question_length,
            check_every=check_every,
            watch=watch,
        )
    titles = {"before": "before training", "adam": "after Adam", "ff": "after Fast Forward"}
    finish(
        "accuracy",
        data,
        analysis.draw,
        ctx.params,
        header=["model", "optimizer steps", "test loss", "accuracy, sum", "95 %", "accuracy, mean", "95 %"],
        rows=[
            [
                titles[model["name"]],
                model["optimizer_steps"],
                model["test_loss"],
                *(cell for score in ("sum", "mean") for cell in _accuracy_cells(model[score])),
            ]
            for model in data["models"]
        ],
        seen=analysis.what_was_seen(data),
    )


COMMANDS = {
    "interval": interval,
    "rank": rank,
    "full-rank": full_rank,
    "convergence": convergence,
    "accuracy": accuracy,
}

SAVED = ("saved, paper", "saved, measured")


def _cells(run: dict[str, Any]) -> list[Any]:
    """Optimizer steps, stages, their steps, and what was saved in both conventions."""
    saved = run["saved"]
    stages = run["stages"]
    shares = [percent(saved["paper"]), percent(saved["measured"])] if saved else ["not reached"] * 2
    return [run["optimizer_steps"], len(stages), sum(stage["tau"] for stage in stages), *shares]


def _best(runs: Sequence[dict[str, Any]], key: str, at: str) -> list[str]:
    reached = [run for run in runs if run["saved"]]
    if not reached:
        return ["No run reached Adam's test loss."]
    best, worst = (choose(reached, key=lambda run: run["saved"]["measured"]) for choose in (max, min))
    words = f"Cheapest {at} {best[key]}: {than_adam(best['saved']['measured'])}"
    if worst is not best:
        words += f"; dearest {at} {worst[key]}: {than_adam(worst['saved']['measured'])}"
    missed = [str(run[key]) for run in runs if not run["saved"]]
    return [words + ".", *([f"Adam's test loss was not reached {at} {', '.join(missed)}."] if missed else [])]


def _accuracy_cells(found: dict[str, float]) -> list[str]:
    return [f"{100 * found['accuracy']:.1f} %", f"{100 * found['low']:.1f} – {100 * found['high']:.1f}"]
