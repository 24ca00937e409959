"""The paper's comparison: how much training does Fast Forward save on the way to Adam's own test loss?

For every seed, with the same data order, adapter initialisation and learning rate:

    adam-s0         N steps; its final test loss is L*
    linear-s0       Fast Forward with the paper's search until test loss ≤ L* + 1e-4, N steps at most
    parabolic-s0    the same with the bracketing search
    authors-s0      the same with a peer, another Fast Forward loop (peers.py); for every peer asked for
    lora-plus-s0    no Fast Forward but LoRA+, until the same test loss; where it is asked for
    auto-s0         no Fast Forward and no learning rate given, until the same test loss
    adam-tuned-s0   no Fast Forward but a tuned learning rate, until the same test loss: the honest row,
                    because a tuned learning rate is what a user would try first; adam-untuned-s0 where
                    nothing is known of the model and task, or not with these batches: a usual rate

All runs share one process, after throwaway runs through every code path, the peers' too, so that first-use
costs fall on none of them. The tuned learning rate is an option, the outcome of a sweep, or a number
measured once per model and task.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ffkernels.engine.config import FastForwardConfig
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.reporting.exclusive import alone_in
from ffkernels.search.search import SEARCHES
from ffkernels.training.config import ADAPTERS, TrainConfig
from ffkernels.training.peers import load_peer, peer_names
from ffkernels.training.session import Attach
from ffkernels.training.trainer import RunResult, train

__all__ = ["LORA_PLUS", "SWEEP", "TUNED_LR", "Comparison", "compare"]

# The peer that is an optimizer and no Fast Forward.
LORA_PLUS = "lora-plus"

# Adam's best constant learning rate for rank-8 adapters by (model, task), each found with --sweep, lr 1e-4,
# batch 64. Others: give --tuned-lr or --sweep.
TUNED_LR = {
    ("tiny", "instruction"): 1e-2,
    ("tiny", "medical"): 2e-2,
    ("tiny", "chat"): 2e-2,
}
# Settings that these were measured with the defaults of.
MEASURED_WITH = ("data", "source", "chat_loss", "method", "rank", "alpha", "targets", "optimizer")
# With others of these they are usual values, as near as any, that nobody has tuned.
TUNED_AT = ("batch_size", "max_length", "schedule", "dtype")
FALLBACK_TUNED_LR = 3e-3
UNTUNED = "a usual value, not measured for this model and task"
TUNED_ELSEWHERE = "measured for this model and task, but not at this batch size, length, schedule and dtype"
# The likely ones first: the least number of steps found bounds the length of all later runs.
SWEEP = (1e-2, 5e-3, 2e-2, 3e-3, 2e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        base: the Adam run; ``name``, ``fast_forward`` and ``target_loss`` are the comparison's to set.
        seeds: one round of runs for each.
        searches: which searches Fast Forward runs with.
        peers: other loops beside ours: names of ``peers.py`` ("authors", "peft-prototype"), and "lora-plus".
        fast_forward: interval, max_tau and so on; its ``search`` is replaced.
        tuned_lr: the learning rate of the tuned row; None takes the sweep's or the table's.
        sweep: find the tuned learning rate first: the one that reaches the target in the fewest steps,
            seed 0's.
        check_every: optimizer steps between test losses in the runs that stop at the target.
        tolerance: how far above Adam's final test loss counts as reached.

    Raises:
        ValueError: naming the field, the value and what is allowed.
        RuntimeError: when a peer is asked for and the package stands without its repository.
    """

    base: TrainConfig
    seeds: Sequence[int] = (0,)
    searches: Sequence[str] = ("linear", "parabolic")
    peers: Sequence[str] = ()
    fast_forward: FastForwardConfig = field(default_factory=FastForwardConfig)
    tuned_lr: float | None = None
    sweep: bool = False
    check_every: int = 3
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        seeds = tuple(self.seeds)
        if not seeds or any(not isinstance(s, int) or isinstance(s, bool) or s < 0 for s in seeds):
            raise ValueError(f"seeds={self.seeds!r}: must be integers of at least 0, one or more")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds={self.seeds!r}: each may occur once")
        if not self.searches or any(s not in SEARCHES for s in self.searches):
            raise ValueError(
                f"searches={self.searches!r}: must be of {', '.join(map(repr, SEARCHES))}, one or more"
            )
        self._check_peers()
        if self.base.test_examples == 0:
            raise ValueError("test_examples=0: must be at least 1: the runs are compared at a test loss")
        if self.tuned_lr is not None and not 0 < self.tuned_lr < math.inf:
            raise ValueError(f"tuned_lr={self.tuned_lr!r}: must be a number above 0 or None")
        if self.tuned_lr is not None and self.sweep:
            raise ValueError(f"tuned_lr={self.tuned_lr!r} and sweep=True: give one of them")
        if (
            isinstance(self.check_every, bool)
            or not isinstance(self.check_every, int)
            or self.check_every < 1
        ):
            raise ValueError(f"check_every={self.check_every!r}: must be an integer of at least 1")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance!r}: must be a number of at least 0")

    def _check_peers(self) -> None:
        if isinstance(self.peers, str) or len(set(self.peers)) < len(self.peers):
            raise ValueError(f"peers={self.peers!r}: must be a list of names, each at most once")
        known = (LORA_PLUS, *peer_names())
        for name in self.peers:
            if name == LORA_PLUS:
                if self.base.optimizer == LORA_PLUS:
                    raise ValueError(f"peers={self.peers!r}: the base run is {LORA_PLUS!r} itself")
                dataclasses.replace(self.base, optimizer=LORA_PLUS)  # or the reason why it cannot be
            elif name in known or len(known) == 1:  # without the repository there are none: load_peer says so
                try:
                    load_peer(name)
                except ImportError as error:  # of a package that the peer needs
                    raise RuntimeError(str(error)) from error
            else:
                raise ValueError(f"peers={self.peers!r}: must be of {', '.join(map(repr, known))}")

    @property
    def runs(self) -> int:
        """How many runs it takes, a sweep's among them."""
        of_a_seed = 1 + len(self.searches) + len(self.peers) + 2
        return len(self.seeds) * of_a_seed + (len(SWEEP) if _tuned_lr(self)[0] is None else 0)

    @property
    def no_rate(self) -> FastForwardConfig:
        """No stages, and no learning rate to choose."""
        return FastForwardConfig(interval=None, learning_rate="auto", impl=self.fast_forward.impl)

    def adam(self, seed: int) -> TrainConfig:
        return dataclasses.replace(
            self.base, name=f"adam-s{seed}", seed=seed, fast_forward=None, target_loss=None
        )

    def until(self, reached: RunResult, seed: int, name: str, **changes: Any) -> TrainConfig:
        """A run that stops when it is as good as ``reached``, and takes no more steps than it."""
        return dataclasses.replace(
            self.adam(seed),
            name=f"{name}-s{seed}",
            epochs=None,
            steps=reached.optimizer_steps,
            target_loss=reached.test_loss + self.tolerance,
            evaluate_every=self.check_every,
            **changes,
        )


class Interrupted(Exception):
    """Ctrl-C between or inside runs; the logs written so far stay."""


OnEvent = Callable[[dict[str, Any]], None]


def compare(
    comparison: Comparison,
    *,
    on_run: Callable[[TrainConfig], None] | None = None,
    on_event: OnEvent | None = None,
) -> tuple[list[RunResult], dict[str, Any]]:
    """Run the protocol; return every run's result and what else belongs into the report's ``config``.

    ``on_run`` is told each run before it starts, ``on_event`` gets its log events.

    Raises:
        Interrupted: after Ctrl-C, when the present run has been closed.
        ValueError: when Adam diverged, so that there is no test loss to reach.
        RuntimeError: when another comparison is writing into the same folder.
    """
    base = comparison.base

    def run(config: TrainConfig, attach: Attach | None = None) -> RunResult:
        if on_run is not None:
            on_run(config)
        return _uninterrupted(config, on_event, attach)

    if base.threads is not None:
        torch.set_num_threads(base.threads)
    with alone_in(base.out):
        return _compare(comparison, run)


def _compare(comparison: Comparison, run: Callable[..., RunResult]) -> tuple[list[RunResult], dict[str, Any]]:
    base = comparison.base
    warm_up(comparison)
    results = []
    tuned_lr, source = _tuned_lr(comparison)
    for seed in comparison.seeds:
        adam = run(comparison.adam(seed))
        results.append(adam)
        if not math.isfinite(adam.test_loss):
            raise ValueError(
                f"lr={base.lr!r}: {adam.name} diverged after {adam.optimizer_steps} steps, so there is no "
                "test loss to reach; take a smaller learning rate"
            )
        for search in comparison.searches:
            ff = dataclasses.replace(comparison.fast_forward, search=search)
            results.append(run(comparison.until(adam, seed, search, fast_forward=ff)))
        for name in comparison.peers:
            if name == LORA_PLUS:
                results.append(run(comparison.until(adam, seed, name, optimizer=LORA_PLUS)))
            else:
                attach = partial(load_peer(name), interval=comparison.fast_forward.interval)
                results.append(run(comparison.until(adam, seed, name), attach))
        results.append(run(comparison.until(adam, seed, "auto", fast_forward=comparison.no_rate)))
        if tuned_lr is None:
            tuned_lr, source = sweep(comparison, adam, seed, run), "sweep"
        name = "adam-untuned" if source in (UNTUNED, TUNED_ELSEWHERE) else "adam-tuned"
        results.append(run(comparison.until(adam, seed, name, lr=tuned_lr)))
    protocol = {
        "seeds": list(comparison.seeds),
        "searches": list(comparison.searches),
        "peers": list(comparison.peers),
        "tuned_lr": tuned_lr,
        "tuned_lr_source": source,
        "tolerance": comparison.tolerance,
        "check_every": comparison.check_every,
    }
    return results, protocol


def warm_up(comparison: Comparison) -> None:
    """Throwaway runs of a step or two with a stage and a test loss, one for each way to run it.

    So first-use costs fall on no run that is measured, be it ours or a peer's.
    """
    first = comparison.fast_forward.interval
    ff = dataclasses.replace(comparison.fast_forward, interval=1, warmup=0, max_tau=4)
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder, warnings.catch_warnings():
        # Their stages are cut short here on purpose.
        warnings.filterwarnings("ignore", message=".* repeated an update", category=FFKernelsNotice)
        plain = dataclasses.replace(
            comparison.adam(comparison.seeds[0]), name="warm-up", out=folder, epochs=None, steps=1
        )
        for search in comparison.searches:
            stages = dataclasses.replace(ff, search=search)
            _uninterrupted(dataclasses.replace(plain, fast_forward=stages), None)
        # The second step has an alignment, and the rate rises.
        _uninterrupted(dataclasses.replace(plain, steps=2, fast_forward=comparison.no_rate), None)
        for name in comparison.peers:
            if name == LORA_PLUS:
                _uninterrupted(dataclasses.replace(plain, optimizer=LORA_PLUS), None)
            else:
                # A stage of theirs needs the weights of two steps.
                attach = partial(load_peer(name), interval=min(2, first), cap=2)
                _uninterrupted(dataclasses.replace(plain, steps=2), None, attach)


def sweep(
    comparison: Comparison, adam: RunResult, seed: int, run: Callable[[TrainConfig], RunResult]
) -> float:
    """The learning rate with which Adam gets to the target in the fewest steps; ties by the test loss there.

    It is chosen by the test loss it is then judged by: generous to Adam, on purpose.
    """
    best: tuple[tuple[bool, int, float], float] | None = None
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
        for lr in SWEEP:
            config = comparison.until(adam, seed, f"sweep-{lr:g}", lr=lr, out=folder)
            if best is not None and not best[0][0] and comparison.base.schedule == "constant":
                config = dataclasses.replace(config, steps=best[0][1])  # more steps could not win
            result = run(config)
            reached = bool(result.reached_target)
            # A run that diverged ended early and got nowhere: its few steps are no merit.
            loss = result.test_loss if math.isfinite(result.test_loss) else math.inf
            score = (not reached, result.optimizer_steps if reached else 0, loss)
            if best is None or score < best[0]:
                best = (score, lr)
    return best[1]


def _tuned_lr(comparison: Comparison) -> tuple[float | None, str]:
    if comparison.tuned_lr is not None:
        return comparison.tuned_lr, "option"
    if comparison.sweep:
        return None, "sweep"
    base = comparison.base
    if base.method not in ADAPTERS:
        return None, "sweep"  # nothing is known of whole models, whose best rates lie far apart
    ours = TrainConfig()
    alike = all(getattr(base, name) == getattr(ours, name) for name in MEASURED_WITH)
    known = TUNED_LR.get((base.model, base.task)) if alike else None
    if known is not None:
        same = all(getattr(base, name) == getattr(ours, name) for name in TUNED_AT)
        return known, "table" if same else TUNED_ELSEWHERE
    return FALLBACK_TUNED_LR, UNTUNED


def _uninterrupted(config: TrainConfig, on_event: OnEvent | None, attach: Attach | None = None) -> RunResult:
    try:
        result = train(config, on_event=on_event, save=False, attach=attach)
    except KeyboardInterrupt:  # before or after its loop, or the second Ctrl-C
        raise Interrupted(config.name) from None
    if result.ctrl_c:
        raise Interrupted(config.name)
    return result
