"""How far each stage goes (the paper's Fig. 11), and whether the gradient foretells it (Fig. 12).

A stage repeats the last optimizer update τ* times. Of the gradient that this update was made from, the mean
over its batch, two quantities are taken in the moment the stage has ended:

    gradient norm       ‖g‖₂ over all trainable tensors
    condition number    of each gradient matrix σ_max / σ_min, the median over the matrices

A gradient matrix is the gradient of one trainable matrix, of LoRA the A (r × in) and the B (out × r) of each
adapted module; vectors, such as DoRA's magnitudes, have no condition number and are left out. σ_min is the
smallest singular value that is not negligible: above σ_max · max(rows, columns) · ε with float32's ε, below
which it would be rounding. A matrix of zeros is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffkernels.analysis.rank_correlation import partial_spearman, spearman
from ffkernels.reporting.plots import LEGEND, clean_axes
from ffkernels.stage.record import Stage
from ffkernels.training.session import Session, open_session

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ffkernels.training.config import TrainConfig

__all__ = ["condition_number", "draw", "gradient_facts", "stage_taus"]

SEED_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))
# A quantity whose largest value is more than so many times its smallest is drawn on a logarithmic axis.
WIDE = 30
QUANTITIES = ("gradient_norm", "condition_number")


def stage_taus(config: TrainConfig, *, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """τ* of every stage of one run per seed, with the gradient's norm and condition number (Figs. 11 and 12).

    Args:
        config: the run, with Fast Forward. Take a small interval for many stages.
        seeds: of data split and order and of the adapter; each replaces ``config.seed``.

    Returns:
        ``config``; ``stages``: for each its ``seed``, ``number`` in its run (from 1), ``optimizer_step``,
        ``tau``, ``evaluations``, ``loss_before``, ``loss_after``, ``lr``, ``gradient_norm``,
        ``condition_number``, ``condition_largest`` (over the matrices) and ``matrices`` (their number);
        ``correlations``: of τ* with each quantity and with ``optimizer_step`` Spearman's
        ``{"rho", "p", "n"}`` over all stages, with ``partial``, what is left of ρ when the ranks of the
        optimizer step are held fixed: during training everything drifts together.

    Raises:
        ValueError: when ``config`` has no Fast Forward, or there is no seed.
    """
    if config.fast_forward is None:
        raise ValueError("config.fast_forward is None: stages need a FastForwardConfig")
    if not seeds:
        raise ValueError("seeds is empty: give one or more")
    stages: list[dict[str, Any]] = []
    for seed in seeds:
        with open_session(replace(config, seed=seed)) as session:
            session.ff.on_stage = _recorder(session, seed, stages)
            for step in range(session.steps):
                session.step(step)
    return {"config": config.to_dict(), "stages": stages, "correlations": _correlations(stages)}


def _recorder(session: Session, seed: int, stages: list[dict[str, Any]]) -> Callable[[Stage], None]:
    """Called by Fast Forward inside ``optimizer.step()``, where the gradients still stand."""

    def record(stage: Stage) -> None:
        stages.append(
            {
                "seed": seed,
                "number": len(session.ff.stages),
                "optimizer_step": stage.optimizer_step,
                "tau": stage.tau,
                "evaluations": stage.evaluations,
                "loss_before": stage.loss_before,
                "loss_after": stage.loss_after,
                "lr": session.learning_rate(stage.optimizer_step - 1),
                **gradient_facts(p.grad for p in session.trainable),
            }
        )

    return record


def gradient_facts(gradients: Iterable[Tensor | None]) -> dict[str, Any]:
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


def _correlations(stages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for quantity in (*QUANTITIES, "optimizer_step"):
        known = [s for s in stages if math.isfinite(s[quantity]) and math.isfinite(s["loss_before"])]
        taus, values, steps = ([s[key] for s in known] for key in ("tau", quantity, "optimizer_step"))
        found[quantity] = spearman(values, taus)
        if quantity != "optimizer_step":
            found[quantity]["partial"] = partial_spearman(values, taus, steps)
    return found


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """Above τ* over the stages of each seed, below τ* against gradient norm and condition number."""
    figure.set_size_inches(8.4, 7.2)
    panels = figure.subplot_mosaic([["stages", "stages"], list(QUANTITIES)])
    seeds = sorted({stage["seed"] for stage in data["stages"]})
    for axes in panels.values():
        clean_axes(axes)
        axes.set_ylim(0, 1.08 * max([1, *(stage["tau"] for stage in data["stages"])]))
        axes.yaxis.get_major_locator().set_params(integer=True)
    for index, seed in enumerate(seeds):
        color, marker = SEED_STYLES[index % len(SEED_STYLES)]
        stages = [stage for stage in data["stages"] if stage["seed"] == seed]
        style = {"color": color, "marker": marker, "markersize": 4.5, "alpha": 0.8}
        taus = [stage["tau"] for stage in stages]
        numbers = [stage["number"] for stage in stages]
        panels["stages"].plot(numbers, taus, linewidth=1.1, label=f"seed {seed}", **style)
        for quantity in QUANTITIES:
            values = [math.nan if s[quantity] is None else s[quantity] for s in stages]
            panels[quantity].plot(values, taus, linestyle="none", **style)
    panels["stages"].set_xlabel(f"stage, one after every {_steps(data)}")
    panels["stages"].set_ylabel("τ*: times the update was repeated")
    panels["stages"].xaxis.get_major_locator().set_params(integer=True)
    panels["stages"].legend(loc="upper right", ncols=2 if len(seeds) > 3 else 1, **LEGEND)
    labels = ("gradient norm", "condition number of the gradient matrices (median)")
    for quantity, label in zip(QUANTITIES, labels, strict=True):
        axes = panels[quantity]
        values = [s[quantity] for s in data["stages"] if s[quantity] and math.isfinite(s[quantity])]
        if values and max(values) > WIDE * min(values):
            axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_title(_correlation_text(data["correlations"][quantity]), loc="left", fontsize=10)
    panels["gradient_norm"].set_ylabel("τ*")


def _steps(data: dict[str, Any]) -> str:
    interval = data["config"]["fast_forward"]["interval"]
    return "optimizer step" if interval == 1 else f"{interval} optimizer steps"


def _correlation_text(found: dict[str, Any]) -> str:
    if found["rho"] is None:
        return f"no correlation to speak of (n = {found['n']})"
    text = f"Spearman ρ = {found['rho']:.2f}, n = {found['n']}"
    if found["partial"] is not None:
        text += f"; at equal step {found['partial']:.2f}"
    return text.replace("-", "−")
