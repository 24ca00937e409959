"""The searches on the device make the choices of those on the host, eagerly and inside a captured stage."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ffkernels import ops
from ffkernels.search.search import make_search
from ffkernels.search.significance import Rises, critical_values, jackknife_weights

pytestmark = pytest.mark.gpu

SEARCHES = ("parabolic", "linear")


@pytest.fixture()
def decide(gpu):
    """The module; it needs Triton, which is not looked for where there is no GPU."""
    from ffkernels.ops import decide

    return decide


def curve(kind: str, seed: int):
    """A loss over τ: smooth, noisy, wild, or with values that are not finite."""
    draw = random.Random(f"{kind}{seed}")
    best, scale, noise = draw.uniform(-5, 60), draw.uniform(1e-4, 1e-1), draw.uniform(0, 0.5)

    def smooth(tau: int) -> float:
        return 2.0 + scale * (tau - best) ** 2

    def noisy(tau: int) -> float:
        return smooth(tau) + noise * random.Random(seed * 1000 + tau).gauss(0, 1)

    def wild(tau: int) -> float:
        return random.Random(seed * 1000 + tau).choice([1.0, 2.0, 0.5, 0.25, 3.0])

    def broken(tau: int) -> float:
        other = random.Random(seed * 1000 + tau)
        return other.choice([smooth(tau), smooth(tau), math.nan, math.inf, -math.inf])

    return {"smooth": smooth, "noisy": noisy, "wild": wild, "broken": broken}[kind]


@pytest.mark.parametrize("kind", ["smooth", "noisy", "wild", "broken"])
@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_choices(decide, name, kind, gpu):
    state = decide.DecideState(name, 100, gpu)
    loss = torch.zeros(1, dtype=torch.float64, device=gpu)
    for seed in range(40):
        start = random.Random(seed).choice([1, 5, 64, 1000])
        search, measure = make_search(name, 100, start), curve(kind, seed)
        state.start_at(start)
        state.reset()
        while (tau := search.propose()) is not None:
            value = measure(tau)
            search.observe(tau, value)
            loss.fill_(value)
            decide.decide(state, loss)
            following = search.propose()
            assert bool(state.accept.item()) == search.accepted, (seed, tau)
            assert bool(state.go.item()) == (following is not None), (seed, tau)
            assert state.k.item() == (0 if following is None else following - search.best_tau), (seed, tau)
        result = state.read()
        assert result.best_tau == search.best_tau and result.stopped_because == search.stopped_because
        assert [tau for tau, _ in result.losses] == [tau for tau, _ in search.losses]


@pytest.mark.parametrize("rows", [4, 32, 67])
def test_the_same_verdicts_on_rises(decide, rows, gpu):
    """Losses by example, some rows empty: which rises are real, and where the search ends because of it."""
    state, verdicts = decide.DecideState("parabolic", 256, gpu, rows=rows), []
    loss = torch.zeros(1, dtype=torch.float64, device=gpu)
    sums = torch.zeros(rows, dtype=torch.float64, device=gpu)
    draw = random.Random(rows)
    for seed in range(40):
        tokens = [draw.choice([0, 3, 20, 150]) if row > 3 else 11 for row in range(rows)]
        examples = sum(n > 0 for n in tokens)
        state.know(critical_values(examples, state.capacity), tokens, jackknife_weights(tokens))
        state.reset()
        search, rises, measure = make_search("parabolic", 256), Rises(tokens), curve("smooth", seed)
        noise, told = draw.choice([0.0, 1e-4, 1e-2]), []
        while (tau := search.propose()) is not None:
            values = [n * (measure(tau) + noise * draw.gauss(0, 1)) for n in tokens]
            value = sum(values) / sum(tokens)
            told.append(rises.sure(value, values))
            search.observe(tau, value, told[-1])
            loss.fill_(value)
            sums.copy_(torch.tensor(values, dtype=torch.float64))
            decide.decide(state, loss, sums)
        result = state.read()
        assert result.losses == search.losses and result.sure == told, seed
        assert (result.best_tau, result.stopped_because) == (search.best_tau, search.stopped_because), seed
        verdicts += told
    assert True in verdicts and False in verdicts


@pytest.mark.parametrize("name", SEARCHES)
def test_a_captured_stage_ends_at_the_best_weights(decide, kernels, name, gpu):
    """validate → decide → step as one graph, replayed until the search ends, against the loop on the host."""

    def make() -> tuple[ops.TensorTable, list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, generator=generator).to(gpu) for n in (3, 2048, 5000)]
        table = ops.TensorTable(weights, impl=kernels)
        targets = [w + 17.3 * 0.01 for w in weights]
        for delta in table.deltas:
            delta.fill_(0.01)
        return table, targets

    def validate(table, targets) -> torch.Tensor:
        pairs = zip(table.weights, targets, strict=True)
        return torch.stack([(w.double() - t.double()).square().sum() for w, t in pairs]).sum()

    table, targets = make()
    search, base = make_search(name, 256), 0
    while (tau := search.propose()) is not None:
        search.observe(tau, float(validate(table, targets)))
        base = tau if search.accepted else base
        following = search.propose()
        ops.step_(table, search.accepted, 0.0 if following is None else float(following - base))

    other, targets = make()
    state = decide.DecideState(name, 256, gpu)
    loss = torch.zeros(1, dtype=torch.float64, device=gpu)

    def body() -> None:
        loss.copy_(validate(other, targets).reshape(1))
        decide.decide(state, loss)
        ops.step_(other, state.accept, state.k)

    begin = [w.clone() for w in other.weights]
    side = torch.cuda.Stream(gpu)
    side.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream(gpu).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    for weight, start in zip(other.weights, begin, strict=True):
        weight.copy_(start)
    ops.checkpoint_(other)
    state.reset()
    replays = 0
    while bool(state.go.item()):
        graph.replay()
        replays += 1
        assert replays <= 256 + 2
    assert replays == len(search.losses)
    assert state.read().best_tau == search.best_tau == 17
    for weight, expected in zip(other.weights, table.weights, strict=True):
        assert torch.equal(weight, expected)
