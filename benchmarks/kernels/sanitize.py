"""Every kernel once, on small tensors of every dtype and alignment: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m benchmarks.kernels.sanitize

Each result is compared, moves with the torch ops' and decisions with the search's on the host, so that a run
without findings has also done something. Without a GPU the moves are torch's, and the decisions are those of
Triton's interpreter, where Triton is installed.
"""

from __future__ import annotations

import math
import os
import random
import sys
from importlib.util import find_spec
from itertools import cycle, product

# Each tensor in an allocation of its own: an access past its end is then an error, not a neighbour's memory.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from ffkernels import ops
from ffkernels.search.search import make_search
from ffkernels.search.significance import critical_values, jackknife_weights, really_higher

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 2048, 2049, 5003)
# Losses by example: none, one, and more than the lanes of a warp that copies them.
ROWS = (0, 1, 33)
MAX_TAU = 100


def moves_are_right(impl: str, device: torch.device) -> bool:
    """step with its scalars on the device and on the host, delta, checkpoint and align, against torch's."""
    accept = torch.ones(1, dtype=torch.int32, device=device)
    k = torch.full((1,), 0.5, device=device)
    kinds = product(DTYPES, SIZES, (0, 1))
    weights = [torch.randn(size + skip, device=device).to(dtype)[skip:] for dtype, size, skip in kinds]
    mirror = [weight.clone() for weight in weights]
    tables = [ops.TensorTable(weights, impl=impl), ops.TensorTable(mirror, impl="torch")]
    for ours, theirs in zip(*(table.deltas for table in tables), strict=True):
        ours.copy_(torch.randn_like(ours))
        theirs.copy_(ours)
    for table in tables:
        ops.step_(table, accept, k)
        ops.step_(table, False, 2.0)
        ops.delta_(table)
        ops.step_(table, False, 0.0)
        ops.checkpoint_(table)
        ops.step_(table, True, 1.0)
    pairs = zip(weights, cycle(DTYPES))
    grads = [torch.randn(weight.shape, device=device).to(dtype) for weight, dtype in pairs]
    sums = [ops.align_(table, [*grads[:-1], None]) for table in tables]
    return torch.allclose(*sums, rtol=1e-9) and all(
        torch.equal(ours, theirs)
        for kind in ("weights", "deltas", "best")
        for ours, theirs in zip(*(getattr(table, kind) for table in tables), strict=True)
    )


def decisions_are_right(search: str, rows: int, device: torch.device) -> bool:
    """begin and decide on falling, rising and noisy losses, against the search on the host."""
    from ffkernels.ops import decide

    state = decide.DecideState(search, MAX_TAU, device, rows=rows)
    tokens = [float(5 + row % 7) for row in range(rows)]
    if rows:
        state.know(critical_values(rows, state.capacity), tokens, jackknife_weights(tokens))
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    # Aligned to its own 8 bytes and to no more.
    sums = torch.zeros(rows + 1, dtype=torch.float64, device=device)[1:] if rows else None
    verdicts = []
    for seed, noise in enumerate((0.0, 1e-2, 1.0)):
        draw, host = random.Random(seed), make_search(search, MAX_TAU)
        decide.begin(state, torch.full((1,), 1e-3, device=device))
        lowest, by_example = math.inf, []
        while (tau := host.propose()) is not None:
            values = [n * (2.0 + 1e-3 * (tau - 19) ** 2 + noise * draw.gauss(0, 1)) for n in tokens or [1.0]]
            value, seen = math.fsum(values) / (sum(tokens) or 1.0), len(host.losses)
            sure = bool(seen) and value >= lowest
            if sure and rows:
                sure = really_higher(by_example, values, tokens, seen=seen)
            host.observe(tau, value, sure)
            verdicts.append(sure)
            if value < lowest:
                lowest, by_example = value, values
            loss.fill_(value)
            if sums is not None:
                sums.copy_(torch.tensor(values, dtype=torch.float64))
            decide.decide(state, loss, sums)
        decide.decide(state, loss, sums)  # after the end nothing changes
        found = state.read()
        ends = [(end.losses, end.best_tau, end.stopped_because) for end in (found, host)]
        if ends[0] != ends[1] or found.sure != verdicts[-len(found.sure) :]:
            return False
    decide.begin(state, torch.zeros(1, device=device))
    return state.go.item() == 0 and False in verdicts and (rows == 1 or True in verdicts)


def main() -> int:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    every = ("cuda", "triton") if on_gpu else ("torch",)
    right = {f"moves, {impl}": moves_are_right(impl, device) for impl in every}
    if on_gpu or find_spec("triton") is not None:
        if not on_gpu:
            os.environ["TRITON_INTERPRET"] = "1"
        for search, rows in (*(("parabolic", rows) for rows in ROWS), ("linear", 0)):
            right[f"{search} decisions, {rows} losses by example"] = decisions_are_right(search, rows, device)
    for what, as_expected in right.items():
        print(f"{what} on {device}: {'right' if as_expected else 'WRONG'}")
    wrong = [what for what, as_expected in right.items() if not as_expected]
    print(f"{len(right)} checks, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
