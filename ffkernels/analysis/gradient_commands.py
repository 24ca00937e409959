"""The analyze commands about gradients and the loss around the weights: gradients, similarity, plane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from ffkernels.analysis.options import settings, shared_options
from ffkernels.analysis.show import finish, working

__all__ = ["COMMANDS"]


@shared_options(steps=60)
def gradients(
    ctx: typer.Context,
    batches: Annotated[
        int, typer.Option(help="Disjoint training batches whose gradients are compared, at every point.")
    ] = 8,
) -> None:
    """Fig. 13: do the gradients of different batches agree, and does τ* follow how much they do?"""
    from ffkernels.analysis.gradient_consistency import draw, gradient_consistency, what_was_seen

    config = settings(ctx)
    with working(f"training, {batches} gradients around each stage", ctx.params):
        data = gradient_consistency(config, batches=batches)
    header = [
        "after step",
        "τ*",
        "consistency before",
        "consistency after",
        "descent before",
        "descent after",
    ]
    rows = [["start", None, data["start"]["consistency"], None, None, None]]
    for stage in data["stages"]:
        before, after = stage["before"], stage["after"]
        consistency = [before["consistency"], after["consistency"]]
        rows.append(
            [stage["optimizer_step"], stage["tau"], *consistency, before["descent"], after["descent"]]
        )
    finish("gradients", data, draw, ctx.params, header=header, rows=rows, seen=what_was_seen(data))


@shared_options(steps=60)
def similarity(
    ctx: typer.Context,
    window: Annotated[
        int | None,
        typer.Option(help="Earlier steps to compare with, each kept in memory twice (default: all)."),
    ] = None,
) -> None:
    """Fig. 6: how much gradients resemble those of earlier steps, with and without Fast Forward."""
    from ffkernels.analysis.gradient_similarity import LABELS, RUNS, draw, gradient_similarity, what_was_seen

    config = settings(ctx)
    with working("Adam, then Fast Forward", ctx.params):
        data = gradient_similarity(config, window=window)
    header = ["cosine with gradients of", "the step before", "across a stage", "within", "all earlier steps"]
    rows = []
    for name in RUNS:
        run = data[name]
        rows.append([LABELS[name], run["previous"], run["across"], run["within"], run["earlier"]])
    finish("similarity", data, draw, ctx.params, header=header, rows=rows, seen=what_was_seen(data))


@shared_options(steps=120)
def plane(
    ctx: typer.Context,
    until: Annotated[
        str,
        typer.Option(help="Fast Forward runs to Adam's test loss ('loss'), or for as many steps ('steps')."),
    ] = "loss",
    grid: Annotated[int, typer.Option(help="Points along each axis.")] = 21,
    margin: Annotated[
        float, typer.Option(help="Reach beyond the points, as a share of their extent.")
    ] = 0.25,
    examples: Annotated[int, typer.Option(help="Test examples whose loss is shown.")] = 64,
) -> None:
    """Fig. 5: the loss on the plane through the start and the ends of Adam and of Fast Forward."""
    from ffkernels.analysis.loss_plane import NAMES, draw, loss_plane, what_was_seen

    config = settings(ctx)
    with working(f"Adam, Fast Forward, and {grid} × {grid} losses", ctx.params):
        data = loss_plane(config, until=until, grid=grid, margin=margin, examples=examples)
    header = ["weights", "optimizer steps", "x", "y", "distance from W₀", "test loss", "loss in the picture"]
    rows = []
    for name, label in NAMES.items():
        at = data["points"][name]
        place = [round(at["x"], 6) + 0.0, round(at["y"], 6) + 0.0]  # 1e-17 is a zero that was rounded
        rows.append([label, at["optimizer_steps"], *place, at["distance"], at["test_loss"], at["loss"]])
    finish("plane", data, draw, ctx.params, header=header, rows=rows, seen=what_was_seen(data))


COMMANDS: dict[str, Callable[..., None]] = {
    "gradients": gradients,
    "similarity": similarity,
    "plane": plane,
}
