"""Does Fast Forward need a low rank? LoRA of low and of full rank, and the weights themselves. Fig. 8.

low-rank          an adapter of the rank that was asked for
full-rank         one of the hidden size: as many directions as a square projection has
full-attention    no adapter: the attention projections' own weights train
full              no adapter: every weight trains
"""

from __future__ import annotations

from dataclasses import replace

from ffkernels.analysis.race import APART, COLUMNS, CONVENTIONS, against_adam, cells, draw_taus
from ffkernels.analysis.show import Data, Table, Watch, than_adam
from ffkernels.analysis.sweeps import rank_config
from ffkernels.reporting.plots import ABOVE, STYLES, Figure, clean_axes
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Session

VARIANTS = ("low-rank", "full-rank", "full-attention", "full")


def full_rank(
    config: TrainConfig, *, full_lr: float | None = None, check_every: int = 1, watch: Watch | None = None
) -> Data:
    """Fast Forward on low-rank, full-rank and full fine-tuning side by side (the paper's Fig. 8).

    Args:
        config: the low-rank Adam run; the others change its rank (``alpha / rank`` stays) or its method. Its
            ``fast_forward`` is when and how the stages search.
        full_lr: learning rate where a model's own weights train; None takes ``config.lr``.

    Returns:
        ``runs``, one per ``variant``: its ``name``, ``lr``, ``trainable`` weights, ``adam`` and ``ff`` (see
        ``race.outcome``), ``ff_steps`` (Σ τ* over the stages) and ``stages_without_a_step``.

    Raises:
        ValueError: naming what was given and what is allowed; also when Adam diverged.
    """
    if config.method not in ("lora", "dora"):
        raise ValueError(f"method={config.method!r}: the low-rank run needs 'lora' or 'dora'")
    config = config.with_fast_forward()
    lr = config.lr if full_lr is None else full_lr
    # Made now, so that what cannot be is refused before anything runs.
    configs = {variant: replace(config, method=variant, lr=lr) for variant in ("full-attention", "full")}
    runs, hidden = [], []

    def look(session: Session) -> None:
        hidden.append(session.model.config.hidden_size)

    for variant in VARIANTS:
        one = configs.get(variant, config)
        if variant == "full-rank":
            one = rank_config(config, hidden[0], "proportional")
        outcomes = against_adam(one, look, check_every=check_every, watch=watch)
        taus = [stage["tau"] for stage in outcomes["ff"]["stages"]]
        runs.append(
            {
                "variant": variant,
                "name": f"{one.method} r={one.rank}" if one.method in ("lora", "dora") else one.method,
                "lr": one.lr,
                **outcomes,
                "ff_steps": sum(taus),
                "stages_without_a_step": taus.count(0),
            }
        )
    return {"check_every": check_every, "config": config.to_dict(), "runs": runs}


def table(data: Data) -> Table:
    header = ["what trains", "weights", "lr", "Adam's test loss", *COLUMNS]
    return header, [
        [run["name"], run["trainable"], run["lr"], run["adam"]["test_loss"], *cells(run["ff"])]
        for run in data["runs"]
    ]


def what_was_seen(data: Data) -> list[str]:
    seen = []
    for run in data["runs"]:
        forwarded, none = run["ff"], run["stages_without_a_step"]
        took = f"{run['name']}: {len(forwarded['stages'])} stages took {run['ff_steps']} steps"
        if forwarded["saved"]:
            cost = f"Adam's test loss for {than_adam(forwarded['saved']['measured'])}"
        else:
            cost = f"Adam's test loss was not reached in {forwarded['optimizer_steps']} optimizer steps"
        seen.append(f"{took}{f', {none} of them none' if none else ''}; {cost}.")
    return seen


def draw(figure: Figure, data: Data) -> None:
    """τ* of every stage, and the FLOPs saved, of each way to train."""
    figure.set_size_inches(9.6, 3.8)
    taus, saved = figure.subplots(1, 2, gridspec_kw=APART)
    runs, legend = data["runs"], {**ABOVE, "ncols": 2}
    for run, kind in zip(runs, ("parabolic", "linear", "adam-tuned", "other"), strict=True):
        draw_taus(taus, run["ff"]["stages"], **STYLES[kind], label=run["name"])
    taus.set_ylim(bottom=0)
    taus.legend(**legend)
    clean_axes(saved, y="FLOPs saved against Adam (%)")
    saved.grid(axis="x", visible=False)
    saved.axhline(0, color=STYLES["adam"]["color"], linewidth=1)
    places = range(len(runs))
    for shift, (name, style) in zip((-0.2, 0.2), CONVENTIONS.items(), strict=True):
        shares = [100 * run["ff"]["saved"][name] if run["ff"]["saved"] else None for run in runs]
        heights, label = [share or 0 for share in shares], f"{name} FLOPs"
        bars = saved.bar([x + shift for x in places], heights, width=0.38, color=style["color"], label=label)
        texts = ["–" if share is None else f"{share:.0f}".replace("-", "−") for share in shares]
        saved.bar_label(bars, labels=texts, fontsize=9, padding=2)
    saved.set_xticks(places, labels=[run["name"].replace(" ", "\n") for run in runs])
    saved.margins(y=0.12)  # room for the numbers
    saved.legend(**legend)
