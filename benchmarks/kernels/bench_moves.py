"""The weight moves under pytest-benchmark: each way to do them, warm, one after the other.

    pytest benchmarks --benchmark-enable --benchmark-group-by=group

`step` and `align` measure the same ways interleaved and cold too, and hold ours to a target: those are the
numbers to quote. This is for comparing commits of one's own (`--benchmark-autosave`, `--benchmark-compare`).
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import align, step
from benchmarks.kernels.rounds import ADAPTERS
from ffkernels import ops

WAYS = {
    f"{kind} {way}": make
    for kind, module in (("step", step), ("align", align))
    for way, make in module.WAYS.items()
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("way", WAYS)
def test_move(benchmark, way, adapter):
    if way.endswith("ours") and not ops.available()["cpp"].ok:
        pytest.skip(ops.available()["cpp"].reason)
    benchmark.group = f"{way.split()[0]}, {adapter}"
    benchmark.pedantic(WAYS[way](ADAPTERS[adapter]), rounds=15, warmup_rounds=2)
