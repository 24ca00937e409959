"""FLOPs of operations against hand formulas: those of PyTorch's registry and those it lacks."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ffkernels import FastForward, FastForwardConfig
from ffkernels.ops import notices
from ffkernels.validation.flops import count_flops, counter, formula_of

B, L, E, H, F = 3, 5, 8, 2, 12  # rows, length, width, heads, width of the feed-forward
aten = torch.ops.aten


def encode(padding=None):
    layer = nn.TransformerEncoderLayer(E, H, F, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=padding is not None).eval()
    return torch.no_grad()(lambda: encoder(torch.randn(B, L, E), src_key_padding_mask=padding))


def attend(keys):
    attention = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(B, L, E)
    return torch.no_grad()(lambda: attention(x, x, x) if keys is None else attention(x, *keys))


def recur(kind, lengths=None, backward=False, **options):
    layer = kind(4, 6, batch_first=True, **options)
    x = torch.randn(B, L, 4)
    x = x if lengths is None else pack_padded_sequence(x, lengths, batch_first=True)

    def run():
        out = layer(x)[0]
        if backward:
            (out if lengths is None else out.data).sum().backward()

    return run


def convolve(kind, *sizes, backward=True, **options):
    layer, x = kind(*sizes, bias=False, **options), torch.randn(B, sizes[0], 9, requires_grad=True)
    return lambda: layer(x).sum().backward() if backward else layer(x)


def experts(backward, multiply=torch.nn.functional.grouped_mm):
    x, w = torch.randn(10, 8, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    offsets = torch.tensor([2, 2, 10], dtype=torch.int32)  # the second expert has no row

    def run():
        out = multiply(x, w, offs=offsets)
        if backward:
            out.square().sum().backward()

    return run


def fallback(x, w, offs):
    pytest.importorskip("transformers.integrations.moe")
    return torch.ops.transformers.grouped_mm_fallback(x, w, offs)


@torch.no_grad()
def branch(taken):
    w = torch.randn(4, 4)
    args = torch.tensor(taken), lambda x: x @ w @ w, lambda x: x @ w
    return lambda: torch.cond(*args, (torch.randn(2, 4),))


@torch.inference_mode()
def in_inference_mode():
    nn.functional.linear(torch.ones(3, 4), torch.ones(5, 4))
    torch.ones(2, 3, 4) @ torch.ones(4, 5)


def padding():
    return torch.arange(L) >= torch.tensor([5, 3, 1])[:, None]


PROJECTIONS = 4 * E * E
LAYER = 2 * (PROJECTIONS + 2 * E * F)  # of a token
GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


@pytest.mark.parametrize(
    "run, flops",
    [
        pytest.param(encode(), 2 * (B * L * LAYER + 4 * B * L * L * E), id="encoder"),
        pytest.param(encode(padding()), 2 * (9 * LAYER + 4 * B * L * L * E), id="encoder, padded"),
        pytest.param(attend(None), 2 * B * L * PROJECTIONS + 4 * B * L * L * E, id="attention"),
        *(
            pytest.param(recur(kind), 2 * B * L * gates * 6 * (4 + 6), id=kind.__name__)
            for kind, gates in GATES.items()
        ),
        pytest.param(
            recur(nn.LSTM, num_layers=2, bidirectional=True),
            2 * B * L * 4 * 6 * 2 * ((4 + 6) + (12 + 6)),
            id="LSTM, deep",
        ),
        pytest.param(recur(nn.LSTM, lengths=[5, 3, 1]), 2 * 9 * 4 * 6 * (4 + 6), id="LSTM, packed"),
        pytest.param(recur(nn.LSTM, backward=True), 3 * 2 * B * L * 24 * (4 + 6), id="LSTM, backward"),
        pytest.param(experts(False), 2 * 10 * 8 * 16, id="experts"),
        pytest.param(experts(True), 3 * 2 * 10 * 8 * 16, id="experts, backward"),
        pytest.param(experts(True, fallback), 3 * 2 * 10 * 8 * 16, id="experts, fallback"),
        pytest.param(convolve(nn.Conv1d, 6, 12, 3), 3 * 2 * B * 7 * 12 * 6 * 3, id="convolution"),
        pytest.param(convolve(nn.Conv1d, 6, 6, 3, groups=6), 3 * 2 * B * 7 * 6 * 3, id="depthwise"),
        pytest.param(
            convolve(nn.ConvTranspose1d, 6, 12, 3, groups=3), 3 * 2 * B * 9 * 6 * 4 * 3, id="transposed"
        ),
        pytest.param(lambda: torch.ones(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5)), 120, id="in place"),
        pytest.param(lambda: torch.ones(3, 4) @ torch.ones(4), 24, id="by a vector"),
        pytest.param(
            lambda: torch.addmv(torch.ones(3), torch.ones(3, 4), torch.ones(4)), 24, id="added to a vector"
        ),
        pytest.param(lambda: torch.ones(7) @ torch.ones(7), 14, id="dot"),
        pytest.param(
            lambda: torch.addbmm(torch.ones(3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 240, id="summed"
        ),
        pytest.param(in_inference_mode, 120 + 240, id="inference mode"),
        pytest.param(branch(False), 64, id="cond, the short branch"),
        pytest.param(branch(True), 2 * 64, id="cond, the long branch"),
    ],
)
def test_by_hand(run, flops):
    assert count_flops(run) == flops


def meta(*shape):
    return torch.empty(*shape, device="meta")


LSTM_WEIGHTS = [meta(24, 4), meta(24, 6), meta(24), meta(24)]
RNN = (LSTM_WEIGHTS, 4, meta(0), meta(1, B, 6), meta(1, B, 6))


@pytest.mark.parametrize(
    "operation, args, result, flops",
    [
        (aten._cudnn_rnn, (meta(L, B, 4), *RNN, 2, 6), None, 2 * B * L * 24 * 10),
        (aten._cudnn_rnn, (meta(9, 4), *RNN, 2, 6), None, 2 * 9 * 24 * 10),  # packed
        (aten._cudnn_rnn_backward, (meta(L, B, 4), *RNN, [True] * 4), None, 2 * 2 * B * L * 24 * 10),
        (aten._cudnn_rnn_backward, (meta(L, B, 4), *RNN, [True, True, True, False]), None, 2 * B * L * 240),
        (aten.miopen_rnn, (meta(L, B, 4), *RNN, 2, 6), None, 2 * B * L * 24 * 10),
        (aten._scaled_grouped_mm, (meta(10, 8), meta(3, 8, 16)), meta(10, 16), 2 * 10 * 8 * 16),
        (aten._grouped_mm, (meta(8, 10), meta(10, 16)), meta(3, 8, 16), 2 * 10 * 8 * 16),
        (aten._grouped_mm, (meta(3, 10, 8), meta(8, 16)), meta(10, 16), 2 * 10 * 8 * 16),
        (aten._grouped_mm, (meta(3, 10, 8), meta(3, 8, 16)), meta(3, 10, 16), 3 * 2 * 10 * 8 * 16),
        (aten._scaled_dot_product_efficient_attention, (meta(2, 4, 5, 8),) * 3, None, 4 * 2 * 4 * 25 * 8),
        (aten._scaled_dot_product_fused_attention_overrideable, (meta(2, 4, 5, 8),) * 3, None, 6400),
        (aten._weight_int8pack_mm, (meta(3, 4), meta(5, 4)), meta(3, 5), 120),
        (aten._addmm_activation, (meta(5), meta(3, 4), meta(4, 5)), meta(3, 5), 120),
    ],
)
def test_operations_of_gpus_by_hand(operation, args, result, flops):
    assert (
        formula_of(operation.default if "default" in operation.overloads() else operation)(
            *args, out_val=result
        )
        == flops
    )


@pytest.mark.parametrize("name", ["gemm_4bit", "gemv_4bit", "int8_scaled_mm", "int8_mixed_scaled_mm"])
@pytest.mark.parametrize("form", ["returned", "with outliers", "out="])
def test_products_of_packed_weights_by_hand(name, form):
    """(2, 3, 4) by a weight of 5·4 numbers, which lie in 10 bytes."""

    class Operation:
        _qualified_op_name = f"bitsandbytes::{name}"

    out = meta(2, 3, 5)
    given = {"returned": {"out_val": out}, "with outliers": {"out_val": (out, None)}}
    given = given.get(form, {"out_val": None, "out": out})
    assert formula_of(Operation())(meta(2, 3, 4), meta(10, 1), [5, 4], **given) == 2 * 6 * 5 * 4


def test_a_product_without_a_formula_is_named_once():
    library = torch.library.Library("ffkernels_test", "FRAGMENT")
    library.define("fused_gemm(Tensor a, Tensor b) -> Tensor")
    library.impl("fused_gemm", lambda a, b: a @ b, "CompositeExplicitAutograd")
    bilinear = nn.Bilinear(2, 3, 4)

    def run():
        torch.ops.ffkernels_test.fused_gemm(torch.ones(2, 3), torch.ones(3, 4))
        bilinear(torch.ones(1, 2), torch.ones(1, 3))
        nn.functional.interpolate(torch.ones(1, 2, 3, 3), 6, mode="bilinear")
        return torch.ones(2, 3) @ torch.ones(3, 4)

    with pytest.warns(notices.FFKernelsNotice, match="has no formula") as said:
        assert count_flops(run) == count_flops(run) == 48
    assert [str(w.message).split()[2] for w in said] == ["aten._trilinear", "ffkernels_test.fused_gemm"]


def test_decompositions_and_distances_are_named():
    square, points = torch.eye(4), torch.ones(30, 4)

    def run():
        torch.linalg.solve(square, square)
        torch.linalg.cholesky(square)
        torch.linalg.matrix_exp(square)
        torch.cdist(points, points)
        torch.linalg.vector_norm(square)
        torch.diagonal(square)

    with pytest.warns(notices.FFKernelsNotice, match="has no formula") as said:
        assert count_flops(run) == 0
    named = [str(w.message).split()[2].split(".")[1] for w in said]
    assert named == ["_euclidean_dist", "_linalg_solve_ex", "linalg_cholesky_ex", "linalg_matrix_exp"]


def test_a_formula_that_is_registered_is_used():
    def double(x):
        return 2 * x

    library = torch.library.Library("ffkernels_test", "FRAGMENT")
    library.define("my_linear(Tensor a) -> Tensor")
    library.impl("my_linear", double, "CompositeExplicitAutograd")
    torch.utils.flop_counter.register_flop_formula(torch.ops.ffkernels_test.my_linear)(
        lambda shape, *, out_shape: 7 * shape[0]
    )
    assert count_flops(lambda: torch.ops.ffkernels_test.my_linear(torch.ones(3))) == 21


def test_what_is_counted_computes_the_same_bits():
    layer = nn.TransformerEncoderLayer(E, H, F, batch_first=True, activation=nn.functional.silu, dropout=0)
    x = torch.randn(B, L, E)
    gradients = []
    for counted in (False, True):
        layer.zero_grad()
        if counted:
            with counter():
                layer(x).square().sum().backward()
        else:
            layer(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_code_is_compiled_after_it_was_counted():
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph.forward(*args)

    model = torch.compile(nn.Linear(4, 5), backend=backend)
    for _ in range(2):
        assert count_flops(lambda: model(torch.ones(3, 4))) == 120
        assert not ran
    model(torch.ones(3, 4))
    assert count_flops(lambda: model(torch.ones(3, 4))) == 120
    model(torch.ones(3, 4))
    assert ran == [1, 1]


def test_a_validation_that_cannot_be_counted_ends_no_training():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model):
        if _get_current_dispatch_mode() is not None:
            raise NotImplementedError("no rule for this mode")
        return model(torch.ones(2, 4)).square().sum()

    ff = FastForward(model, optimizer, loss, FastForwardConfig(interval=1, max_tau=4))
    loss(model).backward()
    with pytest.warns(
        notices.FFKernelsNotice, match="validation loss are not counted: NotImplementedError: no"
    ):
        optimizer.step()
    (stage,) = ff.stages
    assert stage.flops == stage.evaluations * 2 * 20 > 0  # the moves alone
