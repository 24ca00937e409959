"""The meter against FLOPs counted by hand, and that measuring leaves no trace."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ffkernels.reporting.flops import FlopMeter, count_flops
from ffkernels.stage.record import Stage

ROWS, IN, HIDDEN, OUT = 5, 3, 7, 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_attention_is_counted_on_the_cpu(masked, grad, kv_heads):
    batch, heads, queries, keys, width = 2, 4, 6, 6, 8
    q = torch.randn(batch, heads, queries, width, requires_grad=grad)
    k, v = (torch.randn(batch, kv_heads, keys, width, requires_grad=grad) for _ in range(2))
    mask = torch.zeros(batch, 1, queries, keys) if masked else None

    def attend():
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=kv_heads != heads
        )
        if grad:
            out.sum().backward()

    product = 2 * batch * heads * queries * keys * width
    assert count_flops(attend) == product * (2 + 5 * grad)


def test_attention_spelled_out_costs_the_same():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    fused = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v))
    assert fused == count_flops(lambda: (q @ k.transpose(-1, -2)).softmax(-1) @ v)


class LowRank(nn.Module):
    """A frozen layer with a low-rank path, dropout and a running mean: all that measuring might touch."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(IN, OUT).requires_grad_(False)
        self.down = nn.Linear(IN, HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, OUT, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(OUT)

    def forward(self, x):
        return self.norm(self.base(x) + self.up(self.dropout(self.down(x))))


def loss_of(model, batch):
    return model(batch["x"]).square().sum()


def test_a_batch_by_hand():
    torch.manual_seed(0)
    model, meter = LowRank(), FlopMeter(IN * HIDDEN + HIDDEN * OUT)
    cost = meter.training_step(model, {"x": torch.randn(ROWS, IN)}, loss_of)
    base, down, up = 2 * ROWS * IN * OUT, 2 * ROWS * IN * HIDDEN, 2 * ROWS * HIDDEN * OUT
    # Backward: the weight gradients of down and up, and up's input gradient; the base gets none, nor x.
    assert cost.measured == base + down + up + (down + up + up)
    assert cost.paper == 3 * (base + down + up)
    assert meter.totals == {"paper": cost.paper, "measured": cost.measured}


def test_the_paper_flatters_where_the_base_is_frozen():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model.requires_grad_(False)[0].weight.requires_grad_()
    meter = FlopMeter(64 * 64)
    cost = meter.training_step(model, torch.randn(4, 64), lambda m, x: m(x).sum())
    layer = 2 * 4 * 64 * 64
    assert cost.paper == 9 * layer
    assert cost.measured == (3 + 2 + 1) * layer


def test_measuring_leaves_no_trace():
    torch.manual_seed(0)
    model = LowRank()
    model.base.eval()  # modes are per module; dropout stays on and draws
    model.down.weight.grad = torch.full_like(model.down.weight, 3.0)
    fired = []
    model.down.weight.register_post_accumulate_grad_hook(fired.append)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()

    FlopMeter(1).training_step(model, {"x": torch.linspace(-1, 1, ROWS * IN).view(ROWS, IN)}, loss_of)

    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.down.weight.grad, torch.full_like(model.down.weight, 3.0))
    assert model.up.weight.grad is None and model.base.weight.grad is None
    assert not fired
    loss_of(model, {"x": torch.ones(ROWS, IN)}).backward()
    assert len(fired) == 1  # the hook is back


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_is_counted(reentrant):
    first, second = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8)

    def loss_fn(model, x):
        return model[1](checkpoint(model[0], x.requires_grad_(), use_reentrant=reentrant)).sum()

    cost = FlopMeter(0).training_step(nn.Sequential(first, second), torch.ones(4, 8), loss_fn)
    layer = 2 * 4 * 8 * 8
    assert cost.paper == 3 * 2 * layer
    assert cost.measured == (2 + 1 + 4) * layer  # forward, the first layer again, two gradients of each


def test_measuring_leaves_no_trace_when_the_model_raises():
    class Breaks(LowRank):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("out of memory")

    model, random = Breaks(), torch.get_rng_state()
    running = model.norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="out of memory"):
        FlopMeter(1).training_step(model, {"x": torch.ones(ROWS, IN)}, loss_of)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.norm.running_mean, running)


def test_a_shape_is_measured_once():
    calls = []

    def loss_fn(model, batch):
        calls.append(batch["x"].shape)
        return model(batch["x"]).sum()

    model, meter = nn.Linear(IN, OUT), FlopMeter(0)
    small, large = ({"x": torch.randn(rows, IN)} for rows in (2, 4))
    costs = [meter.training_step(model, batch, loss_fn) for batch in (small, large, small, large, small)]
    assert calls == [(2, IN), (4, IN)]
    assert costs[1].paper == 2 * costs[0].paper and costs[2:] == [costs[0], costs[1], costs[0]]
    assert meter.paper == 3 * costs[0].paper + 2 * costs[1].paper
    meter.training_step(model, {"x": torch.randn(2, IN), "more": torch.ones(2)}, loss_fn)
    assert len(calls) == 3


def test_optimizer_steps_cost_twelve_per_weight_in_measured_only():
    meter = FlopMeter(1000)
    meter.optimizer_step()
    meter.optimizer_step()
    assert meter.totals == {"paper": 0, "measured": 24_000}


def test_a_stage_by_hand():
    losses = [(0, 3.0), (1, 2.0), (2, 2.5)]
    meter = FlopMeter(100)
    meter.stage(Stage(6, tau=1, losses=losses, flops=3 * 5000 + 3 * 2 * 100))
    assert meter.totals == {"paper": 3 * 5000 + 3 * 100, "measured": 3 * 5000 + 3 * 200}
    meter.stage(Stage(12))  # nothing to search
    meter.stage(Stage(18, losses=losses))  # interrupted
    assert meter.totals == {"paper": 15_300, "measured": 15_600}


def test_a_stage_of_a_loop_that_moves_other_weights():
    meter = FlopMeter(100)
    meter.stage(Stage(6, tau=2, losses=[(1, 3.0), (2, 2.0)], flops=2 * (5000 + 2 * 700)), moved=700)
    assert meter.totals == {"paper": 2 * (5000 + 700), "measured": 2 * (5000 + 1400)}


def test_a_stage_of_other_weights_is_refused():
    with pytest.raises(ValueError, match="trainable_numel"):
        FlopMeter(1000).stage(Stage(6, losses=[(0, 1.0)], flops=10))


def test_state_continues_the_totals():
    meter = FlopMeter(10)
    meter.optimizer_step()
    again = FlopMeter(10)
    again.load_state_dict(meter.state_dict())
    again.optimizer_step()
    assert again.totals == {"paper": 0, "measured": 240}
    with pytest.raises(ValueError, match=r"\['measured'\]"):
        again.load_state_dict({"paper": 1})


def test_wrong_input_is_named():
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="trainable_numel"):
            FlopMeter(wrong)

    class NoLoss(nn.Linear):
        def forward(self, x):
            return type("Output", (), {"loss": None})

    with pytest.raises(ValueError, match="labels"):
        FlopMeter(1).training_step(NoLoss(2, 2), {"x": torch.ones(1, 2)})
