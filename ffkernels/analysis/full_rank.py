"""Does Fast Forward need a low rank? LoRA of low and of full rank, and the weights themselves. Fig. 8.

    lora-r8              an adapter of the rank that was asked for
    lora-r<hidden>       one of the hidden size: as many directions as a square projection has
    full-attention       no adapter: the attention projections' own weights train
    full                 no adapter: every weight trains

What is measured is how many Fast Forward steps the stages take and what they save. What comes out depends on
the model: nothing here takes the answer for known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffkernels.analysis.race import ABOVE, APART, CONVENTIONS, Watch, outcome, race
from ffkernels.analysis.rank_sweep import rank_config
from ffkernels.reporting.plots import STYLES, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.models import load_model
from ffkernels.training.session import Session

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["VARIANTS", "draw", "full_rank"]

VARIANTS = ("low-rank", "full-rank", "full-attention", "full")


def full_rank(
    config: TrainConfig,
    *,
    variants: Sequence[str] = VARIANTS,
    full_lr: float | None = None,
    check_every: int = 1,
    tolerance: float = 1e-4,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Fast Forward on low-rank, full-rank and full fine-tuning side by side (the paper's Fig. 8).

    Args:
        config: the low-rank Adam run; the others change its rank (``alpha / rank`` stays) or its method. Its
            ``fast_forward`` is when and how the stages search.
        variants: which of ``VARIANTS``.
        full_lr: learning rate where a model's own weights train; None takes ``config.lr``.

    Returns:
        ``runs``, one per variant: its ``name``, ``lr``, ``trainable`` weights, ``adam`` and ``ff`` (see
        ``race.outcome``), ``ff_steps`` (Σ τ* over the stages) and ``stages_without_a_step``.

    Raises:
        ValueError: naming what was given and what is allowed; also when Adam diverged.
    """
    wrong = [variant for variant in variants if variant not in VARIANTS]
    if wrong or not variants or len(set(variants)) != len(variants):
        raise ValueError(
            f"variants={tuple(variants)!r}: must be of {', '.join(map(repr, VARIANTS))}, each once"
        )
    if config.method not in ("lora", "dora"):
        raise ValueError(f"method={config.method!r}: the low-rank run needs 'lora' or 'dora'")
    config = config.with_fast_forward()
    own = [variant for variant in variants if variant in ("full-attention", "full")]
    lr = config.lr if full_lr is None else full_lr
    # Made now, so that what cannot be is refused before anything runs.
    of_own = {variant: dataclasses.replace(config, method=variant, lr=lr) for variant in own}
    seen: dict[str, int] = {}  # of the model, from the latest run

    def look(session: Session) -> None:
        seen["hidden"] = session.model.config.hidden_size
        seen["trainable"] = session.meter.trainable_numel

    runs = []
    for variant in variants:
        one = of_own.get(variant, config)
        if variant == "full-rank":
            hidden = seen["hidden"] if seen else load_model(config.model)[0].config.hidden_size
            one = rank_config(config, hidden, "proportional")
        adam, results = race(
            one,
            {variant: config.fast_forward},
            check_every=check_every,
            tolerance=tolerance,
            watch=watch,
            on_session=look,
        )
        forwarded = outcome(results[variant], adam)
        runs.append(
            {
                "variant": variant,
                "name": f"{one.method} r={one.rank}" if one.method in ("lora", "dora") else one.method,
                "lr": one.lr,
                "trainable": seen["trainable"],
                "adam": outcome(adam),
                "ff": forwarded,
                "ff_steps": sum(stage["tau"] for stage in forwarded["stages"]),
                "stages_without_a_step": sum(stage["tau"] == 0 for stage in forwarded["stages"]),
            }
        )
    return {"check_every": check_every, "config": config.to_dict(), "runs": runs}


def draw(figure: Figure, data: dict[str, Any]) -> None:
    """τ* of every stage, and the FLOPs saved, of each way to train."""
    figure.set_size_inches(9.6, 3.8)
    taus, saved = figure.subplots(1, 2, gridspec_kw=APART)
    runs = data["runs"]
    styles = [STYLES[name] for name in ("parabolic", "linear", "adam-tuned", "other")]
    clean_axes(taus)
    for run, style in zip(runs, styles, strict=False):
        steps = [stage["optimizer_step"] for stage in run["ff"]["stages"]]
        found = [stage["tau"] for stage in run["ff"]["stages"]]
        taus.plot(steps, found, **style, markersize=6, linewidth=1.4, label=run["name"])
    taus.set_ylim(bottom=0)
    taus.xaxis.get_major_locator().set_params(integer=True)
    taus.set_xlabel("optimizer step at which the stage ran")
    taus.set_ylabel("τ*: Fast Forward steps of the stage")
    taus.legend(**{**ABOVE, "ncols": 2})
    clean_axes(saved)
    saved.grid(axis="x", visible=False)
    saved.axhline(0, color=STYLES["adam"]["color"], linewidth=1)
    for shift, (name, style) in zip((-0.2, 0.2), CONVENTIONS.items(), strict=True):
        bars = saved.bar(
            [x + shift for x in range(len(runs))],
            [100 * run["ff"]["saved"][name] if run["ff"]["saved"] else 0 for run in runs],
            width=0.38,
            color=style["color"],
            label=f"{name} FLOPs",
        )
        texts = [f"{100 * run['ff']['saved'][name]:.0f}" if run["ff"]["saved"] else "–" for run in runs]
        saved.bar_label(bars, labels=[text.replace("-", "−") for text in texts], fontsize=9, padding=2)
    saved.set_xticks(range(len(runs)), labels=[run["name"].replace(" ", "\n") for run in runs])
    saved.margins(y=0.12)  # room for the numbers
    saved.set_ylabel("FLOPs saved against Adam (%)")
    saved.legend(**{**ABOVE, "ncols": 2})
