"""The loss along one update (the paper's Fig. 10): W(τ) = W_k + τ·(W_k − W_(k−1)), τ = 0, 1, …, 100.

The optimizer trains k steps; then the weights walk along its last update, and validation and test loss are
measured at every τ. Afterwards W_k is restored bit for bit and training goes on to the next k.

    before step k     best ← W                            ops.checkpoint_
    after it          Δ ← W − best; best ← W              ops.delta_
    for every τ       W ← best + τ·Δ; measure             ops.step_, accept = 0, k = τ
    at the end        W ← best                            ops.step_, accept = 0, k = 0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ffkernels import ops
from ffkernels.analysis.between_steps import waiting_stages
from ffkernels.analysis.curves import shape
from ffkernels.reporting.plots import TEXT, clean_axes
from ffkernels.stage.weights import local_tensors, trainable_weights
from ffkernels.training.session import open_session

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ffkernels.training.config import TrainConfig

__all__ = ["draw", "sweep_table", "tau_sweep"]

SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Of three sizes, one around the other, since all three are often in the same place.
_HOLLOW = {"linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 1.3, "zorder": 3}
MARKS: dict[str, dict[str, Any]] = {
    "lowest loss": {**_HOLLOW, "marker": "o", "markersize": 4, "markerfacecolor": TEXT},
    "the linear search stops": {**_HOLLOW, "marker": "s", "markersize": 8},
    "the parabolic search stops": {**_HOLLOW, "marker": "o", "markersize": 13},
}


def tau_sweep(config: TrainConfig, *, at: Sequence[int] = (6, 12, 24), taus: int = 100) -> dict[str, Any]:
    """Sweep τ from 0 to ``taus`` after each optimizer step of ``at`` (the paper's Fig. 10).

    Args:
        config: the run. With ``fast_forward`` its stages run too, after the sweep where both are due, so that
            a sweep sees what the stage will see; without, the optimizer alone trains. It takes ``max(at)``
            steps, whatever ``config.steps`` is.
        at: optimizer steps, counted from 1.
        taus: the largest τ, at least 2.

    Returns:
        ``config``; ``taus``; ``sweeps``: for each step ``optimizer_step``, ``lr``, ``train_loss`` (of its
        batch, before the update), ``validation`` and ``test`` (losses in nats per token, one per τ), and
        their shapes ``of_validation`` and ``of_test`` (see ``curves.shape``).

    Raises:
        ValueError: when ``at`` or ``taus`` is out of range, or the run has diverged before a sweep.
    """
    at = sorted(set(at))
    if not at or at[0] < 1:
        raise ValueError(f"at={at}: must be optimizer steps of at least 1, one or more")
    if taus < 2:
        raise ValueError(f"taus={taus}: must be at least 2")
    config = replace(config, steps=at[-1], epochs=None)
    sweeps = []
    with open_session(config, attach=waiting_stages) as session:
        for step in range(session.steps):
            loss = session.backward(session.load(step))
            if step + 1 not in at:
                session.update(step)
            else:
                weights = trainable_weights(session.model, session.optimizer)
                table = ops.TensorTable(local_tensors(weights))
                ops.checkpoint_(table)
                session.update(step)
                ops.delta_(table)
                losses = sweep_table(table, range(taus + 1), (session.validation, session.test))
                del table
                validation, test = ([float(pair[i]) for pair in losses] for i in (0, 1))
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


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """Validation and test loss over τ, a line per optimizer step, with minima and where searches stop."""
    figure.set_size_inches(9.6, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measured in zip(panels, ("validation", "test"), strict=True):
        clean_axes(axes)
        for sweep, color in zip(data["sweeps"], cycle(SHADES), strict=False):
            label = f"optimizer step {sweep['optimizer_step']}"
            axes.plot(data["taus"], sweep[measured], color=color, linewidth=1.6, label=label)
            _marks(axes, sweep, measured, color)
        axes.set_xlim(left=0)
        axes.set_xlabel("τ: times the update was repeated")
        axes.set_title(f"{measured} loss", loc="left")
    panels[0].set_ylabel("loss (nats per token)")
    for name, mark in MARKS.items():
        panels[0].plot([], [], label=name, **{**mark, "markeredgecolor": TEXT})
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _marks(axes: Axes, sweep: dict[str, Any], measured: str, color: str) -> None:
    """The lowest point of this curve; the searches look at validation losses only, and stop there."""
    stops = {search: sweep["of_validation"][search]["tau"] for search in ("linear", "parabolic")}
    taus = (sweep[f"of_{measured}"]["argmin"], stops["linear"], stops["parabolic"])
    for tau, mark in zip(taus, MARKS.values(), strict=True):
        axes.plot(tau, sweep[measured][tau], clip_on=False, **{**mark, "markeredgecolor": color})
