"""What a table accepts, how it lays its tensors out, and when it is stale."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ffkernels import ops
from ffkernels.ops.plan import ALIGNMENT, CPU_CHUNK, chunk_rows


def test_weights_come_in_three_forms():
    a, b = torch.ones(2), torch.ones(3)
    for weights, names in [
        ([a, b], ["weights[0]", "weights[1]"]),
        ({"a": a, "b": b}, ["a", "b"]),
        (iter([("a", a), ("b", b)]), ["a", "b"]),
    ]:
        table = ops.TensorTable(weights)
        assert table.names == names
        assert table.weights[0] is a and table.weights[1] is b
    assert ops.TensorTable([a, b], names=("x", "y")).names == ["x", "y"]
    with pytest.raises(ValueError, match="names has 1 entries for 2 weights"):
        ops.TensorTable([a, b], names=["a"])
    assert ops.TensorTable(torch.nn.Linear(2, 3).named_parameters()).names == ["weight", "bias"]


def test_a_new_table_holds_the_weights_as_best_and_no_delta():
    weights = [torch.randn(4, 5), torch.randn(7).bfloat16(), torch.randn(()), torch.randn(0, 3)]
    table = ops.TensorTable(weights)
    for weight, delta, best in zip(weights, table.deltas, table.best, strict=True):
        assert best.shape == delta.shape == weight.shape and best.dtype == delta.dtype == weight.dtype
        assert torch.equal(best, weight) and not delta.any()
    assert table.numel == 28
    assert table.nbytes >= 2 * (21 * 4 + 7 * 2)


def test_arena_segments_are_aligned(dtype):
    table = ops.TensorTable([torch.ones(n, dtype=dtype) for n in (1, 33, 64, 1001)])
    for view in (*table.deltas, *table.best):
        assert view.data_ptr() % ALIGNMENT == 0


@settings(max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8), st.integers(1, 300))
def test_rows_cover_every_element_once(numels, chunk):
    starts = [10**6 * (i + 1) for i in range(len(numels))]
    deltas = [start + 10**9 for start in starts]
    rows = chunk_rows(starts, deltas, [0] * len(numels), numels, 4, chunk).tolist()
    covered = []
    for w, delta, best, n in rows:
        assert delta - w == 10**9 and best == 0 and 1 <= n <= chunk
        covered += range(w, w + 4 * n, 4)
    expected = [a for start, n in zip(starts, numels, strict=True) for a in range(start, start + 4 * n, 4)]
    assert covered == expected


def test_rows_reach_beyond_32_bits():
    numel = 2**31 + 5
    rows = chunk_rows([2**40], [2**41], [2**42], [numel], 4, CPU_CHUNK)
    assert int(rows[:, 3].sum()) == numel
    assert rows[-1].tolist() == [2**40 + 2**33, 2**41 + 2**33, 2**42 + 2**33, 5]


def off_the_boundary():
    return torch.from_numpy(numpy.zeros(9, dtype=numpy.uint8)[1:].view(numpy.float32))


def overlapping():
    memory = torch.ones(10)
    return {"first": memory[:6], "second": memory[5:]}


def tied():
    weight = torch.nn.Parameter(torch.ones(4))
    return {"embedding": weight, "head": weight}


def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.ones(3)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            {"x": torch.ones(3, dtype=torch.float64)},
            TypeError,
            "x has dtype torch.float64; allowed are float32",
        ),
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.ones(3, dtype=torch.complex64)}, TypeError, "x has dtype torch.complex64"),
        ({"x": torch.ones(3, device="meta")}, ValueError, "x has layout torch.strided on meta"),
        ({"x": torch.eye(3).to_sparse()}, ValueError, "x has layout torch.sparse_coo"),
        ({"x": torch.ones(1, dtype=torch.cfloat).conj().imag}, ValueError, "x is a view whose memory holds"),
        ({"x": fake()}, TypeError, "x is a FakeTensor"),
        (
            {"x": off_the_boundary()},
            ValueError,
            r"x does not start on a multiple of its element size \(4 bytes\)",
        ),
        ({"x": [1.0]}, TypeError, "x is a list; only torch tensors"),
        ({"x": None}, TypeError, "x is a NoneType"),
        (overlapping(), ValueError, "first and second share memory"),
        (tied(), ValueError, "embedding and head share memory.*tied"),
        (torch.ones(3), TypeError, "weights is a single tensor"),
    ],
)
def test_what_cannot_be_moved_is_named(weights, error, message):
    with pytest.raises(error, match=message):
        ops.TensorTable(weights)


def test_different_devices_are_refused(monkeypatch):
    """Without a second device: two tensors that say they are on different ones."""
    from ffkernels.ops import plan

    class Elsewhere:
        device = torch.device("cuda:0")

    with pytest.raises(ValueError, match="b is on cuda:0 but a on cpu"):
        plan.check_same_device([("a", torch.ones(2)), ("b", Elsewhere())])


def test_a_contiguous_view_with_a_gap_beside_it_is_fine():
    memory = torch.ones(10)
    table = ops.TensorTable({"first": memory[:5], "second": memory[5:]})
    table.deltas[1].fill_(1.0)
    ops.step_(table, True, 1)
    assert memory.tolist() == [1.0] * 5 + [2.0] * 5


@pytest.mark.parametrize("change", ["data", "dtype", "shape"])
def test_staleness(impl, change):
    weight = torch.nn.Parameter(torch.ones(6))
    table = ops.TensorTable({"adapter": weight}, impl=impl)
    assert not table.is_stale()
    with torch.no_grad():
        weight.add_(1.0)
    assert not table.is_stale()
    old = weight.data
    if change == "shape":
        weight.data = weight.data.view(2, 3)
        assert table.is_stale()
        return
    weight.data = weight.data.clone() if change == "data" else weight.data.bfloat16()
    assert table.is_stale()
    moves = (ops.checkpoint_, ops.delta_, lambda t: ops.step_(t, True, 1), lambda t: ops.align_(t, [None]))
    for move in moves:
        with pytest.raises(RuntimeError, match=r"adapter has moved in memory.*new TensorTable"):
            move(table)
    assert old.tolist() == [2.0] * 6


def test_a_table_follows_its_weights_and_keeps_what_it_holds(impl):
    weights = [torch.nn.Parameter(torch.full((n,), 2.0)) for n in (3, 40001)]
    table = ops.TensorTable(weights, impl=impl)
    ops.checkpoint_(table)
    with torch.no_grad():
        weights[1].add_(1.0)
    old = weights[1].data
    weights[1].data = old.clone()
    assert table.follow() and not table.is_stale()
    ops.delta_(table)  # Δ = W − what was best; best ← W
    ops.step_(table, True, 2)
    assert [w.unique().tolist() for w in weights] == [[2.0], [5.0]]
    assert old.unique().tolist() == [3.0], "nothing is written where they were"
    plan = table.plan
    weights[0].data = weights[0].data.bfloat16()
    assert not table.follow() and table.plan is plan


def test_a_table_does_not_follow_to_another_layout_or_into_one_memory(impl):
    weights = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    table = ops.TensorTable(weights, impl=impl)
    plan, old = table.plan, table.weights
    weights[0].data = torch.ones(3, 2).t()
    assert not table.follow() and table.plan is plan
    weights[0].data = weights[1].data
    others = [torch.nn.Parameter(weights[1].data) for _ in range(2)]
    assert not table.follow(others) and table.plan is plan and table.weights is old


def test_tables_do_not_share_memory():
    weight = torch.ones(4)
    a, b = ops.TensorTable([weight]), ops.TensorTable([weight])
    a.deltas[0].fill_(3.0)
    assert b.deltas[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_is_not_where_a_table_lies(default, impl):
    weights = [torch.full((5,), 2.0), torch.full((40001,), 3.0)]
    with torch.device(default):
        table = ops.TensorTable(weights, impl=impl)
        for delta in table.deltas:
            delta.fill_(0.5)
        ops.step_(table, True, 2)
        ops.step_(table, False, 4)
    assert table.deltas[0].device.type == "cpu"
    assert torch.equal(weights[0], torch.full((5,), 4.0))
    assert torch.equal(weights[1], torch.full((40001,), 5.0))
