"""The paper's comparison: how much training does Fast Forward save on the way to Adam's own test loss?

For every seed, with the same data order, adapter initialisation and learning rate:

    adam-s0         N steps; its final test loss is L*
    linear-s0       Fast Forward with the paper's search until test loss ≤ L* + 1e-4, N steps at most
    parabolic-s0    the same with the bracketing search
    authors-s0      the same with a peer, another Fast Forward loop (peers.py); for every peer asked for
    lora-plus-s0    no Fast Forward but LoRA+, until the same test loss; where it is asked for
    auto-s0         no Fast Forward and no learning rate given, until the same test loss
    adam-tuned-s0   no Fast Forward but a tuned learning rate, until the same test loss: what a user would try
                    first; adam-untuned-s0 where nothing is known of the model and task, or not with these
                    batches: a usual rate

All runs share one process, after throwaway runs through every code path, so that first-use costs fall on
none.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from ffkernels.training.rules import ABOVE_0, Rule, at_least, check, one_of, whole
from ffkernels.training.session import Attach
from ffkernels.training.trainer import RunResult, train

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


def _different(values: Sequence[Any], rule: Rule) -> bool:
    return bool(values) and len(set(values)) == len(values) and all(map(rule.holds, values))


_RULES = {
    "seeds": Rule(
        lambda seeds: _different(tuple(seeds), whole(0)),
        "integers of at least 0, one or more, each at most once",
    ),
    "searches": Rule(
        lambda searches: _different(searches, one_of(SEARCHES)),
        f"of {', '.join(map(repr, SEARCHES))}, one or more, each at most once",
    ),
    "tuned_lr": ABOVE_0.or_none,
    "check_every": whole(1),
    "tolerance": at_least(0),
}


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
        for name, rule in _RULES.items():
            check(name, getattr(self, name), rule)
        self._check_peers()
        if self.base.test_examples == 0:
            raise ValueError("test_examples=0: must be at least 1: the runs are compared at a test loss")
        if self.tuned_lr is not None and self.sweep:
            raise ValueError(f"tuned_lr={self.tuned_lr!r} and sweep=True: give one of them")

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

    def ways(
        self, stages: FastForwardConfig, **options: Any
    ) -> Iterator[tuple[str, dict[str, Any], Attach | None]]:
        """Each way to train beside Adam's: its name, what it changes of the run, and a peer's ``attach``."""
        for search in self.searches:
            yield search, {"fast_forward": dataclasses.replace(stages, search=search)}, None
        for name in self.peers:
            if name == LORA_PLUS:
                yield name, {"optimizer": LORA_PLUS}, None
            else:
                yield name, {}, partial(load_peer(name), **options)
        # No stages, and no learning rate to choose.
        no_rate = FastForwardConfig(interval=None, learning_rate="auto", impl=stages.impl)
        yield "auto", {"fast_forward": no_rate}, None

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


OnEvent = Callable[[dict[str, Any]], bool | None]


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

    def run(config: TrainConfig, attach: Attach | None = None) -> RunResult:
        if on_run is not None:
            on_run(config)
        return uninterrupted(config, on_event, attach)

    if comparison.base.threads is not None:
        torch.set_num_threads(comparison.base.threads)
    with alone_in(comparison.base.out):
        return _compare(comparison, run)


def _compare(comparison: Comparison, run: Callable[..., RunResult]) -> tuple[list[RunResult], dict[str, Any]]:
    warm_up(comparison)
    results, stages = [], comparison.fast_forward
    tuned_lr, source = _tuned_lr(comparison)
    for seed in comparison.seeds:
        adam = run(comparison.adam(seed))
        results.append(adam)
        if not math.isfinite(adam.test_loss):
            raise ValueError(
                f"lr={comparison.base.lr!r}: {adam.name} diverged after {adam.optimizer_steps} steps, so "
                "there is no test loss to reach; take a smaller learning rate"
            )
        for name, changes, attach in comparison.ways(stages, interval=stages.interval):
            results.append(run(comparison.until(adam, seed, name, **changes), attach))
        if tuned_lr is None:
            tuned_lr, source = sweep(comparison, adam, seed, run), "sweep"
        name = "adam-untuned" if source in (UNTUNED, TUNED_ELSEWHERE) else "adam-tuned"
        results.append(run(comparison.until(adam, seed, name, lr=tuned_lr)))
    protocol = {name: list(getattr(comparison, name)) for name in ("seeds", "searches", "peers")}
    protocol |= {"tuned_lr": tuned_lr, "tuned_lr_source": source}
    protocol |= {name: getattr(comparison, name) for name in ("tolerance", "check_every")}
    return results, protocol


def warm_up(comparison: Comparison) -> None:
    """Throwaway runs of a step or two with a stage and a test loss, one for each way to run it.

    So first-use costs fall on no run that is measured, be it ours or a peer's.
    """
    stages = dataclasses.replace(comparison.fast_forward, interval=1, warmup=0, max_tau=4)
    # A stage of the peers needs the weights of two steps; the second step without a rate has an alignment.
    interval = min(2, comparison.fast_forward.interval)
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder, warnings.catch_warnings():
        # Their stages are cut short here on purpose.
        warnings.filterwarnings("ignore", message=".* repeated an update", category=FFKernelsNotice)
        plain = dataclasses.replace(
            comparison.adam(comparison.seeds[0]), name="warm-up", out=folder, epochs=None
        )
        for name, changes, attach in comparison.ways(stages, interval=interval, cap=2):
            steps = 2 if attach is not None or name == "auto" else 1
            uninterrupted(dataclasses.replace(plain, steps=steps, **changes), None, attach)


def sweep(
    comparison: Comparison, adam: RunResult, seed: int, run: Callable[[TrainConfig], RunResult]
) -> float:
    """The learning rate with which Adam gets to the target in the fewest steps; ties by the test loss there.

    It is chosen by the test loss it is then judged by: generous to Adam, on purpose.
    """
    best: tuple[tuple[bool, int, float], float] | None = None  # the least score, and the rate that had it
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
    base, ours = comparison.base, TrainConfig()
    if comparison.tuned_lr is not None:
        return comparison.tuned_lr, "option"
    # Nothing is known of whole models, whose best rates lie far apart.
    if comparison.sweep or base.method not in ADAPTERS:
        return None, "sweep"

    def same(names: tuple[str, ...]) -> bool:
        return all(getattr(base, name) == getattr(ours, name) for name in names)

    if (base.model, base.task) not in TUNED_LR or not same(MEASURED_WITH):
        return FALLBACK_TUNED_LR, UNTUNED
    return TUNED_LR[base.model, base.task], "table" if same(TUNED_AT) else TUNED_ELSEWHERE


def uninterrupted(config: TrainConfig, on_event: OnEvent | None, attach: Attach | None = None) -> RunResult:
    """``train`` that saves nothing, and of which Ctrl-C leaves nothing but ``Interrupted``."""
    try:
        result = train(config, on_event=on_event, save=False, attach=attach)
    except KeyboardInterrupt:  # before or after its loop, or the second Ctrl-C
        raise Interrupted(config.name) from None
    if result.ctrl_c:
        raise Interrupted(config.name)
    return result
