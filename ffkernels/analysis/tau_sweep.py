"""The loss along one update (the paper's Fig. 10): W(τ) = W_k + τ·(W_k − W_(k−1)), τ = 0, 1, …, 100.

before step k     best ← W                            ops.checkpoint_
after it          Δ ← W − best; best ← W              ops.delta_
for every τ       W ← best + τ·Δ; measure             ops.step_, accept = 0, k = τ
at the end        W ← best                            ops.step_, accept = 0, k = 0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from typing import Any

from ffkernels import ops
from ffkernels.analysis.show import Data, Table
from ffkernels.reporting.numbers import percent
from ffkernels.reporting.plots import TEXT, Figure, clean_axes
from ffkernels.search.search import make_search
from ffkernels.stage.weights import local_tensors, trainable_weights
from ffkernels.training.config import TrainConfig
from ffkernels.training.rules import check, whole
from ffkernels.training.session import open_session, waiting_stages

SEARCHES = ("linear", "parabolic")
SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Of three sizes, one around the other, since all three are often in the same place.
_HOLLOW = {"linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.3, "zorder": 3}
MARKS: dict[str, dict[str, Any]] = {
    "lowest loss": {**_HOLLOW, "marker": "o", "markersize": 4, "markerfacecolor": TEXT},
    "the linear search stops": {**_HOLLOW, "marker": "s", "markersize": 8},
    "the parabolic search stops": {**_HOLLOW, "marker": "o", "markersize": 13},
}


def tau_sweep(config: TrainConfig, *, at: Sequence[int] = (6, 12, 24), taus: int = 100) -> Data:
    """Sweep τ from 0 to ``taus`` after each optimizer step of ``at`` (the paper's Fig. 10).

    Args:
        config: the run. With ``fast_forward`` its stages run too, after the sweep where both are due, so that
            a sweep sees what the stage will see; without, the optimizer alone trains. It takes ``max(at)``
            steps, whatever ``config.steps`` is.
        at: optimizer steps, counted from 1.
        taus: the largest τ, at least 2.

    Returns:
        ``config``; ``taus``; ``sweeps``: for each step ``optimizer_step``, ``lr``, ``train_loss`` (of its
        batch, before the update), ``validation`` and ``test`` (nats per token, one per τ) and their
        ``shape``, ``of_validation`` and ``of_test``.

    Raises:
        ValueError: when ``at`` or ``taus`` is out of range, or the run has diverged before a sweep.
    """
    at = sorted(set(at))
    if not at or at[0] < 1:
        raise ValueError(f"at={at}: must be optimizer steps of at least 1, one or more")
    check("taus", taus, whole(2))
    config = replace(config, steps=at[-1], epochs=None)
    sweeps = []
    with open_session(config, attach=waiting_stages) as session:
        for step in range(session.steps):
            loss = session.backward(session.load(step))
            if step + 1 not in at:
                session.update(step)
            else:
                table = ops.TensorTable(local_tensors(trainable_weights(session.model, session.optimizer)))
                ops.checkpoint_(table)
                session.update(step)
                ops.delta_(table)
                losses = sweep_table(table, range(taus + 1), (session.validation, session.test))
                del table
                validation, test = map(list, zip(*losses, strict=True))
                sweeps.append(
                    {
                        "optimizer_step": step + 1,
                        "lr": session.learning_rate(step),
                        "train_loss": loss.item(),
                        "validation": validation,
                        "test": test,
                        "of_validation": shape(validation),
                        "of_test": shape(test),
                    }
                )
            if session.ff is not None:
                session.ff.run_due_stage()
    return {"config": config.to_dict(), "taus": list(range(taus + 1)), "sweeps": sweeps}


def sweep_table(
    table: ops.TensorTable, taus: Sequence[int], losses: Sequence[Callable[[], Any]]
) -> list[tuple[float, ...]]:
    """Each of ``losses`` at best + τ·Δ for every τ; the weights are those in ``table.best`` afterwards.

    Also when something raises. Gradients, optimizer and random state are not touched.
    """
    measured = []
    try:
        for tau in taus:
            ops.step_(table, False, float(tau))
            measured.append(tuple(float(loss()) for loss in losses))
    finally:
        ops.step_(table, False, 0.0)
    return measured


def shape(losses: Sequence[float]) -> Data:
    """What can be said about ``losses`` at τ = 0, 1, …, of which there must be three or more.

    Returns:
        ``argmin``: the first τ with the lowest loss; ``decrease``: f(0) minus that loss; ``convex_share``:
        the fraction of finite second differences above 0; ``convex_until``: the largest τ up to which all
        are; ``turning_points``: how often the curve turns from falling to rising or back; ``unimodal``:
        whether it never falls again once it has risen; ``linear``, ``parabolic``: the ``replay`` of that
        search.

    Raises:
        ValueError: for fewer than three losses, or when the one at τ = 0 is not finite.
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in map(float, losses)]
    if len(losses) < 3:
        raise ValueError(f"{len(losses)} losses: the shape of a curve needs at least 3")
    if losses[0] == math.inf:
        raise ValueError("the loss at tau 0 is not finite: the model had diverged before the sweep")
    seconds = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    finite = [d for d in seconds if math.isfinite(d)]
    lowest = min(losses)
    # Of every step that is one down or up; a flat piece in between is no turn itself.
    signs = [1 if b > a else -1 for a, b in pairwise(losses) if b != a]
    return {
        "argmin": losses.index(lowest),
        "decrease": losses[0] - lowest,
        "convex_share": sum(d > 0 for d in finite) / len(finite) if finite else math.nan,
        "convex_until": next((i for i, d in enumerate(seconds) if not d > 0), len(seconds)),
        "turning_points": sum(a != b for a, b in pairwise(signs)),
        "unimodal": signs == sorted(signs),
        **{search: replay(search, losses) for search in SEARCHES},
    }


def replay(search: str, losses: Sequence[float]) -> Data:
    """Run a search of the library over known losses, which need not be trained for again.

    ``tau`` is where it stops, at most at the end of the curve; ``evaluations``: losses it asked for;
    ``found``: the share of the whole decrease that it gets, NaN where the curve never falls.
    """
    machine = make_search(search, max_tau=len(losses) - 1)
    while (tau := machine.propose()) is not None:
        machine.observe(tau, losses[tau])
    whole = losses[0] - min(losses)
    return {
        "tau": machine.best_tau,
        "evaluations": len(machine.losses),
        "stopped_because": machine.stopped_because,
        "found": (losses[0] - machine.best_loss) / whole if whole > 0 else math.nan,
    }


def table(data: Data) -> Table:
    header = ["step and loss", "argmin", "decrease", "convex", "turns", "unimodal", "linear τ", "parabolic τ"]
    rows = []
    for sweep in data["sweeps"]:
        for measured in ("validation", "test"):
            found = sweep[f"of_{measured}"]
            # The searches never see a test loss.
            stops = [found[search]["tau"] if measured == "validation" else None for search in SEARCHES]
            convex, unimodal = percent(found["convex_share"]), "yes" if found["unimodal"] else "no"
            row = [found["argmin"], found["decrease"], convex, found["turning_points"], unimodal, *stops]
            rows.append([f"{sweep['optimizer_step']} {measured}", *row])
    return header, rows


def what_was_seen(data: Data) -> list[str]:
    shapes = [sweep[of] for sweep in data["sweeps"] for of in ("of_validation", "of_test")]
    shares = [found["convex_share"] for found in shapes]
    seen = [
        f"{sum(found['unimodal'] for found in shapes)} of {len(shapes)} curves have one minimum and no other "
        f"turn; {percent(min(shares))} to {percent(max(shares))} of their second differences are positive."
    ]
    fallen = [sweep["of_validation"] for sweep in data["sweeps"] if sweep["of_validation"]["decrease"] > 0]
    if fallen:
        least = {search: 100 * min(f[search]["found"] for f in fallen) for search in SEARCHES}
        most = {search: max(f[search]["evaluations"] for f in fallen) for search in SEARCHES}
        seen.append(
            "Of what the validation loss falls in all, the linear search gets at least "
            f"{least['linear']:.1f} % in up to {most['linear']} validations, the parabolic "
            f"{least['parabolic']:.1f} % in up to {most['parabolic']}."
        )
    return seen


def draw(figure: Figure, data: Data) -> None:
    """Validation and test loss over τ, a line per optimizer step, with minima and where searches stop."""
    figure.set_size_inches(9.6, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measured in zip(panels, ("validation", "test"), strict=True):
        clean_axes(axes, "τ: times the update was repeated", title=f"{measured} loss")
        for sweep, color in zip(data["sweeps"], cycle(SHADES), strict=False):
            losses, label = sweep[measured], f"optimizer step {sweep['optimizer_step']}"
            axes.plot(data["taus"], losses, color=color, linewidth=1.6, label=label)
            # The searches look at validation losses only, and stop there in both panels.
            stops = (sweep["of_validation"][search]["tau"] for search in SEARCHES)
            for tau, mark in zip((sweep[f"of_{measured}"]["argmin"], *stops), MARKS.values(), strict=True):
                axes.plot(tau, losses[tau], clip_on=False, **{**mark, "markeredgecolor": color})
        axes.set_xlim(left=0)
    panels[0].set_ylabel("loss (nats per token)")
    for name, mark in MARKS.items():
        panels[0].plot([], [], label=name, **{**mark, "markeredgecolor": TEXT})
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
