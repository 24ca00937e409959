"""One step forward with the checkpoint of what it leaves: best ← W ; W ← W + Δ, over a whole adapter set.

Four ways to do it, run in turn, round after round, so that a busy machine disturbs all alike:

    ours           ops.step_(table, accept=True, k=1), the C++ ops
    foreach        torch._foreach_copy_(best, W) ; torch._foreach_add_(W, Δ)
    loop           the same two, tensor by tensor
    state_dict     what published scripts do: clone every entry for the best weights, then a thread pool
                   walks the state dict, makes W + Δ anew and copies it back (our own rendition)

on the LoRA tensors of Pythia-1.4B (r = 8, query_key_value) and Llama-3-8B (r = 64, q, k, v, o), float32, one
thread. Shapes come from the models' configurations, so no weights are needed. Each way owns its tensors and
is timed in two states: warm, right after itself, as on a model so small that nothing evicts the adapters;
and cold, after the caches were filled with something else, as the validation forward of a large model does.

    pytest benchmarks/bench_step.py --benchmark-enable      measures, and asserts the ratios
    python benchmarks/bench_step.py --out benchmarks/results    measures, and writes step_cpu_<date>.json

Bytes moved by `ours`: read W and Δ, write W and best, 16 bytes per element; `foreach` reads W once more.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import checkout  # noqa: F401  puts it on the path
import pytest
import torch
from adapter_rounds import ADAPTERS, LLAMA, PYTHIA, Shapes, Ways, hold_to_target, main, random_tensors

from ffkernels import ops

# Time of ours over time of foreach, warm, one thread.
TARGETS = {PYTHIA: 0.65, LLAMA: 0.90}


def _deltas(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [weight * 2.0**-20 for weight in weights]


class Ours:
    def __init__(self, shapes: Shapes) -> None:
        self.weights = random_tensors(shapes)
        self.table = ops.TensorTable(self.weights, impl="cpp")
        torch._foreach_copy_(self.table.deltas, _deltas(self.weights))
        self.best = self.table.best

    def __call__(self) -> None:
        ops.step_(self.table, True, 1)


class Foreach:
    def __init__(self, shapes: Shapes) -> None:
        self.weights = random_tensors(shapes)
        self.deltas = _deltas(self.weights)
        self.best = [weight.clone() for weight in self.weights]

    def __call__(self) -> None:
        torch._foreach_copy_(self.best, self.weights)
        torch._foreach_add_(self.weights, self.deltas)


class Loop(Foreach):
    def __call__(self) -> None:
        for weight, delta, best in zip(self.weights, self.deltas, self.best, strict=True):
            best.copy_(weight)
            weight.add_(delta)


class StateDict:
    def __init__(self, shapes: Shapes) -> None:
        self.module = torch.nn.Module()
        for i, weight in enumerate(random_tensors(shapes)):
            self.module.register_parameter(f"lora_{i}", torch.nn.Parameter(weight))
        self.weights = list(self.module.parameters())
        names = self.module.state_dict().keys()
        self.deltas = dict(zip(names, _deltas([weight.detach() for weight in self.weights]), strict=True))
        self.best: list[torch.Tensor] = []

    def __call__(self) -> None:
        state = self.module.state_dict()
        self.best = [tensor.clone() for name, tensor in state.items() if "lora" in name]

        def add(name: str) -> None:
            state[name].copy_(state[name] + self.deltas[name])

        with ThreadPoolExecutor() as pool:
            list(pool.map(add, (name for name in state if "lora" in name)))


WAYS: Ways = {
    "ours": Ours,
    "foreach": Foreach,
    "loop": Loop,
    "state_dict": StateDict,
}


def check_agreement(ways: dict) -> None:
    """All ways leave the same bits; to be called right after each ran once."""
    expected = ways["foreach"]
    for name, way in ways.items():
        for found, right in ((way.weights, expected.weights), (way.best, expected.best)):
            if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
                raise RuntimeError(f"{name} and foreach do not agree, so there is nothing to compare")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_step(benchmark, adapter):
    hold_to_target(benchmark, adapter, WAYS, check_agreement, TARGETS[adapter])


if __name__ == "__main__":
    main(__doc__.splitlines()[0], "step_cpu", WAYS, check_agreement, TARGETS)
