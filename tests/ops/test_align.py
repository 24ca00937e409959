"""Alignment: its three sums against float64 truth, what it copies, and what it says to wrong gradients."""

import itertools
import math
import re

import pytest
import torch

from ffkernels import ops
from ffkernels.ops import align, moves, native
from ffkernels.ops.plan import CPU_CHUNK, DTYPE_CODES, SUM_BLOCK, make_plan

ALL = list(DTYPE_CODES)
# Nothing, less than a vector, around a run of 64, a block of 1,024 and a row of 32,768, several rows.
SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 1000, 1023, 1024, 1025, 5000, CPU_CHUNK, CPU_CHUNK + 1, 70_001]


def make(dtype, grad_dtype, sizes=SIZES, *, offset=0, seed=0):
    """Weights, gradients and best; every fifth tensor has no gradient."""
    generator = torch.Generator().manual_seed(seed)

    def randoms(kind, scale=1.0):
        return [
            (torch.randn(n + offset, generator=generator, dtype=torch.float64) * scale).to(kind)[offset:]
            for n in sizes
        ]

    weights, grads = randoms(dtype), randoms(grad_dtype, 1e-3)
    best = [w + c for w, c in zip(weights, randoms(dtype, 1e-2), strict=True)]
    return weights, [g if i % 5 != 3 else None for i, g in enumerate(grads)], best


def test_a_cosine_that_is_known(impl):
    """Δ is (3, 4, 0, …), g is parallel to it, then opposite, then at a right angle."""
    weight = torch.nn.Parameter(torch.zeros(2000))
    table = ops.TensorTable([weight], impl=impl)
    for g, cosine in (((0.6, 0.8), 1.0), ((-3e20, -4e20), -1.0), ((4e-30, -3e-30), 0.0)):
        with torch.no_grad():
            weight[:2] += torch.tensor([3.0, 4.0])
        grad = torch.zeros(2000)
        grad[:2] = torch.tensor(g)
        dot, gg, dd = ops.align_(table, [grad]).tolist()
        assert dd == 25.0
        assert math.isclose(dot / math.sqrt(gg * dd), cosine, abs_tol=1e-7)
    assert ops.align_(table, [grad]).tolist()[::2] == [0.0, 0.0], "best is W now"


@pytest.mark.parametrize("any_dtype", ALL, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_cpp_equals_the_reference_bit_for_bit(cpp, any_dtype, isa_restored, assert_sums):
    """With every instruction set that the processor has, and on several threads."""
    set_level = native.load().library.ffk_cpu_isa
    for grad_dtype, offset in itertools.product(ALL, (0, 1)):
        weights, grads, best = make(any_dtype, grad_dtype, offset=offset)
        before = [b.clone() for b in best]
        sums = ops.align_(weights, grads, best, impl="torch")
        assert_sums(sums, weights, grads, before)
        expected = sums.tolist()
        assert all(expected)
        for level, threads in ((0, 1), (1, 1), (1, 2)):
            set_level(level)
            torch.set_num_threads(threads)
            torch._foreach_copy_(best, before)
            found = ops.align_(weights, grads, best, impl="cpp").tolist()
            torch.set_num_threads(1)
            assert found == expected, (grad_dtype, offset, level, threads)
            assert all(torch.equal(b, w) for b, w in zip(best, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", [0, 1])
def test_every_sixteen_bit_value(cpp, dtype, level, isa_restored, assert_sums):
    native.load().library.ffk_cpu_isa(level)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()]
    best = [every.roll(12_345) for _ in range(3)]
    sums = ops.align_([every], [every], [best[0]], impl="cpp")
    assert_sums(sums, [every], [every], [best[2]])
    assert sums.tolist() == ops.align_([every], [every], [best[1]], impl="torch").tolist()


def test_large_sets_of_many_dtypes_add_up_in_one_order(cpp):
    """More than the reference holds at a time, across dtypes and tensors that end within a block."""
    sizes = [1_100_000, 3, 500_001, 1024]
    found = []
    for impl in ("cpp", "torch"):
        sides = [[], [], []]
        for i, dtype in enumerate(ALL):
            for side, tensors in zip(sides, make(dtype, ALL[i - 1], sizes[: 4 - i], seed=i), strict=True):
                side += tensors
        found.append(ops.align_(*sides, impl=impl).tolist())
    assert found[0] == found[1] and all(found[0])


def test_gradients_beyond_the_squares_of_float32(impl):
    """1e-30 squared is no float32 any more, nor is 1e30."""
    for scale in (1e-30, 1e30):
        sums = ops.align_(
            [torch.full((100,), scale)], [torch.full((100,), scale)], [torch.zeros(100)], impl=impl
        )
        square = float(torch.tensor(scale)) ** 2
        assert sums.tolist() == pytest.approx([100 * square] * 3, rel=1e-14)


def test_gradients_may_lie_anywhere(impl, assert_sums):
    """Transposed, strided, expanded, negative views, elements off their boundary: as their values say."""
    numpy = pytest.importorskip("numpy")
    shape = (30, 40)
    off = torch.from_numpy(numpy.zeros(4801, dtype=numpy.uint8)[1:].view(numpy.float32)).view(shape)
    off.copy_(torch.randn(shape))
    odd = [
        torch.randn(40, 30).t(),
        torch.randn(30, 80)[:, ::2],
        torch.randn(1, 40).expand(shape),
        torch._neg_view(torch.randn(shape)),
        off,
        torch.randn(shape).requires_grad_(),
    ]
    for grad in odd:
        for _ in range(2):
            weights, best = [torch.randn(shape)], [torch.zeros(shape)]
            sums = ops.align_(weights, [grad], best, impl=impl)
            assert_sums(sums, weights, [grad], [torch.zeros(shape)])


def test_gradients_may_lie_elsewhere_in_every_call(impl, monkeypatch):
    looked, checked = [], []

    def spy(owner, name, seen):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: (seen.append(1), real(*arguments))[1])

    spy(align.Gradients, "_check", looked)
    spy(align, "_check_gradient", checked)
    table = ops.TensorTable([torch.zeros(100), torch.zeros(50)], impl=impl)
    a, b = torch.full((100,), 2.0), torch.full((50,), 3.0)
    for grads, square, looks, checks in (
        ([a, b], 850.0, 1, 2),
        ([a, b], 850.0, 1, 2),  # where they were: nothing is looked up again
        ([a, None], 400.0, 2, 2),
        ([None, b], 450.0, 3, 2),
        ([a, b.clone()], 850.0, 4, 2),  # only the address is new: nothing is checked again
        ([a, b.bfloat16()], 850.0, 5, 3),
        ([a, b.repeat_interleave(2)[::2]], 850.0, 6, 4),
        ([a, b.repeat_interleave(2)[::2]], 850.0, 7, 4),
        ([a, b], 850.0, 8, 5),
    ):
        assert ops.align_(table, grads)[1].item() == square
        assert (len(looked), len(checked)) == (looks, checks)
    a.fill_(1.0)
    assert ops.align_(table, [a, b])[1].item() == 550.0 and len(looked) == 8
    strided = b.repeat_interleave(2)[::2]
    for value in (3.0, 5.0):
        strided.fill_(value)  # a copy of it is as old as the call that made it
        assert ops.align_(table, [None, strided])[1].item() == 50 * value**2


def test_only_best_and_out_count_as_written(impl):
    weights = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5)]
    table = ops.TensorTable(weights, impl=impl)
    grads, out = [torch.ones(3), torch.ones(5)], torch.empty(3, dtype=torch.float64)

    def versions():
        return [[t._version for t in side] for side in (weights, table.deltas, grads, table.best, [out])]

    before = versions()
    assert ops.align_(table, grads, out) is out
    after = versions()
    assert before[:3] == after[:3]
    assert all(
        new > old for x, y in zip(before[3:], after[3:], strict=True) for old, new in zip(x, y, strict=True)
    )
    loss = (weights[0] * table.best[0].clone()).sum()
    ops.align_(table, grads)
    loss.backward()  # W is not among what was written


def test_out_takes_the_sums(impl):
    table = ops.TensorTable([torch.ones(4)], impl=impl)
    out = torch.full((3,), math.nan, dtype=torch.float64)
    assert ops.align_(table, [torch.full((4,), 2.0)], out=out) is out
    assert out.tolist() == [0.0, 16.0, 0.0]
    for bad, what in (
        (torch.empty(3), r"\(3,\) torch.float32 on cpu"),
        (torch.empty(4, dtype=torch.float64), r"\(4,\) torch.float64"),
        (torch.empty(6, dtype=torch.float64)[::2], "contiguous"),
        (torch.empty(3, dtype=torch.float64, device="meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=f"out is .*{what}"):
            ops.align_(table, [None], bad)


def test_no_tensors_and_empty_ones(impl):
    out = torch.full((3,), 7.0, dtype=torch.float64)
    assert ops.align_(ops.TensorTable([], impl=impl), []).tolist() == [0.0, 0.0, 0.0]
    assert ops.align_([], [], [], out, impl=impl).tolist() == [0.0, 0.0, 0.0]
    table = ops.TensorTable([torch.ones(0, 4), torch.ones(0)], impl=impl)
    assert ops.align_(table, [torch.ones(0, 4), None], out).tolist() == [0.0, 0.0, 0.0]
    table = ops.TensorTable([torch.ones(0), torch.ones(2)], impl=impl)
    assert ops.align_(table, [torch.ones(0), torch.ones(2)]).tolist() == [0.0, 2.0, 0.0]


def test_more_than_a_thousand_tensors(impl):
    weights = [torch.full((3,), float(i)) for i in range(1200)]
    table = ops.TensorTable(weights, impl=impl)
    for best in table.best:
        best.sub_(1.0)
    grads = [torch.full((3,), float(i)) for i in range(1200)]
    total = 3.0 * sum(range(1200))
    assert ops.align_(table, grads).tolist() == [total, 3.0 * sum(i * i for i in range(1200)), 3600.0]
    assert [best[2].item() for best in table.best] == [float(i) for i in range(1200)]


def sparse():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    return embedding.weight.grad


def wrapper():
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(4, 3), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (sparse(), ValueError, r"the gradient of emb is sparse \(torch.sparse_coo\).*sparse=False"),
        (torch.ones(3, 4), ValueError, r"the gradient of emb is \(3, 4\), the weight \(4, 3\)"),
        (torch.ones(12), ValueError, r"the gradient of emb is \(12,\)"),
        (torch.ones(4, 3, device="meta"), ValueError, "the gradient of emb has layout .* on meta"),
        (torch.ones(4, 3, dtype=torch.int32), TypeError, "the gradient of emb has dtype torch.int32"),
        (torch.ones(4, 3, dtype=torch.cfloat), TypeError, "torch.complex64; allowed are float32, bfloat16"),
        (1.0, TypeError, "the gradient of emb is a float; only torch tensors"),
        (wrapper(), TypeError, "the gradient of emb is a TwoTensor, which has no one memory"),
    ],
)
def test_gradients_that_do_not_fit_are_named_and_nothing_is_written(impl, grad, error, message):
    table = ops.TensorTable({"first": torch.zeros(2), "emb": torch.zeros(4, 3)}, impl=impl)
    ops.align_(table, [torch.ones(2), torch.ones(4, 3)])
    for weight in table.weights:
        weight.fill_(1.0)
    with pytest.raises(error, match=message):
        ops.align_(table, [torch.ones(2), grad])
    assert not any(best.any() for best in table.best)
    with pytest.raises(error, match=message.replace("emb", r"weights\[1\]")):
        ops.align_(table.weights, [None, grad], [b.clone() for b in table.best], impl=impl)
    assert ops.align_(table, [torch.ones(2), torch.ones(4, 3)]).tolist() == [14.0, 14.0, 14.0]


def test_another_device_is_named(monkeypatch):
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    grad = torch.ones(2).as_subclass(Elsewhere)
    with pytest.raises(ValueError, match="the gradient of w is on cuda:1, the weight on cpu"):
        ops.align_(ops.TensorTable({"w": torch.ones(2)}, impl="torch"), [grad])


@pytest.mark.parametrize("grads", [[], [torch.ones(2)], [torch.ones(2)] * 3])
def test_one_gradient_or_none_for_each_weight(impl, grads):
    table = ops.TensorTable([torch.ones(2), torch.ones(2)], impl=impl)
    message = f"grads has {len(grads)} entries for 2 weights; give one for each, None where"
    with pytest.raises(ValueError, match=message):
        ops.align_(table, grads)
    with pytest.raises(TypeError, match="grads is a single tensor"):
        ops.align_(table, torch.ones(2, 2))
    assert ops.align_(table, (w for w in table.weights)).tolist() == [0.0, 4.0, 0.0], "a generator is a list"


def test_lists_keep_their_plan_and_float64_is_for_alignment_alone(impl, monkeypatch):
    weights, grads, best = make(torch.float64, torch.float64)
    ops.align_(weights, grads, best, impl=impl)
    with pytest.raises(TypeError, match=r"dtype torch.float64; allowed are float32, bfloat16, float16\."):
        ops.checkpoint_(weights, best, impl=impl)
    with pytest.raises(TypeError, match=r"weights\[0\] has dtype torch.int64; allowed are .*float64"):
        ops.align_([torch.ones(2, dtype=torch.int64)], [None], [torch.ones(2)], impl=impl)
    monkeypatch.setattr(moves, "make_plan", lambda *_, **__: pytest.fail("the plan was made again"))
    ops.align_(weights, grads, best, impl=impl)
    for side in ("weights", "best"):
        lists = {"weights": [torch.ones(2)], "grads": [None], "best": [torch.ones(2)]} | {
            side: torch.ones(1, 2)
        }
        with pytest.raises(TypeError, match=f"{side} is a single tensor"):
            ops.align_(*lists.values())


def test_it_works_under_inference_mode(impl):
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        table = ops.TensorTable([weight], impl=impl)
        table.best[0].zero_()
        assert ops.align_(table, [torch.ones(3)]).tolist() == [3.0, 3.0, 3.0]
    assert ops.align_(table, [torch.ones(3)]).tolist() == [0.0, 3.0, 0.0]


def test_the_constants_of_the_sources_are_those_of_the_python_side():
    header = (native.RECIPE.source_dir() / "ffkernels.h").read_text()
    constants = {name: int(value) for name, value in re.findall(r"#define (FFK_\w+) (\d+)$", header, re.M)}
    assert constants["FFK_BLOCK"] == SUM_BLOCK and CPU_CHUNK % SUM_BLOCK == 0
    assert constants["FFK_SEGMENT"] == align.SEGMENT


# ---- the operator ----


@pytest.mark.parametrize("form", ["lists", "table"])
def test_a_compiled_function_aligns(form, fresh_compiler):
    def cosine(one, grads, best=None):
        sums = ops.align_(one, grads) if best is None else ops.align_(one, grads, best)
        return sums[0] * torch.rsqrt(sums[1] * sums[2])

    found = []
    for compiled in (False, True):
        weights, grads, best = make(torch.float32, torch.float32, [5, 3000, 1, 8])
        weights = [torch.nn.Parameter(w) for w in weights]
        arguments = (weights, grads, best)
        if form == "table":
            table = ops.TensorTable(weights)
            torch._foreach_copy_(table.best, best)
            best, arguments = table.best, (grads,)
            call = lambda grads: cosine(table, grads)  # noqa: B023, E731
        else:
            call = cosine
        if compiled:
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            found.append(call(*arguments).item())
        assert all(torch.equal(b, w) for b, w in zip(best, weights, strict=True))
    assert found[0] == found[1] != 0


def test_a_compiled_function_fills_out(fresh_compiler):
    table = ops.TensorTable([torch.ones(4)])
    out = torch.zeros(3, dtype=torch.float64)
    compiled = torch.compile(lambda g: ops.align_(table, [g], out), fullgraph=True, backend="aot_eager")
    compiled(torch.full((4,), 2.0))
    assert out.tolist() == [0.0, 16.0, 0.0]


# ---- what happens on a GPU before the launch ----


@pytest.fixture
def pretend_gpu(streams, monkeypatch):
    """A table's gradients that believe to lie on a GPU, a capture to set, and what was sent and recorded."""
    state, streams.sent = streams, []
    make_tensor, to = torch.tensor, torch.Tensor.to

    def tensor(*args, pin_memory=False, **kwargs):
        made = make_tensor(*args, **kwargs)
        made.pinned = pin_memory
        return made

    def send(self, *args, **kwargs):
        if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
            state.sent.append((getattr(self._base, "pinned", None), kwargs))
            return self.clone()
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.Tensor, "to", send)
    table = ops.TensorTable([torch.zeros(3), torch.zeros(4)], impl="torch")
    table.plan.impl = "cuda"
    state.gradients, state.weights = align.Gradients(table.plan), table.weights
    state.gradients.device = table.plan.device = torch.device("cuda", 0)
    state.plan = table.plan
    state.find = lambda grads: state.gradients.find(None, state.weights, grads)
    return state


def test_addresses_go_to_a_gpu_from_pinned_memory_and_only_when_they_change(pretend_gpu):
    grads = [torch.ones(3), torch.ones(4).bfloat16()]
    pretend_gpu.find(grads)
    assert pretend_gpu.gradients.table.tolist() == [[grads[0].data_ptr(), 0], [grads[1].data_ptr(), 1]]
    assert pretend_gpu.sent == [(True, {"non_blocking": True})]
    pretend_gpu.find(grads)
    assert len(pretend_gpu.sent) == 1
    old = pretend_gpu.gradients.table
    pretend_gpu.find([grads[0], None])
    assert pretend_gpu.gradients.table.tolist() == [[grads[0].data_ptr(), 0], [0, 0]]
    assert len(pretend_gpu.sent) == 2
    assert old.tolist()[1] == [grads[1].data_ptr(), 1], "a kernel may still have to read it"


def test_a_gradient_off_the_boundary_of_its_elements_is_copied(pretend_gpu):
    """On a GPU such an access is an error."""
    numpy = pytest.importorskip("numpy")
    off = torch.from_numpy(numpy.zeros(13, dtype=numpy.uint8)[1:].view(numpy.float32))
    (found, _) = pretend_gpu.find([off, None])
    at = pretend_gpu.gradients.table[0, 0].item()
    assert off.data_ptr() % 4 and at == found.data_ptr() and at % 4 == 0


def test_a_capture_takes_gradients_that_were_seen_before_and_keeps_their_table(pretend_gpu):
    grads = [torch.ones(3), torch.ones(4)]
    pretend_gpu.find(grads)
    pretend_gpu.capturing = True
    pretend_gpu.find(grads)
    captured = pretend_gpu.gradients.table
    for others in ([torch.ones(3), torch.ones(4)], [torch.ones(3), torch.ones(8)[::2]]):
        with pytest.raises(RuntimeError, match=r"CUDA graph is being captured.*set_to_none=False"):
            pretend_gpu.find(others)
    with pytest.raises(RuntimeError, match="or there was none, while a CUDA graph is being captured"):
        align.Gradients(pretend_gpu.plan)
    pretend_gpu.capturing = False
    pretend_gpu.find([torch.ones(3), torch.ones(4)])
    assert any(table is captured for table in pretend_gpu.gradients._captured)


def test_a_table_is_kept_until_every_stream_that_reads_it_is_done(pretend_gpu):
    grads = [torch.ones(3), torch.ones(4)]
    for pretend_gpu.stream in ("main", "side"):
        pretend_gpu.find(grads)
    at = pretend_gpu.gradients.table.data_ptr()
    assert pretend_gpu.recorded == [(at, "main"), (at, "side")]


def test_a_dropped_plan_keeps_its_table_until_its_streams_are_done(pretend_gpu):
    plan = make_plan([torch.zeros(3)], None, [torch.zeros(3)])
    plan.impl, plan.streams = "cuda", {"main"}
    plan.gradients = align.Gradients(plan)
    plan.gradients.find(None, [torch.zeros(3)], [torch.ones(3)])
    moves._let_go(plan)
    assert {(t.data_ptr(), "main") for t in plan.gradients.tensors()} <= set(pretend_gpu.recorded)
