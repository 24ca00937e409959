"""One step forward with the checkpoint of what it leaves: best ← W ; W ← W + Δ, over a whole adapter set.

Ways to do it:

    ours           ops.step_(table, accept=True, k=1), the C++ ops
    foreach        torch._foreach_copy_(best, W) ; torch._foreach_add_(W, Δ)
    loop           the same two, tensor by tensor
    state_dict     what published scripts do: clone every entry for the best weights, then a thread pool
                   walks the state dict, makes W + Δ anew and copies it back (our own rendition)
    compiled       the pair over one flat tensor, by torch.compile; on a GPU alone, see step_gpu.py

on the LoRA tensors of Pythia-1.4B (r = 8, query_key_value) and Llama-3-8B (r = 64, q, k, v, o), float32, one
thread, warm and cold: see rounds.py. Shapes come from the models' configurations, so no weights are needed.

    python -m benchmarks.kernels.step --out benchmarks/results     measures, and writes step_cpu_<date>.json

Ends with 1 where ours takes more of foreach's time than its target.
Bytes moved by `ours`: read W and Δ, write W and best, 16 bytes per element; `foreach` reads W once more.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.kernels.rounds import Ways, main, shares_of_time
from benchmarks.kernels.sets import CPU, LLAMA, PYTHIA, Shapes, random_tensors
from ffkernels import ops

# Time of ours over time of foreach, warm, one thread.
TARGETS = {PYTHIA: 0.65, LLAMA: 0.90}


class Foreach:
    """Weights, what is added to them, and the best ones; a call moves them."""

    def __init__(self, shapes: Shapes, device: torch.device = CPU) -> None:
        self.weights = random_tensors(shapes, 0, device)
        # So small that thousands of steps stay finite.
        self.deltas = [delta.mul_(1e-3) for delta in random_tensors(shapes, 1, device)]
        self.best = [torch.empty_like(weight) for weight in self.weights]

    def __call__(self) -> None:
        torch._foreach_copy_(self.best, self.weights)
        torch._foreach_add_(self.weights, self.deltas)


class Ours(Foreach):
    def __init__(self, shapes: Shapes, device: torch.device = CPU, impl: str = "cpp") -> None:
        super().__init__(shapes, device)
        self.table = ops.TensorTable(self.weights, impl=impl)
        torch._foreach_copy_(self.table.deltas, self.deltas)
        self.deltas, self.best = self.table.deltas, self.table.best
        self.accept, self.k = True, 1
        if device.type == "cuda":  # where a search decides: on the device
            self.accept = torch.ones(1, dtype=torch.int32, device=device)
            self.k = torch.ones(1, dtype=torch.float32, device=device)

    def __call__(self) -> None:
        ops.step_(self.table, self.accept, self.k)


class Loop(Foreach):
    def __call__(self) -> None:
        for weight, delta, best in zip(self.weights, self.deltas, self.best, strict=True):
            best.copy_(weight)
            weight.add_(delta)


class StateDict(Foreach):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.module = torch.nn.Module()
        for i, weight in enumerate(self.weights):
            self.module.register_parameter(f"lora_{i}", torch.nn.Parameter(weight))
        self.changes = dict(zip(self.module.state_dict(), self.deltas, strict=True))

    def __call__(self) -> None:
        state = self.module.state_dict()
        self.best = [tensor.clone() for name, tensor in state.items() if "lora" in name]

        def add(name: str) -> None:
            state[name].copy_(state[name] + self.changes[name])

        with ThreadPoolExecutor() as pool:
            list(pool.map(add, (name for name in state if "lora" in name)))


class Compiled(Foreach):
    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__(((sum(map(torch.Size.numel, map(torch.Size, shapes))),),), device)

        def pair(weight, delta, best) -> None:
            best.copy_(weight)
            weight.add_(delta)

        torch._dynamo.reset()
        self.pair = torch.compile(pair, fullgraph=True, dynamic=False)
        self()

    def __call__(self) -> None:
        self.pair(self.weights[0], self.deltas[0], self.best[0])


WAYS: Ways = {"ours": Ours, "foreach": Foreach, "loop": Loop, "state_dict": StateDict}


def check_agreement(ways: dict) -> None:
    """All ways leave the same bits; to be called right after each ran once."""
    expected = ways["foreach"]
    for name, way in ways.items():
        for found, right in ((way.weights, expected.weights), (way.best, expected.best)):
            if not all(torch.equal(a, b) for a, b in zip(found, right, strict=True)):
                raise RuntimeError(f"{name} and foreach do not agree, so there is nothing to compare")


def table(results: dict[str, Any]) -> str:
    """For the documentation."""
    head = ["adapter set", "warm: `_foreach_copy_` + `_foreach_add_`", "per-tensor loop"]
    head += ["state-dict with a thread pool", "cold: `_foreach` pair", "loop", "state-dict"]
    return shares_of_time(results, "step_cpu", head, ["foreach", "loop", "state_dict"])


if __name__ == "__main__":
    sys.exit(main("kernels.step", __doc__, WAYS, check_agreement, TARGETS))
