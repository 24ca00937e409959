"""The registered operators: honest schemas, traceable calls, and an eager path that goes around them."""

import math

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from ffkernels import ops
from ffkernels.ops import moves, reference
from ffkernels.ops.build import find_compiler

SHAPES = [(5, 7), (3000,), (), (0, 4)]


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def three() -> list[list[torch.Tensor]]:
    return [tensors(0), tensors(1), tensors(2)]


def clones(sides: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[tensor.detach().clone() for tensor in side] for side in sides]


def assert_equal(got: list[list[torch.Tensor]], want: list[list[torch.Tensor]]) -> None:
    for side, others in zip(got, want, strict=True):
        for tensor, other in zip(side, others, strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)


ACCEPT, K = torch.ones(1, dtype=torch.int32), torch.full((1,), 0.25)


def test_schemas_say_what_is_written():
    for name, arguments, returned in (
        ("checkpoint_", "Tensor[] weights, Tensor(b!)[] best", "()"),
        ("delta_", "Tensor[] weights, Tensor(a!)[] deltas, Tensor(b!)[] best", "()"),
        (
            "step_",
            "Tensor(a!)[] weights, Tensor[] deltas, Tensor(b!)[] best, Tensor accept, Tensor k",
            "()",
        ),
        ("align_", "Tensor[] weights, Tensor?[] grads, Tensor(b!)[] best", "Tensor"),
    ):
        schema = str(getattr(torch.ops.ffkernels, name).default._schema)
        assert schema == f'ffkernels::{name}({arguments}, str impl="auto") -> {returned}'


@pytest.mark.parametrize("name", ["checkpoint_", "delta_", "step_", "align_"])
@pytest.mark.parametrize("grad", [False, True], ids=["tensors", "parameters"])
def test_opcheck(name, grad):
    weights, deltas, best = three()
    if grad:
        weights = [torch.nn.Parameter(weight) for weight in weights]
    arguments = {
        "checkpoint_": (weights, best),
        "delta_": (weights, deltas, best),
        "step_": (weights, deltas, best, ACCEPT, K),
        "align_": (weights, [None, *(d.bfloat16() for d in deltas[1:])], best),
    }[name]
    with torch.no_grad():
        results = opcheck(getattr(torch.ops.ffkernels, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def test_operators_do_what_the_reference_does_and_name_a_tensor_that_does_not_fit():
    sides = three()
    short = [sides[0], [sides[1][0], sides[1][1][:10], *sides[1][2:]], sides[2]]
    with pytest.raises(ValueError, match=r"deltas\[1\] is \(10,\) .* but weights\[1\] is \(3000,\)"):
        torch.ops.ffkernels.step_(*short, ACCEPT, K)
    want = clones(sides)
    torch.ops.ffkernels.step_(*sides, ACCEPT, K)
    reference.step_(*want, True, 0.25)
    assert_equal(sides, want)
    torch.ops.ffkernels.delta_(*sides)
    reference.delta_(*want)
    assert_equal(sides, want)
    torch.ops.ffkernels.checkpoint_(sides[1], sides[2])
    assert_equal([sides[2]], [sides[1]])


SCALARS = {"numbers": (True, 0.25), "tensors": (ACCEPT, K), "refused": (False, 3.0), "restore": (0, 0)}


@pytest.mark.parametrize("scalars", SCALARS.values(), ids=SCALARS)
def test_a_compiled_function_moves_weights(scalars):
    def stage(weights, deltas, best, accept, k):
        ops.delta_(weights, deltas, best)
        ops.step_(weights, deltas, best, accept, k)
        ops.step_(weights, deltas, best, False, 1.0)
        return weights[0] * 2

    sides = three()
    sides[0] = [torch.nn.Parameter(weight) for weight in sides[0]]
    want = clones(sides)
    result = stage(*want, *scalars)
    with torch.no_grad():
        compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")(*sides, *scalars)
    assert_equal(sides, want)
    assert torch.equal(result, compiled)


def test_a_compiled_function_may_hold_a_table():
    table, plain = (ops.TensorTable([torch.nn.Parameter(w) for w in tensors(0)]) for _ in range(2))
    for one in (table, plain):
        for delta in one.deltas:
            delta.fill_(0.5)

    def moves_of(one):
        ops.step_(one, True, 2.0)
        ops.delta_(one)
        ops.checkpoint_(one)

    torch.compile(lambda: moves_of(table), fullgraph=True, backend="aot_eager")()
    moves_of(plain)
    assert_equal([table.weights, table.deltas, table.best], [plain.weights, plain.deltas, plain.best])
    assert torch.equal(table.weights[0], tensors(0)[0] + 1)


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_inductor():
    sides = three()
    want = clones(sides)
    torch.compile(ops.step_, fullgraph=True)(*sides, True, 0.25)
    reference.step_(*want, True, 0.25)
    assert_equal(sides, want)


class Dispatched(TorchDispatchMode):
    """Names of the operators that went through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_eager_calls_go_around_the_dispatcher():
    sides = three()
    with Dispatched() as seen:
        ops.step_(*sides, True, 1.0)
        ops.delta_(*sides)
        ops.checkpoint_(sides[0], sides[2])
        torch.ops.ffkernels.checkpoint_(sides[0], sides[2])
    assert [name for name in seen.names if name.startswith("ffkernels")] == ["ffkernels.checkpoint_.default"]


def test_lists_of_different_lengths_are_refused_while_tracing():
    with torch._subclasses.FakeTensorMode():
        weights = [torch.empty(2), torch.empty(3)]
        with pytest.raises(ValueError, match="best has 1 tensors for 2 weights"):
            moves.checkpoint_(weights, weights[:1])
        with pytest.raises(ValueError, match=r"k has shape \(2,\)"):
            moves.step_(weights, weights, weights, torch.empty(1), torch.empty(2))
        with pytest.raises(ValueError, match="grads has 1 tensors for 2 weights"):
            torch.ops.ffkernels.align_(weights, [None], weights)
        sums = torch.ops.ffkernels.align_(weights, [None, None], [torch.empty(2), torch.empty(3)])
        assert (sums.shape, sums.dtype) == ((3,), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("accept", "k"), [(1, 0.3), (0, 0.3), (1, 0.0), (0, 0.0), (1, -1.0), (0, 7.0)])
def test_the_reference_that_reads_nothing_back(dtype, accept, k):
    """Device scalars on the torch implementation: the same bits, also where Δ is infinite."""
    sides = [tensors(i, dtype) for i in range(3)]
    if k == 0:
        sides[1][1][:5] = float("inf")
        sides[1][1][5:9] = float("nan")
    want = clones(sides)
    reference.step_(*want, bool(accept), torch.tensor(k, dtype=torch.float32).item())
    reference.step_by_device_(*sides, torch.tensor([accept], dtype=torch.int32), torch.tensor([k]))
    assert_equal(sides, want)


def test_constants_are_made_once_per_value():
    from ffkernels.ops.moves import as_tensor
    from ffkernels.ops.plan import make_plan

    weights = tensors(0)
    plan = make_plan(weights, None, tensors(1))
    first = as_tensor(plan, 2.0, torch.float32)
    assert first.dtype == torch.float32 and first.tolist() == [2.0]
    assert as_tensor(plan, 2.0, torch.float32) is first
    assert as_tensor(plan, True, torch.int32).tolist() == [1]
    assert as_tensor(plan, float("nan"), torch.float32) is as_tensor(plan, float("nan"), torch.float32)
    assert as_tensor(plan, first, torch.float32) is first


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_absmax_that_stays_on_the_device_is_the_same_number(impl):
    table = ops.TensorTable([torch.zeros(5), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(0)], impl=impl)
    for value, expected in ((0.0, 0.25), (-3.5, 3.5), (-math.inf, math.inf), (math.nan, math.nan)):
        table.deltas[0][2] = value
        table.deltas[1][1] = -0.25
        found = ops.delta_absmax_on_device(table)
        assert (found.shape, found.dtype, found.device) == ((), torch.float32, table.device)
        assert repr(found.item()) == repr(ops.delta_absmax(table)) == repr(expected)
    empty = ops.delta_absmax_on_device(ops.TensorTable([], impl="torch"))
    assert (empty.shape, empty.dtype, empty.item()) == ((), torch.float32, 0.0)
