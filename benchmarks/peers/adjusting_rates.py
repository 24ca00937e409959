"""Published rules that set the learning rate in every step, in our own words: contenders of the benchmark.

    gen             a parabola through three losses along the update (arXiv 2407.02772, the package gen-optim)
    gala            online learning of the rate from gradients before and after a step (arXiv 2506.08419)
    hypergradient   gradient descent on the rate itself (arXiv 1703.04782)
    schedule-free+  a Polyak step under schedule-free averaging (arXiv 2605.19095)

The rules are theirs, their constants too where they name one; where we had to read something into them it
is said. The first three drive ``Work.adamw`` (no weight decay) from the run's rate, and from ``START`` where
it has none; the last is an optimizer of its own. Whatever forwards, backwards and optimizer steps they take
besides the run's own are charged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.learning_rate.contenders import Contender, Work

START = 1e-4
# The share of the present rate in GeN's next one.
GEN_SMOOTH = 0.9
HYPERGRADIENT_BETAS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)

Weights = list[torch.Tensor]


def start(work: Work) -> float:
    return START if work.lr is None else work.lr


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def copies(tensors: Weights) -> Weights:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def put(weights: Weights, values: Weights) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def gradients(weights: Weights) -> Weights:
    """Copies; zeros where there is none."""
    return [torch.zeros_like(w) if w.grad is None else w.grad.detach().clone() for w in weights]


def dot(left: Weights, right: Weights) -> float:
    """The inner product over all tensors, in float64."""
    pairs = zip(left, right, strict=True)
    return sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in pairs)


def distance(left: Weights, right: Weights) -> float:
    apart = [a.double() - b.double() for a, b in zip(left, right, strict=True)]
    return math.sqrt(dot(apart, apart))


def direction(optimizer: torch.optim.Optimizer) -> Weights:
    """What Adam's last step took from the weights, per unit of learning rate: m̂ / (√v̂ + ε).

    From its moments: a difference of weights would have lost digits at small rates.
    """
    taken = []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for weight in group["params"]:
            state = optimizer.state.get(weight)
            if not state:
                taken.append(torch.zeros_like(weight))
                continue
            steps = float(state["step"])
            spread = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
            taken.append(state["exp_avg"] / (1 - beta1**steps) / spread)
    return taken


def next_gen_rate(rate: float, scale: float, behind: float, ahead: float, here: float) -> float:
    """GeN's next learning rate.

    Args:
        rate: the present one, at which was probed.
        scale: of the new part, from 1 at the beginning of training to 0 at its end; 1 where nothing decays.
        behind, ahead, here: losses one update backwards, one forwards, and without it.
    """
    if not all(map(math.isfinite, (behind, ahead, here))):
        return rate / 2
    slope, curvature = (behind - ahead) / 2, behind + ahead - 2 * here  # in updates
    if slope <= 0 or curvature <= 0:
        return rate
    best = rate * min(max(slope / curvature, 0.5), 2.0)
    return GEN_SMOOTH * rate + (1 - GEN_SMOOTH) * scale * best


def gen(work: Work, *, every: int = 4) -> Contender:
    """GeN: every fourth step, as its README advises, a tenth of the way to the minimum of a parabola.

    As in gen-optim 0.1.1: probed is the training batch that comes next, at the weights one Adam step ahead,
    as far behind, and here. The minimum counts as at least half and at most twice the rate, so that a probe
    changes it by 0.95 to 1.1; where the parabola opens downwards or leads backwards it stays, and a loss
    that is not finite halves it. Adam has then seen the gradient of such a step twice: the probe is a step
    whose weights are put back and whose moments are not. A decaying schedule is its ``scale``; it has no
    warm-up.

    Not the package itself: it needs SciPy and scikit-learn, to fit two numbers to two losses.

    Charged: three forwards and an Adam step per probe.
    """
    work.warmup = 0
    optimizer, bench = work.adamw(start(work)), work.bench

    @torch.no_grad()
    def before_step(step: int, loss: float) -> None:
        if (step + 1) % every:
            return
        rate, here = rate_of(optimizer), copies(bench.trainable)
        optimizer.step()
        ahead = copies(bench.trainable)
        behind = [2 * old - new for old, new in zip(here, ahead, strict=True)]
        batch, losses = bench.batch(step + 1), []
        for weights in (behind, ahead, here):
            put(bench.trainable, weights)
            losses.append(float(bench.model(**batch).loss))
        set_rate(optimizer, next_gen_rate(rate, work.shape(step), *losses))
        adam = bench.flops(step) - bench.gradient_flops(step)
        work.charge(flops=3 * bench.forward_flops(step + 1) + adam)

    return Contender(optimizer, before_step=before_step, rate=lambda: rate_of(optimizer))


def gala(work: Work, *, delta: float = 1e-8) -> Contender:
    """GALA: follow the regularised leader over what each step's rate should have been.

    As in the paper, as far as its abstract and its reviews say: the loss that is learned from is
    −η⟨g', u⟩ + η² L ‖u‖² / 2, where g' is the gradient after the step and L = ‖g' − g‖ / ‖x' − x‖ a local
    curvature; both gradients are of the same batch, which takes a second one per step; η has no upper bound;
    ``delta`` (η − η₀)² / 2 regularises. The leader has a closed form::

        η = (δ η₀ + Σ ⟨g', u⟩) / (δ + Σ L ‖u‖²), and not below 0

    Our reading: u is Adam's direction per unit of learning rate; δ is so small that η₀ is the first step's
    rate and hardly more; the run's schedule multiplies η in the step and is no part of the sums; a step of
    length 0 has L = 0. The batch is that of the step to come, whose gradient is there anyway: the second one
    is taken at the weights before the last step.

    Charged: a forward and a backward in every step but the first.
    """
    optimizer, bench = work.adamw(start(work)), work.bench
    rate, aligned, curved = start(work), delta * start(work), delta
    last: Weights = []

    def before_step(step: int, loss: float) -> None:
        nonlocal rate, aligned, curved, last
        here, now = gradients(bench.trainable), copies(bench.trainable)
        if last:
            put(bench.trainable, last)
            optimizer.zero_grad(set_to_none=True)
            bench.model(**bench.batch(step)).loss.backward()
            there = gradients(bench.trainable)
            put(bench.trainable, now)
            for weight, gradient in zip(bench.trainable, here, strict=True):
                weight.grad = gradient
            work.charge(flops=bench.gradient_flops(step))
            update, moved = direction(optimizer), distance(now, last)
            curvature = distance(here, there) / moved if moved else 0.0
            aligned += dot(here, update)
            curved += curvature * dot(update, update)
            rate = max(0.0, aligned / curved)
        last = now
        set_rate(optimizer, rate * work.shape(step))

    return Contender(optimizer, before_step=before_step, rate=lambda: rate)


def hypergradient(work: Work, *, beta: float) -> Contender:
    """Adam-HD: before each step the rate goes down the derivative of the new loss by the last step's rate.

    The additive rule: η ← η + β ⟨g', u⟩ with the gradient g' after a step, and Adam's direction u in it. The
    run's schedule multiplies the rate, hence that derivative too. Nothing keeps η from falling below 0, as in
    the paper. It costs an inner product, which is not charged.
    """
    optimizer, bench = work.adamw(start(work)), work.bench
    rate = start(work)

    def before_step(step: int, loss: float) -> None:
        nonlocal rate
        if step:
            aligned = dot(gradients(bench.trainable), direction(optimizer))
            rate += beta * work.shape(step - 1) * aligned
        set_rate(optimizer, rate * work.shape(step))

    return Contender(optimizer, before_step=before_step, rate=lambda: rate)


class PolyakScheduleFree(torch.optim.Optimizer):
    """ScheduleFree+: Adam steps z of Polyak length, averaged into x; gradients are taken between them, at y.

    ``loss`` is to be set before each ``step()``: that of the gradients. The step's length is::

        max(0, f(y) + β ⟨g, z − x⟩) / (‖g‖₁ √(π/2))

    which takes the lowest loss to be 0. The constants are those of the authors' reference
    (``AdamCScheduleFreePlusPaper``): betas 0.9 and 0.95, β = 0.9, steps weighted in x by the square of the
    longest so far. Its options that are off by default are left out: a mean over past ‖g‖₁, another β at the
    end, weights that grow with the steps, weight decay.

    Args:
        params: weights; after each step they are y.
        warmup: steps in which the length grows linearly to the full one, and in which x is z, for which the
            authors advise one to two warm-ups.
    """

    def __init__(self, params: Any, warmup: int = 0) -> None:
        super().__init__(params, {"betas": (0.9, 0.95), "between": 0.9, "eps": 1e-8, "lr": 0.0})
        self.warmup, self.loss = warmup, math.nan
        self._taken, self._longest, self._weights = 0, 1e-8, 0.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        weights = [w for w in group["params"] if w.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                moments = {name: torch.zeros_like(weight) for name in ("mean", "square")}
                self.state[weight] = {"x": weight.clone(), "z": weight.clone(), **moments}
        length = self._length(weights)
        (beta1, beta2), share = group["betas"], self._share(length)
        self._taken += 1
        for weight in weights:
            state = self.state[weight]
            state["mean"].lerp_(weight.grad, 1 - beta1)
            state["square"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
            spread = (state["square"] / (1 - beta2**self._taken)).sqrt_().add_(group["eps"])
            mean = state["mean"] / (1 - beta1**self._taken)
            state["z"].addcdiv_(mean, spread, value=-length)
            state["x"].mul_(1 - share).add_(state["z"], alpha=share)
            weight.copy_(state["x"] * group["between"]).add_(state["z"], alpha=1 - group["between"])
        group["lr"] = length

    def _length(self, weights: Weights) -> float:
        group = self.param_groups[0]
        taken = [w.grad for w in weights if w.grad is not None]
        ahead = [self.state[w]["z"] - self.state[w]["x"] for w in weights]
        norm = sum(float(g.double().abs().sum()) for g in taken) * math.sqrt(math.pi / 2)
        above = max(0.0, self.loss + group["between"] * dot(taken, ahead))
        rising = min(1.0, (self._taken + 1) / self.warmup) if self.warmup else 1.0
        return rising * above / norm if norm else 0.0

    def _share(self, length: float) -> float:
        """Of the new z in x."""
        self._longest = max(self._longest, length)
        if self._taken < self.warmup:
            return 1.0
        self._weights += self._longest**2
        return self._longest**2 / self._weights

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside it the weights are x, at which a schedule-free optimizer is tested."""
        training = [(weight, weight.detach().clone()) for weight in self.state]
        for weight, _ in training:
            weight.data.copy_(self.state[weight]["x"])
        try:
            yield
        finally:
            for weight, value in training:
                weight.data.copy_(value)


def schedule_free_plus(work: Work) -> Contender:
    """ScheduleFree+ with the run's warm-up and no schedule; tested at its averaged weights.

    Its step takes no learning rate; at the end ``rate`` is the last step's length.
    """
    optimizer = PolyakScheduleFree(work.bench.trainable, work.warmup)

    def before_step(step: int, loss: float) -> None:
        optimizer.loss = loss

    return Contender(
        optimizer, before_step=before_step, evaluating=optimizer.averaged, rate=lambda: rate_of(optimizer)
    )
