"""What the analyses refuse before anything is written: errors name what was given and what is allowed."""

from importlib import import_module

import pytest

from ffkernels.analysis.show import Watch
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.config import TrainConfig

WILD = {"lr": 1e30, "warmup_steps": 0}
PLAIN = {"fast_forward": None}
AN_INTEGER = "must be an integer of at least"
ONCE = "must be one or more integers, each once"

REFUSED = [
    ("loss_curve.loss_curve", PLAIN, {}, "fast_forward is None"),
    ("loss_curve.loss_curve", {}, {"evaluate_every": 0}, "evaluate_every=0"),
    ("stage_taus.stage_taus", PLAIN, {}, "fast_forward is None"),
    ("stage_taus.stage_taus", {}, {"seeds": ()}, "seeds is empty"),
    ("tau_sweep.tau_sweep", {}, {"at": ()}, "at="),
    ("tau_sweep.tau_sweep", {}, {"at": (0, 3)}, r"at=\[0, 3\]"),
    ("tau_sweep.tau_sweep", {}, {"taus": 1}, "taus=1"),
    ("sweeps.interval", {}, {"intervals": ()}, ONCE),
    ("sweeps.interval", {}, {"intervals": (2, 2)}, ONCE),
    ("sweeps.interval", {}, {"intervals": (0,)}, f"interval=0: {AN_INTEGER} 1"),
    ("sweeps.rank", {"method": "full"}, {}, "method='full' has no rank"),
    ("sweeps.rank", {}, {"ranks": (4, 4)}, rf"ranks=\(4, 4\): {ONCE}"),
    ("sweeps.rank", {}, {"ranks": (4, 0)}, f"rank=0: {AN_INTEGER} 1"),
    ("sweeps.rank", {}, {"scaling": "double"}, "scaling='double': must be one of 'proportional', 'fixed'"),
    ("full_rank.full_rank", {"method": "full"}, {}, "method='full': the low-rank run needs 'lora' or 'dora'"),
    ("full_rank.full_rank", {"dtype": "bfloat16"}, {}, "bfloat16"),
    ("full_rank.full_rank", {}, {"full_lr": -1.0}, r"lr=-1\.0"),
    ("full_rank.full_rank", {}, {"full_lr": 0.0}, "lr=0"),
    ("convergence.convergence", {}, {"window": 0}, f"window=0: {AN_INTEGER} 1"),
    (
        "convergence.convergence",
        {"evaluate_every": 0},
        {},
        "evaluate_every=0: must be from 1 to the window of 40",
    ),
    (
        "convergence.convergence",
        {"evaluate_every": 9},
        {"window": 8},
        "=9: must be from 1 to the window of 8",
    ),
    (
        "convergence.convergence",
        {},
        {"min_delta": float("nan")},
        "min_delta=nan: must be a number of at least 0",
    ),
    ("accuracy.accuracy", {}, {"questions": 0}, f"questions=0: {AN_INTEGER} 1"),
    ("gradient_consistency.gradient_consistency", {}, {"batches": 1}, f"batches=1: {AN_INTEGER} 2"),
    ("gradient_consistency.gradient_consistency", {}, {"batches": 2.0}, f"batches=2.0: {AN_INTEGER} 2"),
    (
        "gradient_consistency.gradient_consistency",
        {},
        {"batches": 100},
        r"100 disjoint batches of 8 need 800 training examples, .* has 96",
    ),
    ("gradient_similarity.gradient_similarity", {}, {"window": 0}, f"window=0: {AN_INTEGER} 1"),
    ("gradient_similarity.gradient_similarity", {}, {"window": True}, f"window=True: {AN_INTEGER} 1"),
    ("loss_plane.loss_plane", {}, {"until": "epoch"}, "until='epoch': must be one of 'loss', 'steps'"),
    ("loss_plane.loss_plane", {}, {"grid": 2}, f"grid=2: {AN_INTEGER} 3"),
    ("loss_plane.loss_plane", {}, {"margin": -0.1}, "margin=-0.1"),
    ("loss_plane.loss_plane", {}, {"margin": float("inf")}, "margin=inf"),
    ("loss_plane.loss_plane", {}, {"examples": 0}, f"examples=0: {AN_INTEGER} 1"),
]
DIVERGED = [
    ("sweeps.interval", {}, r"lr=1e\+30: Adam diverged after \d+ steps"),
    ("convergence.convergence", {}, r"lr=1e\+30: adam diverged after \d+ steps"),
    ("gradient_consistency.gradient_consistency", {"batches": 2}, r"lr=1e\+30: the run has diverged"),
    ("gradient_similarity.gradient_similarity", {}, r"lr=1e\+30: it diverged"),
    ("loss_plane.loss_plane", {}, r"diverged at lr=1e\+30"),
]


@pytest.mark.parametrize(
    ("analysis", "changes", "arguments", "message"),
    REFUSED + [(analysis, WILD, arguments, message) for analysis, arguments, message in DIVERGED],
)
def test_what_an_analysis_refuses(small, analysis, changes, arguments, message):
    file, _, function = analysis.partition(".")
    run = getattr(import_module(f"ffkernels.analysis.{file}"), function)
    settings = {**small, "evaluate_every": 2, "fast_forward": FastForwardConfig(interval=3), **changes}
    config, seen = TrainConfig(**settings), []
    if file in ("sweeps", "full_rank", "convergence", "accuracy"):
        arguments = {**arguments, "watch": Watch(run=seen.append)}
    with pytest.raises(ValueError, match=message):
        run(config, **arguments)
    assert changes is WILD or not seen  # what cannot be is refused before anything runs
