"""The analyze commands that look at Fast Forward's stages: loss, tau-sweep, stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Annotated

import typer

from ffkernels.analysis.options import integers, settings, shared_options
from ffkernels.analysis.show import finish, percent, working
from ffkernels.training import options

__all__ = ["COMMANDS"]


@shared_options(lr=3e-4, steps=60, test_examples=128)
def loss(
    ctx: typer.Context,
    evaluate_every: Annotated[int, typer.Option(help="Optimizer steps between test losses.")] = 3,
) -> None:
    """Figs. 4 and 9: the loss during training, optimizer steps and Fast Forward steps told apart."""
    from ffkernels.analysis.loss_curve import draw, loss_curve

    config = settings(ctx)
    with working("training with and without Fast Forward", ctx.params):
        data = loss_curve(config, evaluate_every=evaluate_every)
    forward, plain = data["fast_forward"], data["optimizer"]
    stages = [stage for stage in forward["stages"] if stage["losses"]]
    rows, fell = [], 0
    for stage in stages:
        validation, test = dict(stage["losses"]), dict(stage["test_losses"])
        tau = stage["tau"]
        fell += tau > 0 and test[tau] < test[0]
        rows.append((stage["optimizer_step"], tau, validation[0], validation[tau], test[0], test[tau]))
    alone, forwarded = (run["steps"][-1]["test_loss"] for run in (plain, forward))
    walked = sum(stage["tau"] > 0 for stage in stages)
    reached = data["reached"]
    there = "never had the former" if reached is None else f"had the former after {reached}"
    seen = [
        f"In {fell} of the {walked} stages that took steps the test loss fell too."
        if walked
        else "No stage took a step.",
        f"Test loss after {plain['steps'][-1]['optimizer_step']} optimizer steps: {alone:.4f} without, "
        f"{forwarded:.4f} with Fast Forward, which {there}.",
    ]
    header = ("step", "τ*", "validation τ=0", "at τ*", "test τ=0", "at τ*")
    finish("loss", data, draw, ctx.params, header=header, rows=rows, seen=seen)


@shared_options(omit=("steps",), lr=3e-4, test_examples=96)
def tau_sweep(
    ctx: typer.Context,
    at: Annotated[str, typer.Option(help="Optimizer steps after which τ is swept.")] = "6,12,24",
    taus: Annotated[int, typer.Option(help="The largest τ.")] = 100,
    fast_forward: Annotated[
        bool,
        typer.Option(
            "--fast-forward/--no-fast-forward",
            help="Run stages too (--search, --interval, --max-tau), after the sweep where one is due.",
        ),
    ] = False,
) -> None:
    """Fig. 10: the loss along one update, repeated τ times: is it convex, where would a search stop?"""
    from ffkernels.analysis.tau_sweep import draw
    from ffkernels.analysis.tau_sweep import tau_sweep as sweep

    config = settings(ctx)
    if not fast_forward:
        config = replace(config, fast_forward=None)
    with working("sweeping τ", ctx.params):
        data = sweep(config, at=integers(at, "--at"), taus=taus)
    rows, shapes = [], []
    for swept in data["sweeps"]:
        for measured in ("validation", "test"):
            shape = swept[f"of_{measured}"]
            searched = measured == "validation"  # the searches never see a test loss
            shapes.append(shape)
            rows.append(
                (
                    f"{swept['optimizer_step']} {measured}",
                    shape["argmin"],
                    shape["decrease"],
                    percent(shape["convex_share"]),
                    shape["turning_points"],
                    "yes" if shape["unimodal"] else "no",
                    shape["linear"]["tau"] if searched else None,
                    shape["parabolic"]["tau"] if searched else None,
                )
            )
    one_minimum = sum(shape["unimodal"] for shape in shapes)
    shares = [shape["convex_share"] for shape in shapes]
    seen = [
        f"{one_minimum} of {len(shapes)} curves have one minimum and no other turn; "
        f"{percent(min(shares))} to {percent(max(shares))} of their second differences are positive.",
    ]
    fallen = [s["of_validation"] for s in data["sweeps"] if s["of_validation"]["decrease"] > 0]
    if fallen:
        least = {search: min(f[search]["found"] for f in fallen) for search in ("linear", "parabolic")}
        most = {search: max(f[search]["evaluations"] for f in fallen) for search in least}
        seen.append(
            f"Of what the validation loss falls in all, the linear search gets at least "
            f"{100 * least['linear']:.1f} % in up to {most['linear']} validations, the parabolic "
            f"{100 * least['parabolic']:.1f} % in up to {most['parabolic']}."
        )
    header = ("step and loss", "argmin", "decrease", "convex", "turns", "unimodal", "linear τ", "parabolic τ")
    finish("tau-sweep", data, draw, ctx.params, header=header, rows=rows, seen=seen)


@shared_options(omit=("seed",), lr=3e-4, interval=3, steps=60, test_examples=8)
def stages(
    ctx: typer.Context,
    seeds: options.Seeds = "3",
) -> None:
    """Figs. 11 and 12: τ* over the stages, and against gradient norm and condition number."""
    from ffkernels.analysis.stage_taus import draw, stage_taus

    config = settings(ctx)
    with working("training and counting steps", ctx.params):
        data = stage_taus(config, seeds=options.seeds_of(seeds))
    found = data["correlations"]
    names = {"gradient_norm": "gradient norm", "condition_number": "condition number"}
    rows = [
        (names.get(key, "optimizer step"), value["n"], value["rho"], value["p"], value.get("partial"))
        for key, value in found.items()
    ]
    taus = [stage["tau"] for stage in data["stages"]]
    last = max((stage["number"] for stage in data["stages"]), default=0)
    third = max(1, last // 3)
    early = [stage["tau"] for stage in data["stages"] if stage["number"] <= third]
    late = [stage["tau"] for stage in data["stages"] if stage["number"] > last - third]
    seen = []
    if taus:
        seen.append(
            f"τ* is {median(early):g} in the first {third} stages of a run and {median(late):g} in the "
            f"last {third} (medians); {taus.count(0)} of {len(taus)} stages took no step."
        )
    for key, name in names.items():
        rho, partial = found[key]["rho"], found[key]["partial"]
        if rho is None or partial is None:
            seen.append(f"Too few different values to relate τ* to the {name}.")
        else:
            seen.append(
                f"τ* and the {name}: ρ = {rho:.2f}; with the optimizer step held fixed {partial:.2f} "
                f"(n = {found[key]['n']}).".replace("-", "−")
            )
    header = ("τ* with", "n", "Spearman ρ", "p (shuffled)", "ρ at equal step")
    finish("stages", data, draw, ctx.params, header=header, rows=rows, seen=seen)


COMMANDS: dict[str, Callable[..., None]] = {"loss": loss, "tau-sweep": tau_sweep, "stages": stages}
