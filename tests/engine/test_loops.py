"""Fast Forward in the loops that people have: accelerate, loss scaling, accumulation, schedules, averaging.

The loop stays as it was; what counts as a step is what the optimizer really did.
"""

import copy
import itertools

import pytest
import torch
from small_loops import descend
from torch import nn

from ffkernels import FastForward, FastForwardConfig
from ffkernels.stage.program import NO_UPDATE

pytestmark = pytest.mark.filterwarnings(r"ignore:::(peft|transformers)\..*")
EVERY_2 = FastForwardConfig(interval=2, max_tau=64, patience=None)


class Line(nn.Module):
    """One layer that is to become y = 3x − 1, from many steps away."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        return ((self.layer(x) - (3 * x[:, :2] - 1)) ** 2).mean()


def inputs(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model):
    return model(inputs(1000))


def adam_line(**options):
    model = Line()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, **options)


def fast_line():
    model, optimizer = adam_line()
    return model, optimizer, FastForward(model, optimizer, loss_of, EVERY_2)


def plain_steps(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        descend(optimizer, model(inputs(step)))


calls = itertools.count()


def never(model):
    """A loss that no step improves."""
    return float(next(calls))


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")

    def reset():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    reset()
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    reset()


def test_accelerate_with_gradient_accumulation_counts_real_steps(accelerator):
    accelerator = accelerator(gradient_accumulation_steps=3)
    model, inner = adam_line()
    model, optimizer, scheduler = accelerator.prepare(
        model, inner, torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.9**step)
    )
    ff = FastForward(model, optimizer, loss_of, EVERY_2)
    stages = []
    for step in range(12):
        with accelerator.accumulate(model):
            accelerator.backward(model(inputs(step)))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        stages.append(len(ff.stages))
    assert ff.optimizer_steps == 4
    assert stages == [0] * 5 + [1] * 6 + [2]
    assert all(stage.tau > 0 for stage in ff.stages)
    assert ff.stages[1].loss_after == loss_of(model).item()
    assert inner.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**4)


def test_accelerate_without_an_accepted_step_is_the_plain_run(accelerator):
    accelerator = accelerator()
    model, optimizer = accelerator.prepare(*adam_line())
    ff = FastForward(model, optimizer, never, EVERY_2)
    plain_steps(model, optimizer, 7)
    plain, plain_optimizer = adam_line()
    plain_steps(plain, plain_optimizer, 7)
    assert [stage.tau for stage in ff.stages] == [0, 0, 0]
    assert torch.equal(model.layer.weight, plain.layer.weight)


def test_accelerate_saves_and_restores_it_with_everything_else(accelerator, tmp_path):
    accelerator = accelerator()
    model, optimizer = accelerator.prepare(*adam_line())
    ff = FastForward(model, optimizer, loss_of, EVERY_2)
    accelerator.register_for_checkpointing(ff)
    plain_steps(model, optimizer, 3)
    accelerator.save_state(tmp_path)
    plain_steps(model, optimizer, 5, first=3)
    end, stages = copy.deepcopy(model.state_dict()), [(s.optimizer_step, s.tau) for s in ff.stages]
    accelerator.load_state(tmp_path)
    assert (ff.optimizer_steps, len(ff.stages)) == (3, 1)
    plain_steps(model, optimizer, 5, first=3)
    assert [(s.optimizer_step, s.tau) for s in ff.stages] == stages
    assert all(torch.equal(model.state_dict()[name], end[name]) for name in end)


def scaled_step(model, optimizer, scaler, step, overflow=False):
    optimizer.zero_grad()
    scaler.scale(model(inputs(step))).backward()
    if overflow:
        model.layer.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def test_a_step_that_the_scaler_skips_is_none():
    model, optimizer = adam_line()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    ff = FastForward(model, optimizer, loss_of, EVERY_2)
    for step, overflow in enumerate([False, True, True, False, False, True, False]):
        before = copy.deepcopy(model.state_dict())
        counted = ff.optimizer_steps
        scaled_step(model, optimizer, scaler, step, overflow)
        assert ff.optimizer_steps == counted + (not overflow)
        if overflow:
            assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert [stage.optimizer_step for stage in ff.stages] == [2, 4]
    assert all(stage.tau > 0 for stage in ff.stages)
    assert scaler.get_scale() == 2.0


def test_a_step_that_a_fused_optimizer_skips_by_itself_has_nothing_to_repeat():
    model, optimizer = adam_line(fused=True)
    assert optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    ff = FastForward(model, optimizer, loss_of, FastForwardConfig(interval=2, max_tau=64, patience=1))
    for step, overflow in enumerate([False, True, False, False]):
        scaled_step(model, optimizer, scaler, step, overflow)
    assert ff.optimizer_steps == 4, "fused optimizers are called for skipped steps too"
    assert ff.stages[0].stopped_because == NO_UPDATE
    assert ff.stages[1].tau > 0, "a skipped step does not use up patience"


def test_accelerates_own_scaler(accelerator):
    accelerator()
    from accelerate.optimizer import AcceleratedOptimizer

    model, inner = adam_line()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    ff = FastForward(model, optimizer, loss_of, EVERY_2)
    overflows = [False, True, False, False]
    for step, overflow in enumerate(overflows):
        optimizer.zero_grad()
        scaler.scale(model(inputs(step))).backward()
        if overflow:
            model.layer.weight.grad.fill_(torch.inf)
        optimizer.step()
        assert optimizer.step_was_skipped == overflow
    assert ff.optimizer_steps == 3
    assert [stage.optimizer_step for stage in ff.stages] == [2]
    assert ff.stages[0].tau > 0


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedulers_wrap_the_step_and_it_still_counts_once(scheduler_first, recwarn):
    model, optimizer = adam_line()

    def schedule():
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [3])

    scheduler = schedule() if scheduler_first else None
    ff = FastForward(model, optimizer, loss_of, EVERY_2)
    scheduler = scheduler or schedule()
    rates = []
    for step in range(6):
        plain_steps(model, optimizer, 1, first=step)
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert ff.optimizer_steps == 6
    assert [stage.optimizer_step for stage in ff.stages] == [2, 4, 6]
    assert len(set(rates)) > 4
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_two_steps_by_hand_are_two():
    model, optimizer, ff = fast_line()
    model(inputs(0)).backward()
    optimizer.step()
    assert ff.stages == []
    optimizer.step()
    assert ff.optimizer_steps == 2
    assert ff.stages[0].loss_after == loss_of(model).item()


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averages_beside_it_see_the_weights_after_the_stage(use_buffers):
    model, optimizer = adam_line()
    decay = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=decay, use_buffers=use_buffers)
    ff = FastForward(model, optimizer, loss_of, EVERY_2)
    expected = None
    for step in range(4):
        still = average.module.layer.weight.detach().clone()
        plain_steps(model, optimizer, 1, first=step)
        assert torch.equal(average.module.layer.weight, still), "a stage moves the model alone"
        average.update_parameters(model)
        now = model.layer.weight.detach().clone()
        expected = now if expected is None else 0.5 * expected + 0.5 * now
        assert torch.allclose(average.module.layer.weight, expected)
    assert all(stage.tau > 0 for stage in ff.stages)


def test_copies_of_model_and_optimizer_train_on_without_it():
    model, optimizer, ff = fast_line()
    plain_steps(model, optimizer, 1)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert {id(p) for group in twin_optimizer.param_groups for p in group["params"]} == {
        id(p) for p in twin.parameters()
    }
    plain_steps(twin, twin_optimizer, 3, first=1)
    assert (ff.optimizer_steps, ff.stages) == (1, [])
    plain, plain_optimizer = adam_line()
    plain_steps(plain, plain_optimizer, 4)
    assert torch.equal(twin.layer.weight, plain.layer.weight)


def test_bf16_autocast_around_the_loop():
    model, optimizer, ff = fast_line()
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            plain_steps(model, optimizer, 1, first=step)
            if step % 2:
                assert ff.stages[-1].loss_after == loss_of(model).item()
    assert all(stage.tau > 0 for stage in ff.stages)
    assert model.layer.weight.dtype == torch.float32


@pytest.fixture
def lora(tiny_model, padded_batch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama", hidden_size=16, num_attention_heads=2, intermediate_size=32),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    return model, [padded_batch(4, 12, seed=1)]


def train(model, optimizer, batches, steps):
    for _ in range(steps):
        descend(optimizer, model(**batches[0]).loss)


def found(ff, loss):
    """Every stage found steps, and the second one left the model's loss at this."""
    assert all(stage.tau > 0 for stage in ff.stages)
    assert ff.stages[1].loss_after == pytest.approx(loss, rel=1e-5)


def test_lora_plus(lora, own_loss):
    from peft.optimizers import create_loraplus_optimizer

    model, batches = lora
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16)
    ff = FastForward(model, optimizer, batches, EVERY_2)
    train(model, optimizer, batches, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, batches, 1)
    tau = ff.stages[0].tau
    assert tau > 0
    assert ff.stages[0].loss_after == pytest.approx(own_loss(model, batches), rel=1e-5)
    assert ff.trainable_numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # B's rate is 16 times A's, and so is what is repeated; Adam's second step is at most about one rate long.
    for part, rate in (("lora_A", 2e-4), ("lora_B", 16 * 2e-4)):
        moved = [(p.detach() - before[n]).abs().max() for n, p in model.named_parameters() if part in n]
        assert (tau + 1) * rate * 0.5 < max(moved) < (tau + 1) * rate * 1.1


def test_lora_fa_freezes_a_and_so_does_a_stage(lora, own_loss):
    optimizers = pytest.importorskip("peft.optimizers")
    if not hasattr(optimizers, "create_lorafa_optimizer"):
        pytest.skip("this PEFT has no LoRA-FA")
    model, batches = lora
    optimizer = optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" not in n}
    ff = FastForward(model, optimizer, batches, EVERY_2)
    train(model, optimizer, batches, 4)
    assert ff.trainable_numel == sum(p.numel() for n, p in model.named_parameters() if "lora_B" in n)
    found(ff, own_loss(model, batches))
    assert all(torch.equal(dict(model.named_parameters())[n], old) for n, old in frozen.items())


def test_gradient_checkpointing_in_training(lora, own_loss):
    model, batches = lora
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ff = FastForward(model, optimizer, batches, EVERY_2)
    train(model, optimizer, batches, 4)
    found(ff, own_loss(model, batches))
    assert all(module.training for module in model.modules())


def test_a_compiled_step_and_a_compiled_iteration(recwarn):
    torch._dynamo.reset()
    model, optimizer, ff = fast_line()
    step = torch.compile(optimizer.step, backend="eager")
    for n in range(4):
        optimizer.zero_grad()
        model(inputs(n)).backward()
        step()
    plain, plain_optimizer, plain_ff = fast_line()
    plain_steps(plain, plain_optimizer, 4)
    assert ff.optimizer_steps == 4
    assert [stage.tau for stage in ff.stages] == [stage.tau for stage in plain_ff.stages]
    assert torch.allclose(model.layer.weight, plain.layer.weight, rtol=1e-3)  # its sums are reordered

    @torch.compile(backend="eager")
    def iteration(x):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()

    for n in range(4):
        iteration(inputs(n))
    assert ff.optimizer_steps == 8
    assert ff.stages[3].loss_after == loss_of(model).item()
    # Tracing into the hooks would compile anew at every step, since they count.
    assert not [w for w in recwarn if "Dynamo does not know" in str(w.message)]
