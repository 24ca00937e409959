"""The C++ moves against the torch reference, bit for bit, and what both promise around them."""

import math
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffkernels import ops
from ffkernels.ops import moves
from ffkernels.ops.plan import DTYPES

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-40, 6e-8, 3.4e38, 65504.0, 65520.0]
KS = [0.0, 1.0, -1.0, 3.0, 0.37, -2.5e-3, 1e30, math.inf, math.nan]


def tensors(dtype, *, seed=0, scale=1.0, offset=0, sizes=(0, 1, 7, 8, 33, 1000, 40_000)):
    """Tensors of awkward sizes that start `offset` elements into their memory, special values among them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        memory = torch.randn(size + offset, generator=generator) * scale
        special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (size + offset,), generator=generator)]
        memory = torch.where(torch.rand(size + offset, generator=generator) < 0.1, special, memory)
        found.append(memory.to(dtype)[offset:])
    return found


def twin_tables(make, first="cpp", second="torch"):
    """Two tables over equal tensors, with equal non-trivial Δ and best."""
    tables = []
    for impl in (first, second):
        table = ops.TensorTable(make(), impl=impl)
        for delta, best, weight in zip(table.deltas, table.best, table.weights, strict=True):
            generator = torch.Generator().manual_seed(weight.numel())
            delta.copy_(weight.roll(3) * 1e-2)
            best.copy_(torch.randn(weight.shape, generator=generator))
        tables.append(table)
    return tables


def state(table):
    return [*table.weights, *table.deltas, *table.best]


@pytest.fixture
def assert_twins(assert_same_bits):
    """The same calls on equal tables of the C++ ops and the reference."""

    def check(make, *calls, tables=None):
        a, b = tables or twin_tables(make)
        for move, *arguments in calls:
            for table in (a, b):
                move(table, *arguments)
            assert_same_bits(state(a), state(b))
        assert repr(ops.delta_absmax(a)) == repr(ops.delta_absmax(b))

    return check


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_cpp_equals_reference(cpp, dtype, offset, threads, assert_twins):
    torch.set_num_threads(threads)
    steps = [(ops.step_, accept, k) for accept in (False, True) for k in KS]
    for call in (*steps, (ops.delta_,), (ops.checkpoint_,)):
        assert_twins(lambda: tensors(dtype, offset=offset), call)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_instruction_set_gives_the_same_bits(cpp, dtype, level, isa_restored, assert_twins):
    if ops.native.load().library.ffk_cpu_isa(level) != level:
        pytest.skip("this processor lacks the instruction set")
    for accept, k in [(True, 0.37), (False, 0.37), (True, 0.0), (False, 0.0)]:
        assert_twins(lambda: tensors(dtype), (ops.delta_,), (ops.step_, accept, k))


@pytest.mark.parametrize("threads", [1, 2])
def test_streaming_stores_give_the_same_bits(cpp, dtype, threads, assert_twins):
    """Above 12 MiB the kernels bypass the cache; odd offset and odd size take every edge of that."""
    torch.set_num_threads(threads)
    size = (12 << 20) // dtype.itemsize + 4097
    weights, change = torch.randn(size + 1).to(dtype)[1:], torch.randn(size).to(dtype)
    tables = [ops.TensorTable([weights.clone()], impl=impl) for impl in ("cpp", "torch")]
    for table in tables:
        table.weights[0].add_(change)
    steps = [(True, 0.37), (False, 1.7), (True, 0), (False, -1), (False, 0)]
    calls = [(ops.delta_,), *((ops.step_, *step) for step in steps), (ops.checkpoint_,)]
    assert_twins(None, *calls, tables=tables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [0, 2])
def test_every_sixteen_bit_value(cpp, dtype, level, isa_restored, assert_twins):
    ops.native.load().library.ffk_cpu_isa(level)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for k in (0.37, -1.0, 1024.0, 2.0**-14):
        tables = [ops.TensorTable([every.clone(), every.roll(1)], impl=impl) for impl in ("cpp", "torch")]
        for table in tables:
            table.deltas[0].copy_(every.roll(12345))
            table.deltas[1].copy_(every.roll(-777))
        assert_twins(None, (ops.step_, True, k), tables=tables)


any_move = st.one_of(
    st.just(("checkpoint",)),
    st.just(("delta",)),
    st.tuples(st.just("step"), st.booleans(), st.floats(width=32, allow_nan=True, allow_infinity=True)),
    st.tuples(st.just("step"), st.booleans(), st.integers(-300, 300)),
)
members = st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 70), st.integers(0, 9)), max_size=6)


@settings(max_examples=60)
@given(members, st.lists(any_move, max_size=6), st.integers(0, 1000))
def test_any_table_any_sequence(layout, sequence, seed):
    if not ops.available()["cpp"].ok:
        pytest.skip("the C++ ops are not there")

    def make():
        return [
            tensors(dtype, seed=seed + i, offset=offset, sizes=[size])[0]
            for i, (dtype, size, offset) in enumerate(layout)
        ]

    a, b = twin_tables(make)
    for name, *arguments in sequence:
        for table in (a, b):
            getattr(ops, f"{name}_")(table, *arguments)
    for found, expected in zip(state(a), state(b), strict=True):
        same = (found == expected) & (found.signbit() == expected.signbit())
        assert bool((same | (found.isnan() & expected.isnan())).all())
    assert repr(ops.delta_absmax(a)) == repr(ops.delta_absmax(b))


def test_step_is_the_paper_s_step_and_checkpoint(impl, dtype, assert_same_bits):
    table = ops.TensorTable(tensors(dtype), impl=impl)
    for delta, weight in zip(table.deltas, table.weights, strict=True):
        delta.copy_(weight * 0.01)
    best = [weight.clone() for weight in table.weights]
    moved = [weight + delta for weight, delta in zip(table.weights, table.deltas, strict=True)]
    ops.step_(table, 1, 1)
    assert_same_bits(table.best, best)
    assert_same_bits(table.weights, moved)


def test_a_stage(impl):
    """checkpoint, an optimizer's step, delta, three steps forward of which the last is refused, rollback."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    table = ops.TensorTable([weight], impl=impl)
    ops.checkpoint_(table)
    with torch.no_grad():
        weight.add_(torch.tensor([0.5, -0.25]))
    ops.delta_(table)
    assert table.deltas[0].tolist() == [0.5, -0.25] and table.best[0].tolist() == [1.5, 1.75]
    ops.step_(table, True, 1)
    assert weight.tolist() == [2.0, 1.5]
    ops.step_(table, True, 2)
    assert weight.tolist() == [3.0, 1.0] and table.best[0].tolist() == [2.0, 1.5]
    ops.step_(table, False, 0)
    assert weight.tolist() == [2.0, 1.5]
    assert weight.requires_grad and weight.grad is None and weight.is_leaf


def test_scalars_may_be_tensors(impl):
    table = ops.TensorTable([torch.ones(3)], impl=impl)
    table.deltas[0].fill_(1.0)
    ops.step_(table, torch.tensor([True]), torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(table.weights[0], torch.ones(3) + torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"accept has shape \(2,\)"):
        ops.step_(table, torch.ones(2), 1)
    with pytest.raises(ValueError, match=r"k has shape \(0,\)"):
        ops.step_(table, True, torch.ones(0))


def test_version_counters_move_with_what_was_written(impl):
    weights = [torch.nn.Parameter(torch.ones(n)) for n in (3, 0, 5)]
    table = ops.TensorTable(weights, impl=impl)

    def versions():
        return [w._version for w in weights], table.deltas[0]._version, table.best[0]._version

    def moved(move, *arguments):
        before = versions()
        move(table, *arguments)
        after = versions()
        w = {b > a for a, b in zip(before[0], after[0], strict=True)}
        assert len(w) == 1
        return w.pop(), after[1] > before[1], after[2] > before[2]

    assert moved(ops.checkpoint_) == (False, False, True)
    assert moved(ops.delta_) == (False, True, True)
    assert moved(ops.step_, True, 1) == (True, False, True)
    assert moved(ops.step_, False, 2) == (True, False, False)
    assert moved(ops.step_, False, 0) == (True, False, False)
    assert moved(ops.step_, True, 0) == (False, False, True)


def test_backward_through_moved_weights_is_refused(impl):
    weight = torch.nn.Parameter(torch.ones(3))
    table = ops.TensorTable([weight], impl=impl)
    loss = (weight * weight).sum()
    ops.step_(table, True, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_best_is_complete_when_the_addition_fails(monkeypatch):
    table = ops.TensorTable([torch.ones(3), torch.full((2,), 2.0)], impl="torch")
    for best in table.best:
        best.zero_()

    def out_of_memory(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "_foreach_add_", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        ops.step_(table, True, 1)
    assert table.best[0].tolist() == [1, 1, 1] and table.best[1].tolist() == [2, 2]


def test_list_forms_equal_the_table_and_keep_their_plan(impl, assert_same_bits, monkeypatch):
    table = ops.TensorTable(tensors(torch.float32, seed=1), impl=impl)
    weights = tensors(torch.float32, seed=1)
    deltas, best = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    ops.checkpoint_(weights, best, impl=impl)
    assert_same_bits(best, table.best)
    for w, v in zip(weights, table.weights, strict=True):
        w.mul_(1.01)
        v.mul_(1.01)
    ops.delta_(weights, deltas, best, impl=impl)
    ops.step_(weights, deltas, best, True, 0.3, impl=impl)
    ops.delta_(table)
    ops.step_(table, True, 0.3)
    assert_same_bits([*weights, *deltas, *best], state(table))

    def refuse(*_, **__):
        raise AssertionError("the plan was made again")

    monkeypatch.setattr(moves, "make_plan", refuse)
    ops.step_(weights, deltas, best, True, 0.3, impl=impl)
    with pytest.raises(AssertionError, match="made again"):
        ops.step_([w.clone() for w in weights], deltas, best, True, 0.3, impl=impl)


def test_the_plan_cache_is_bounded_and_holds_no_tensors():
    weight = torch.ones(4)
    alive = weakref.ref(weight)
    ops.checkpoint_([weight], [torch.zeros(4)])
    del weight
    assert alive() is None
    kept = [([torch.ones(4)], [torch.zeros(4)]) for _ in range(40)]
    for weights, best in kept:
        ops.checkpoint_(weights, best)
        assert best[0].tolist() == [1, 1, 1, 1]
    assert len(moves._plans) <= 16


@pytest.fixture
def pretend_gpu(streams, monkeypatch):
    """Plans that believe to lie on a GPU."""

    def on_gpu(*args, **kwargs):
        plan = make_plan(*args, **kwargs)
        plan.device = torch.device("cuda", 0)
        return plan

    make_plan = moves.make_plan
    monkeypatch.setattr(moves, "make_plan", on_gpu)
    monkeypatch.setattr(moves, "_plans", type(moves._plans)())
    monkeypatch.setattr(moves, "_captured", {})
    return streams


def test_the_plan_of_a_captured_call_is_never_dropped(pretend_gpu):
    """A graph points to the plan's rows for as long as it lives."""
    sides = [[torch.zeros(3)] for _ in range(2)]
    ops.checkpoint_(*sides, impl="torch")
    assert not moves._captured
    pretend_gpu.capturing = True
    ops.checkpoint_(*sides, impl="torch")
    pretend_gpu.capturing = False
    (kept,) = moves._captured.values()
    alive = []
    for size in range(1, 40):
        alive.append([[torch.zeros(size)] for _ in range(2)])
        ops.checkpoint_(*alive[-1], impl="torch")
    assert kept not in moves._plans.values()
    assert moves.plan_for(sides[0], None, sides[1], "torch") is kept


def test_a_dropped_plan_waits_for_the_streams_that_read_it(pretend_gpu):
    """Its rows may be freed by a call on one stream while kernels on another still have to read them."""
    sides = [[torch.zeros(3)] for _ in range(2)]
    for pretend_gpu.stream in ("main", "side", "main"):
        ops.checkpoint_(*sides, impl="torch")
    plan = moves.plan_for(sides[0], None, sides[1], "torch")
    plan.constants["one"] = torch.ones(1)
    held = [plan.groups[0].rows.data_ptr(), plan.constants["one"].data_ptr()]
    pretend_gpu.stream, alive = "other", []
    for size in range(4, 20):
        assert pretend_gpu.recorded == []
        alive.append([[torch.zeros(size)] for _ in range(2)])
        ops.checkpoint_(*alive[-1], impl="torch")
    assert sorted(pretend_gpu.recorded) == sorted((at, on) for at in held for on in ("main", "side"))


def test_threads_may_share_the_kept_plans(monkeypatch):
    """Another thread that drops the very plan that this one has just found."""
    fresh = [([torch.ones(n)], [torch.zeros(n)]) for n in range(1, 40)]
    others = []

    def fill_up():
        for weights, best in fresh:
            ops.checkpoint_(weights, best, impl="torch")

    class InterruptedInBetween(type(moves._plans)):
        def __contains__(self, key):
            found = super().__contains__(key)
            if found and not others:
                others.append(threading.Thread(target=fill_up))
                others[0].start()
                others[0].join(timeout=0.2)
            return found

    monkeypatch.setattr(moves, "_plans", InterruptedInBetween())
    weights, best = [torch.ones(50)], [torch.zeros(50)]
    ops.checkpoint_(weights, best, impl="torch")
    best[0].zero_()
    ops.checkpoint_(weights, best, impl="torch")
    assert torch.equal(best[0], weights[0])
    others[0].join()
    assert all(torch.equal(best[0], weights[0]) for weights, best in fresh)


@pytest.mark.parametrize("side", ["weights", "deltas", "best"])
def test_one_tensor_is_not_the_list_of_its_rows(side):
    lists = {name: [torch.zeros(4)] * 1 for name in ("weights", "deltas", "best")}
    lists[side] = torch.zeros(1, 4)
    with pytest.raises(TypeError, match=f"{side} is a single tensor; pass a list of tensors"):
        ops.delta_(*lists.values())
    if side != "deltas":
        with pytest.raises(TypeError, match=f"{side} is a single tensor"):
            ops.checkpoint_(lists["weights"], lists["best"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda w: (w, w[:1], w), "deltas has 1 tensors for 2 weights"),
        (lambda w: (w, w, w), r"weights\[[01]\].*share memory|share memory"),
        (lambda w: (w, [torch.ones(3), torch.ones(3)], [x + 1 for x in w]), r"deltas\[0\] is \(3,\)"),
        (
            lambda w: (w, [x.clone() for x in w], [x.clone().bfloat16() for x in w]),
            r"best\[0\] is \(2,\) torch.bfloat16 but weights\[0\]",
        ),
    ],
)
def test_list_forms_refuse_what_does_not_fit(arguments, message):
    weights = [torch.ones(2), torch.ones(3)]
    with pytest.raises(ValueError, match=message):
        ops.step_(*arguments(weights), True, 1)
    with pytest.raises(TypeError, match=r"weights\[1\] is a int"):
        ops.checkpoint_([torch.ones(2), 3], [torch.ones(2), torch.ones(2)])


def test_an_empty_table_is_a_no_op(impl):
    table = ops.TensorTable([], impl=impl)
    ops.checkpoint_(table)
    ops.delta_(table)
    ops.step_(table, True, 1)
    ops.step_([], [], [], True, 1, impl=impl)
    assert ops.delta_absmax(table) == 0.0 and table.numel == 0


def test_absmax(impl, dtype):
    table = ops.TensorTable([torch.ones(n, dtype=dtype) for n in (5, 0, 40_000)], impl=impl)
    assert ops.delta_absmax(table) == 0.0
    table.deltas[2][39_999] = -3.5
    assert ops.delta_absmax(table) == 3.5
    table.deltas[0][1] = -math.inf
    assert ops.delta_absmax(table) == math.inf
    table.deltas[2][17] = math.nan
    assert math.isnan(ops.delta_absmax(table))


def test_moves_work_under_inference_mode(impl):
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        table = ops.TensorTable([weight], impl=impl)
        table.deltas[0].fill_(1.0)
        ops.step_(table, True, 1)
    assert weight.tolist() == [2.0, 2.0, 2.0]
    ops.delta_(table)
    assert table.deltas[0].tolist() == [1.0, 1.0, 1.0]
