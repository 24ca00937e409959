"""How far each stage goes (the paper's Fig. 11), and whether the gradient foretells it (Fig. 12).

gradient norm       ‖g‖₂ over all trainable tensors, of the gradient that made the repeated update
condition number    of each gradient matrix (of LoRA those of A and of B of every module) σ_max / σ_min,
                    the median over the matrices
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import cycle
from statistics import median

import torch
from torch import Tensor

from ffkernels.analysis.rank_correlation import partial_spearman, spearman
from ffkernels.analysis.show import Data, Table
from ffkernels.reporting.plots import LEGEND, Figure, clean_axes
from ffkernels.stage.record import Stage
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session

SEED_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))
# A quantity whose largest value is more than so many times its smallest is drawn on a logarithmic axis.
WIDE = 30
NAMES = {"gradient_norm": "gradient norm", "condition_number": "condition number"}


def stage_taus(config: TrainConfig, *, seeds: Sequence[int] = (0, 1, 2)) -> Data:
    """τ* of every stage of one run per seed, with the gradient's norm and condition number (Figs. 11 and 12).

    Args:
        config: the run, with Fast Forward. Take a small interval for many stages.
        seeds: of data split and order and of the adapter; each replaces ``config.seed``.

    Returns:
        ``stages``: for each its ``seed``, ``number`` in its run (from 1), ``optimizer_step``, ``tau``,
        ``evaluations``, ``loss_before``, ``loss_after``, ``lr`` and ``gradient_facts``; ``correlations`` of
        τ* over all stages with both quantities and with ``optimizer_step``: ``spearman`` with ``partial``,
        what is left of ρ when the ranks of the optimizer step are held fixed; ``config``.

    Raises:
        ValueError: when ``config`` has no Fast Forward, or there is no seed.
    """
    if config.fast_forward is None:
        raise ValueError("config.fast_forward is None: stages need a FastForwardConfig")
    if not seeds:
        raise ValueError("seeds is empty: give one or more")
    stages: list[Data] = []

    def record(stage: Stage) -> None:  # called inside optimizer.step(), where the gradients still stand
        kept = ("optimizer_step", "tau", "evaluations", "loss_before", "loss_after")
        stages.append(
            {
                "seed": seed,
                "number": len(session.ff.stages),
                **{key: getattr(stage, key) for key in kept},
                "lr": session.learning_rate(stage.optimizer_step - 1),
                **gradient_facts(p.grad for p in session.trainable),
            }
        )

    for seed in seeds:
        with open_session(replace(config, seed=seed)) as session:
            session.ff.on_stage = record
            for step in range(session.steps):
                session.step(step)
    return {"config": config.to_dict(), "stages": stages, "correlations": _correlations(stages)}


def gradient_facts(gradients: Iterable[Tensor | None]) -> Data:
    """Norm over all gradients, median and largest condition number over those that are matrices."""
    gradients = [g.detach() for g in gradients if g is not None]
    squares = sum(float(g.double().square().sum()) for g in gradients)
    conditions = [c for g in gradients if g.dim() == 2 and not math.isnan(c := condition_number(g))]
    return {
        "gradient_norm": math.sqrt(squares),
        "condition_number": median(conditions) if conditions else math.nan,
        "condition_largest": max(conditions, default=math.nan),
        "matrices": len(conditions),
    }


def condition_number(matrix: Tensor) -> float:
    """σ_max over the smallest singular value that is not negligible; NaN for zeros and what is not finite.

    ``matrix``: (m, n), any floating dtype; the singular values are computed in float64.
    """
    if matrix.numel() == 0 or not bool(torch.isfinite(matrix).all()):
        return math.nan
    values = torch.linalg.svdvals(matrix.double())
    largest = float(values[0])
    if largest == 0.0:
        return math.nan
    kept = values[values > largest * max(matrix.shape) * torch.finfo(torch.float32).eps]
    return largest / float(kept[-1])


def _correlations(stages: Sequence[Data]) -> Data:
    found = {}
    for quantity in (*NAMES, "optimizer_step"):
        known = [s for s in stages if math.isfinite(s[quantity]) and math.isfinite(s["loss_before"])]
        taus, values, steps = ([s[key] for s in known] for key in ("tau", quantity, "optimizer_step"))
        found[quantity] = spearman(values, taus)
        if quantity != "optimizer_step":
            found[quantity]["partial"] = partial_spearman(values, taus, steps)
    return found


def table(data: Data) -> Table:
    rows = [
        [NAMES.get(key, "optimizer step"), found["n"], found["rho"], found["p"], found.get("partial")]
        for key, found in data["correlations"].items()
    ]
    return ["τ* with", "n", "Spearman ρ", "p (shuffled)", "ρ at equal step"], rows


def what_was_seen(data: Data) -> list[str]:
    seen, stages = [], [(stage["number"], stage["tau"]) for stage in data["stages"]]
    if stages:
        last = max(number for number, _ in stages)
        third = max(1, last // 3)
        early = median(tau for number, tau in stages if number <= third)
        late = median(tau for number, tau in stages if number > last - third)
        none = sum(tau == 0 for _, tau in stages)
        seen.append(
            f"τ* is {early:g} in the first {third} stages of a run and {late:g} in the last {third} "
            f"(medians); {none} of {len(stages)} stages took no step."
        )
    for key, name in NAMES.items():
        found = data["correlations"][key]
        if found["rho"] is None or found["partial"] is None:
            seen.append(f"Too few different values to relate τ* to the {name}.")
        else:
            seen.append(
                f"τ* and the {name}: ρ = {found['rho']:.2f}; with the optimizer step held fixed "
                f"{found['partial']:.2f} (n = {found['n']})."
            )
    return seen


def draw(figure: Figure, data: Data) -> None:
    """Above τ* over the stages of each seed, below τ* against gradient norm and condition number."""
    figure.set_size_inches(8.4, 7.2)
    panels = figure.subplot_mosaic([["stages", "stages"], list(NAMES)])
    interval = data["config"]["fast_forward"]["interval"]
    steps = "optimizer step" if interval == 1 else f"{interval} optimizer steps"
    clean_axes(
        panels["stages"], f"stage, one after every {steps}", "τ*: times the update was repeated", integer="xy"
    )
    for quantity, label in NAMES.items():
        axes, found = panels[quantity], data["correlations"][quantity]
        of_what = " of the gradient matrices (median)" if quantity == "condition_number" else ""
        clean_axes(axes, label + of_what, integer="y")
        axes.set_title(_correlation_text(found), loc="left", fontsize=10)
        values = [s[quantity] for s in data["stages"] if s[quantity] and math.isfinite(s[quantity])]
        if values and max(values) > WIDE * min(values):
            axes.set_xscale("log")
    seeds = sorted({stage["seed"] for stage in data["stages"]})
    for seed, (color, marker) in zip(seeds, cycle(SEED_STYLES), strict=False):
        stages = [stage for stage in data["stages"] if stage["seed"] == seed]
        style = {"color": color, "marker": marker, "markersize": 4.5, "alpha": 0.8}
        taus, numbers = ([stage[key] for stage in stages] for key in ("tau", "number"))
        panels["stages"].plot(numbers, taus, linewidth=1.1, label=f"seed {seed}", **style)
        for quantity in NAMES:
            values = [math.nan if s[quantity] is None else s[quantity] for s in stages]
            panels[quantity].plot(values, taus, linestyle="none", **style)
    for axes in panels.values():
        axes.set_ylim(0, 1.08 * max([1, *(stage["tau"] for stage in data["stages"])]))
    panels["stages"].legend(loc="upper right", ncols=2 if len(seeds) > 3 else 1, **LEGEND)
    panels["gradient_norm"].set_ylabel("τ*")


def _correlation_text(found: Data) -> str:
    if found["rho"] is None:
        return f"no correlation to speak of (n = {found['n']})"
    partial = "" if found["partial"] is None else f"; at equal step {found['partial']:.2f}"
    return f"Spearman ρ = {found['rho']:.2f}, n = {found['n']}{partial}".replace("-", "−")
