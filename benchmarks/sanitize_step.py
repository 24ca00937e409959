"""Every move once, on a few small tensors of every dtype and alignment: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python benchmarks/sanitize_step.py

Each result is compared with the torch ops', so that a run without findings has also done something.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Each tensor in an allocation of its own: an access past its end is then an error, not a neighbour's memory.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ffkernels import ops


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    impls = ("cuda", "triton") if device.type == "cuda" else ("torch",)
    accept = torch.ones(1, dtype=torch.int32, device=device)
    k = torch.full((1,), 0.5, device=device)
    for impl in impls:
        weights = [
            torch.randn(size + skip, device=device).to(dtype)[skip:]
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for size in (1, 7, 2048, 2049, 5003)
            for skip in (0, 1)
        ]
        mirror = [weight.clone() for weight in weights]
        tables = [ops.TensorTable(weights, impl=impl), ops.TensorTable(mirror, impl="torch")]
        for deltas in zip(*(table.deltas for table in tables), strict=True):
            deltas[0].copy_(torch.randn_like(deltas[0]))
            deltas[1].copy_(deltas[0])
        for table in tables:
            ops.step_(table, accept, k)
            ops.step_(table, False, 2.0)
            ops.delta_(table)
            ops.step_(table, False, 0.0)
            ops.checkpoint_(table)
        same = all(
            torch.equal(a, b)
            for mine, others in (
                (tables[0].weights, tables[1].weights),
                (tables[0].deltas, tables[1].deltas),
                (tables[0].best, tables[1].best),
            )
            for a, b in zip(mine, others, strict=True)
        )
        print(f"{impl} on {device}: {'equal to torch' if same else 'WRONG'}")
        if not same:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
