"""How the moves are launched: once per dtype, on the current stream, without waiting, and into graphs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ffkernels import ops
from ffkernels.ops import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_table(device: torch.device, impl: str, dtypes=DTYPES, count: int = 12) -> ops.TensorTable:
    """Tensors of every dtype, some of them misaligned views, with a Δ that is not zero."""
    weights = []
    for i in range(count):
        memory = torch.randn(4000 + 511 * i, generator=torch.Generator().manual_seed(i))
        weights.append(memory.to(dtypes[i % len(dtypes)]).to(device)[i % 2 :])
    table = ops.TensorTable(weights, impl=impl)
    for i, delta in enumerate(table.deltas):
        delta.copy_(torch.randn(delta.shape, generator=torch.Generator().manual_seed(100 + i)))
    return table


def mirror_of(table: ops.TensorTable) -> list[list[torch.Tensor]]:
    sides = (table.weights, table.deltas, table.best)
    return [[tensor.to("cpu", copy=True) for tensor in side] for side in sides]


def assert_same(table: ops.TensorTable, mirror: list[list[torch.Tensor]]) -> None:
    for side, expected in zip((table.weights, table.deltas, table.best), mirror, strict=True):
        for tensor, other in zip(side, expected, strict=True):
            assert torch.equal(tensor.cpu(), other)


def scalars(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.ones(1, dtype=torch.int32, device=device),
        torch.ones(1, dtype=torch.float32, device=device),
    )


def launches(call, tmp_path) -> list[str]:
    """Everything that ran on the device: kernels, copies, fills."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    seen.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return [e["name"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:], DTYPES], ids=len)
def test_one_launch_per_op_and_dtype(kernels, dtypes, gpu, tmp_path):
    table = make_table(gpu, kernels, dtypes)
    accept, k = scalars(gpu)
    sums = torch.empty(3, dtype=torch.float64, device=gpu)
    for name, call in {
        "checkpoint_": lambda: ops.checkpoint_(table),
        "delta_": lambda: ops.delta_(table),
        "step_": lambda: ops.step_(table, accept, k),
        "step_ with host numbers": lambda: ops.step_(table, True, 1.0),
        "align_": lambda: ops.align_(table, table.deltas, sums),
    }.items():
        seen = launches(call, tmp_path)
        assert len(seen) == len(dtypes), (name, seen)
    elsewhere = itertools.cycle([[torch.ones_like(w) for w in table.weights] for _ in range(2)])
    seen = launches(lambda: ops.align_(table, next(elsewhere), sums), tmp_path)
    assert len(seen) == len(dtypes) + 1, f"and one copy of the new addresses: {seen}"


def test_nothing_waits_for_the_device(impl, gpu):
    table = make_table(gpu, impl)
    accept, k = scalars(gpu)
    ops.step_(table, accept, k)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.checkpoint_(table)
        ops.delta_(table)
        ops.step_(table, accept, k)
        ops.step_(table, accept.bool(), k.double())
        for _ in range(3):
            ops.align_(table, [torch.ones_like(w) for w in table.weights])
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def captured(call, device: torch.device) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def test_step_in_a_graph_reads_its_scalars_at_replay(impl, gpu):
    table = make_table(gpu, impl)
    accept, k = scalars(gpu)
    graph = captured(lambda: ops.step_(table, accept, k), gpu)
    mirror = mirror_of(table)
    for flag, factor in [(1, 1.0), (0, 1.0), (1, 4.0), (0, -0.5), (1, 0.0), (0, 0.0)]:
        accept.fill_(flag)
        k.fill_(factor)
        graph.replay()
        reference.step_(*mirror, bool(flag), factor)
        assert_same(table, mirror)


def test_step_in_a_graph_with_host_numbers(impl, gpu):
    table = make_table(gpu, impl)
    graph = captured(lambda: ops.step_(table, True, 0.5), gpu)
    mirror = mirror_of(table)
    for _ in range(2):
        graph.replay()
        reference.step_(*mirror, True, 0.5)
        assert_same(table, mirror)


def test_delta_and_checkpoint_in_a_graph(impl, gpu):
    table = make_table(gpu, impl)
    delta = captured(lambda: ops.delta_(table), gpu)
    checkpoint = captured(lambda: ops.checkpoint_(table), gpu)
    mirror = mirror_of(table)
    for weight, other in zip(table.weights, mirror[0], strict=True):
        weight.add_(1)
        other.copy_(weight)
    delta.replay()
    reference.delta_(*mirror)
    assert_same(table, mirror)
    for weight, other in zip(table.weights, mirror[0], strict=True):
        weight.mul_(3)
        other.copy_(weight)
    checkpoint.replay()
    reference.checkpoint_(mirror[0], mirror[2])
    assert_same(table, mirror)


def test_alignment_in_a_graph(impl, gpu):
    """The same gradients with other values, at replay. Others are refused: a graph keeps addresses."""
    table = make_table(gpu, impl)
    grads, sums = [torch.ones_like(w) for w in table.weights], torch.empty(3, dtype=torch.float64, device=gpu)
    graph = captured(lambda: ops.align_(table, grads, sums), gpu)
    for value in (2.0, 3.0):
        for weight, grad in zip(table.weights, grads, strict=True):
            weight.add_(1)
            grad.fill_(value)
        difference = torch._foreach_sub([w.float() for w in table.weights], [b.float() for b in table.best])
        graph.replay()
        expected = sum(d.double().sum() for d in difference)
        torch.testing.assert_close(sums[0], value * expected, rtol=1e-12, atol=0)
        assert sums[1].item() == value**2 * table.numel
        assert all(torch.equal(w, b) for w, b in zip(table.weights, table.best, strict=True))
    if impl != "torch":
        with pytest.raises(RuntimeError, match=r"CUDA graph is being captured.*set_to_none=False"):
            others = [grad.clone() for grad in grads]
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                sums.mul_(1)  # a capture must hold something
                ops.align_(table, others, sums)


def test_a_first_layout_during_capture_is_refused(kernels, gpu):
    weights, deltas, best = ([torch.randn(64, device=gpu)] for _ in range(3))
    accept, k = scalars(gpu)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="before the capture"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            k.mul_(1)  # a capture must hold something
            ops.step_(weights, deltas, best, accept, k, impl=kernels)


FIRST_IN_A_CAPTURE = """
import sys, torch
from ffkernels import ops
kinds = (4099, torch.float32), (3, torch.bfloat16), (2048, torch.float16)
table = ops.TensorTable([torch.ones(n, dtype=kind, device="cuda") for n, kind in kinds], impl=sys.argv[1])
for delta in table.deltas:
    delta.fill_(1)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ops.step_(table, True, 2.0)
graph.replay()
print(all(bool((w == 3).all() & (b == 1).all()) for w, b in zip(table.weights, table.best)))
"""


def test_the_first_step_of_a_process_may_be_captured(kernels, gpu):
    """Whatever has to be compiled or loaded was so when the table was made."""
    root = Path(ops.__file__).parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IN_A_CAPTURE, kernels],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.strip() == "True", done.stderr[-3000:]


def test_lists_keep_what_a_graph_points_to(kernels, gpu):
    """Many other lists come and go between the capture and the replay."""
    sides = [[torch.full((5000,), float(i), device=gpu)] for i in range(3)]
    accept, k = scalars(gpu)
    graph = captured(lambda: ops.step_(*sides, accept, k, impl=kernels), gpu)
    for side, value in zip(sides, (0.0, 1.0, 2.0), strict=True):
        side[0].fill_(value)
    for size in range(1, 40):
        other = [[torch.zeros(size, device=gpu)] for _ in range(3)]
        ops.step_(*other, accept, k, impl=kernels)
        torch.full((size, 4), -1, dtype=torch.int64, device=gpu)  # into whatever memory has become free
    graph.replay()
    assert [float(side[0].unique()) for side in sides] == [1.0, 1.0, 0.0]


def test_the_current_stream_is_used(kernels, gpu):
    """Behind a long wait on its stream the move must wait too, and be ordered after what came before it."""
    table = make_table(gpu, kernels, DTYPES[:1])
    mirror = mirror_of(table)
    stream = torch.cuda.Stream(gpu)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for weight in table.weights:
            weight.mul_(2)
        ops.step_(table, True, 1.0)
    stream.synchronize()
    for weight in mirror[0]:
        weight.mul_(2)
    reference.step_(*mirror, True, 1.0)
    assert_same(table, mirror)


def test_a_device_that_is_not_current(kernels, gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    table = make_table(other, kernels)
    mirror = mirror_of(table)
    ops.step_(table, True, 0.5)
    reference.step_(*mirror, True, 0.5)
    assert_same(table, mirror)
    assert torch.cuda.current_device() == gpu.index


def test_auto_takes_the_cuda_kernels(gpu):
    assert ops.resolve("auto", gpu)[0] == "cuda"
    assert ops.TensorTable([torch.zeros(3, device=gpu)]).impl == "cuda"
    with pytest.raises(ValueError, match="impl='cpp' runs on the CPU"):
        ops.TensorTable([torch.zeros(3, device=gpu)], impl="cpp")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_function(kernels, backend, gpu):
    sides = [[torch.randn(300, device=gpu), torch.randn(7, device=gpu)] for _ in range(3)]
    want = [[tensor.cpu() for tensor in side] for side in sides]
    accept, k = scalars(gpu)

    def move(weights, deltas, best, accept, k):
        ops.delta_(weights, deltas, best, impl=kernels)
        ops.step_(weights, deltas, best, accept, k, impl=kernels)

    torch.compile(move, fullgraph=True, backend=backend)(*sides, accept, k)
    reference.delta_(*want)
    reference.step_(*want, True, 1.0)
    for side, expected in zip(sides, want, strict=True):
        for tensor, other in zip(side, expected, strict=True):
            assert torch.equal(tensor.cpu(), other)
