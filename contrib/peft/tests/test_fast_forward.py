# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import copy
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from peft.optimizers import (
    create_fast_forward_optimizer,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from peft.optimizers.fast_forward import FastForward, _linear_search, _parabolic_search

from .testing_utils import torch_device


class SimpleNet(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embedding = nn.Embedding(100, 20)
        self.layer_norm = nn.LayerNorm(20)
        self.lin0 = nn.Linear(20, 20, bias=bias)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(20, 16, bias=bias)

    def forward(self, X):
        X = self.lin0(self.layer_norm(self.embedding(X)))
        X = self.relu(X)
        X = self.lin1(X)
        return X


def _make_lora_model(seed: int = 42, **kwargs):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["lin0", "lin1"], **kwargs)
    return get_peft_model(SimpleNet(), config).to(torch_device)


def _make_causal_lm(seed: int = 42, tie_word_embeddings: bool = False, **kwargs):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        tie_word_embeddings=tie_word_embeddings,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, task_type="CAUSAL_LM", **kwargs)).to(torch_device)


def _data(seed: int, rows: int = 2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(100, (rows, 10), generator=generator).to(torch_device)
    return x, (x % 16)  # something that can be learned


def _loss(model, seed: int, rows: int = 2):
    x, y = _data(seed, rows)
    return nn.functional.cross_entropy(model(x).permute(0, 2, 1), y)


def _validation(model):
    return _loss(model, seed=1000, rows=8)


def _train(model, optimizer, steps: int, start: int = 0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        _loss(model, seed=step).backward()
        optimizer.step()


def _adapter(model):
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def _assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def _run_search(search, loss_fn, max_tau):
    """Returns the best tau and all that were measured."""
    search = search(max_tau)
    tau, best_tau, best_loss, measured = next(search), 0, math.inf, []
    while True:
        loss = loss_fn(tau)
        measured.append(tau)
        if loss < best_loss:
            best_tau, best_loss = tau, loss
        try:
            tau = search.send(loss)
        except StopIteration:
            return best_tau, measured


class TestSearch:
    @pytest.mark.parametrize("minimum", [0, 1, 2, 7, 33, 64])
    def test_linear_search_takes_one_step_after_the_other(self, minimum):
        best_tau, measured = _run_search(_linear_search, lambda tau: (tau - minimum) ** 2, max_tau=64)
        assert best_tau == minimum
        assert measured == list(range(min(minimum + 1, 64) + 1))

    @pytest.mark.parametrize("minimum", [0, 1, 2, 3, 5, 7, 16, 33, 100, 700, 1023, 1024, 2000])
    def test_parabolic_search_needs_few_losses(self, minimum):
        # asymmetric, with one minimum
        def loss_fn(tau):
            return (tau - minimum) ** 2 * (1.0 if tau < minimum else 3.0)

        best_tau, measured = _run_search(_parabolic_search, loss_fn, max_tau=1024)
        expected = min(minimum, 1024)
        # the tolerance is 0.1 % of the decrease
        assert loss_fn(best_tau) - loss_fn(expected) <= 1e-3 * (loss_fn(0) - loss_fn(expected))
        assert measured[:2] == [0, 1]
        assert len(measured) <= 26
        assert len(set(measured)) == len(measured)

    @pytest.mark.parametrize("search", [_linear_search, _parabolic_search])
    def test_search_is_never_worse_than_the_start_and_ends(self, search):
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            losses = torch.rand(65, generator=generator).tolist()
            best_tau, measured = _run_search(search, losses.__getitem__, max_tau=64)
            assert losses[best_tau] == min(losses[tau] for tau in measured)
            assert max(measured) <= 64


class TestFastForwardOptimizer:
    def test_factory_creates_optimizer(self):
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-3, validation=_validation, weight_decay=0.1, betas=(0.8, 0.9)
        )
        assert type(optim) is torch.optim.AdamW
        assert optim.param_groups[0]["lr"] == 1e-3
        assert optim.param_groups[0]["weight_decay"] == 0.1
        assert optim.param_groups[0]["betas"] == (0.8, 0.9)
        # Only trainable params are in the optimizer (base weights are frozen by LoRA).
        n_optim_params = sum(len(g["params"]) for g in optim.param_groups)
        assert n_optim_params == sum(1 for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
    @pytest.mark.parametrize("search", ["parabolic", "linear"])
    def test_stages_run_every_interval_steps_and_lower_the_loss(self, optimizer_cls, search):
        model = _make_lora_model()
        frozen = {name: param.clone() for name, param in model.named_parameters() if not param.requires_grad}
        optim = create_fast_forward_optimizer(
            model, optimizer_cls, lr=1e-3, validation=_validation, interval=4, warmup_steps=2, search=search
        )
        _train(model, optim, steps=14)
        stages = optim.fast_forward.stages
        assert [stage.step for stage in stages] == [6, 10, 14]
        for stage in stages:
            losses = dict(stage.losses)
            assert stage.losses[0][0] == 0
            assert losses[stage.tau] == min(losses.values())
        assert any(stage.tau > 1 for stage in stages)
        _assert_equal(frozen, {name: p for name, p in model.named_parameters() if not p.requires_grad})

    @pytest.mark.parametrize("search", ["parabolic", "linear"])
    def test_weights_are_those_with_the_best_validated_loss(self, search):
        model = _make_lora_model()
        seen = []

        def validation(model):
            loss = _validation(model)
            seen.append((loss.item(), _adapter(model)))
            return loss

        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-3, validation=validation, interval=5, search=search
        )
        _train(model, optim, steps=5)
        (stage,) = optim.fast_forward.stages
        assert [loss for _, loss in stage.losses] == [loss for loss, _ in seen]
        assert stage.tau > 1
        _, best = min(seen, key=lambda entry: entry[0])
        _assert_equal(_adapter(model), best)

    def test_without_an_accepted_step_it_is_the_plain_optimizer(self):
        # A validation loss that always increases: not a single bit may differ from plain AdamW, including after the
        # stages, i.e. in the optimizer's state.
        model, plain_model = _make_lora_model(lora_dropout=0.5), _make_lora_model(lora_dropout=0.5)
        losses = iter(range(1000))
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-2, validation=lambda model: next(losses), interval=2, patience=None
        )
        plain = torch.optim.AdamW([p for p in plain_model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(0)
        _train(model, optim, steps=8)
        torch.manual_seed(0)
        _train(plain_model, plain, steps=8)
        assert [stage.tau for stage in optim.fast_forward.stages] == [0, 0, 0, 0]
        assert [len(stage.losses) for stage in optim.fast_forward.stages] == [2, 2, 2, 2]
        _assert_equal(_adapter(model), _adapter(plain_model))

    def test_stage_leaves_no_trace(self):
        # training flags (also of a module that was put in eval mode by the user), RNG, gradients, optimizer state
        model = _make_lora_model(lora_dropout=0.5)
        model.base_model.model.layer_norm.eval()
        flags = [module.training for module in model.modules()]
        seen = []

        def validation(model):
            seen.append((any(module.training for module in model.modules()), torch.is_grad_enabled()))
            torch.rand(3)
            return _validation(model)

        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=validation, interval=2)
        _train(model, optim, steps=1)
        optim.zero_grad()
        _loss(model, seed=1).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        reference = copy.deepcopy(optim)
        reference_params = reference.param_groups[0]["params"]
        for param, grad in zip(reference_params, gradients):
            param.grad = grad.clone()
        reference.step()

        rng_state = torch.get_rng_state()
        optim.step()
        assert optim.fast_forward.stages[0].tau > 0
        assert set(seen) == {(False, False)}
        assert [module.training for module in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), rng_state)
        params = optim.param_groups[0]["params"]
        for param, grad, other in zip(params, gradients, reference_params):
            assert torch.equal(param.grad, grad)
            assert param.requires_grad and param.is_leaf
            for key, value in optim.state[param].items():
                assert torch.equal(value, reference.state[other][key])

    def test_two_copies_of_the_adapter_and_none_of_the_base_model(self):
        # SGD works in place, so all that is allocated in its step is allocated by Fast Forward. The base model is far
        # larger than the adapter, a copy of it would be noticed.
        class CountAllocations(TorchDispatchMode):
            numel = 0
            kept = ()

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                known = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
                for t in tree_leaves(out):
                    if isinstance(t, torch.Tensor) and t.is_floating_point() and t.data_ptr() not in known:
                        self.numel += t.numel()
                        self.kept = (*self.kept, weakref.ref(t))
                return out

        model = _make_lora_model()
        weights = [p for p in model.parameters() if p.requires_grad]
        adapter_numel = sum(p.numel() for p in weights)
        assert sum(p.numel() for p in model.parameters()) > 5 * adapter_numel
        losses = iter(range(100, 0, -1))
        optim = create_fast_forward_optimizer(
            model, torch.optim.SGD, lr=1e-3, validation=lambda model: next(losses), interval=2, search="linear",
            max_tau=50, foreach=False,
        )  # fmt: skip
        _loss(model, seed=0).backward()
        with CountAllocations() as first_step:
            optim.step()
        with CountAllocations() as stage:
            optim.step()
        assert optim.fast_forward.stages[0].tau == 50
        assert first_step.numel == 0
        # apart from the two copies, there are only the scalars for the largest update
        scalars = 2 * len(weights) + 2
        assert 2 * adapter_numel <= stage.numel <= 2 * adapter_numel + scalars
        assert len(stage.kept) >= 2 * len(weights)
        assert not any(ref() is not None for ref in stage.kept)  # nothing is held until the next step

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_loss_that_is_not_finite_is_never_accepted(self, bad):
        model, plain_model = _make_lora_model(), _make_lora_model()
        losses = iter([3.0, 2.0, bad, bad, bad, bad])
        seen = []

        def validation(model):
            seen.append(_adapter(model))
            return next(losses)

        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-2, validation=validation, interval=2, max_tau=2
        )
        _train(model, optim, steps=2)
        assert optim.fast_forward.stages[0].tau == 1
        _assert_equal(_adapter(model), seen[1])

        optim = create_fast_forward_optimizer(
            plain_model, torch.optim.AdamW, lr=1e-2, validation=lambda model: bad, interval=2
        )
        _train(plain_model, optim, steps=2)
        assert len(optim.fast_forward.stages[0].losses) == 1
        _assert_equal(_adapter(plain_model), seen[0])

    def test_interrupted_stage_keeps_the_best_weights(self):
        model = _make_lora_model()
        losses = iter([3.0, 2.0, 1.0, 1.5])
        seen = []

        def validation(model):
            seen.append(_adapter(model))
            if len(seen) > 4:
                raise KeyboardInterrupt
            return next(losses)

        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-2, validation=validation, interval=2)
        with pytest.raises(KeyboardInterrupt):
            _train(model, optim, steps=2)
        assert optim.fast_forward.stages[0].tau == 2
        _assert_equal(_adapter(model), seen[2])
        assert all(module.training for module in model.modules())
        _train(model, optim, steps=1, start=2)  # training can go on

    def test_patience(self):
        model = _make_lora_model()
        losses = iter(range(1000))
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-2, validation=lambda model: next(losses), interval=2, patience=2
        )
        _train(model, optim, steps=10)
        assert [stage.step for stage in optim.fast_forward.stages] == [2, 4]
        assert not optim.fast_forward.active

    def test_patience_counts_failures_in_a_row(self):
        model = _make_lora_model()
        failure, success, not_finite = [1.0, 2.0], [2.0, 1.0], [math.nan]
        losses = iter(failure + not_finite + success + failure + not_finite + failure)
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-2, validation=lambda model: next(losses), interval=1, max_tau=1, patience=2
        )
        _train(model, optim, steps=8)
        assert [len(stage.losses) for stage in optim.fast_forward.stages] == [2, 1, 2, 2, 1, 2]
        assert not optim.fast_forward.active

    @pytest.mark.parametrize("checkpoint_step", [3, 4, 7])
    def test_resume_is_exact(self, checkpoint_step):
        def make(model):
            return create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation, interval=4)

        model = _make_lora_model()
        optim = make(model)
        _train(model, optim, steps=checkpoint_step)
        state, weights = copy.deepcopy(optim.state_dict()), _adapter(model)
        _train(model, optim, steps=12 - checkpoint_step, start=checkpoint_step)

        resumed = _make_lora_model(seed=7)
        resumed.load_state_dict({**model.state_dict(), **weights})
        resumed_optim = make(resumed)
        resumed_optim.load_state_dict(state)
        _train(resumed, resumed_optim, steps=12 - checkpoint_step, start=checkpoint_step)
        _assert_equal(_adapter(model), _adapter(resumed))

        # a plain optimizer can go on with this state, and Fast Forward with that of a plain optimizer
        plain = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-3)
        plain.load_state_dict(state)
        plain_state = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3).state_dict()
        optim.load_state_dict(plain_state)
        _train(model, optim, steps=4)
        assert optim.fast_forward.stages[-1].step == 4

    def test_grad_scaler_that_skips_the_step(self):
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation, interval=1)
        scaler = torch.amp.GradScaler(torch_device, init_scale=4.0)
        before = _adapter(model)
        scaler.scale(_loss(model, seed=0)).backward()
        next(p for p in model.parameters() if p.requires_grad).grad[0] = math.inf
        scaler.step(optim)
        scaler.update()
        assert optim.fast_forward.stages == []
        _assert_equal(_adapter(model), before)

        optim.zero_grad()
        scaler.scale(_loss(model, seed=0)).backward()
        scaler.step(optim)
        assert [stage.step for stage in optim.fast_forward.stages] == [1]

    def test_step_that_changes_nothing(self):
        # e.g. a learning rate of 0 at the start of the warmup, or a fused optimizer that skips the step by itself
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=0.0, validation=_validation, interval=1, weight_decay=0.0
        )
        _train(model, optim, steps=1)
        assert optim.fast_forward.stages[0].losses == []

    def test_update_that_is_not_finite_is_not_repeated(self):
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(
            model, torch.optim.SGD, lr=1e-3, validation=lambda model: 1.0, interval=1, patience=1
        )
        _loss(model, seed=0).backward()
        optim.param_groups[0]["params"][0].grad[0, 0] = math.nan
        optim.step()
        assert optim.fast_forward.stages[0].losses == []
        assert optim.fast_forward.active

    def test_step_inside_autocast(self):
        # Autocast keeps casts of the weights: of the training step's, and of those that were validated last.
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=3e-2, validation=_validation, interval=2, search="linear"
        )
        for step in range(2):
            with torch.autocast(torch_device, torch.bfloat16):
                _train(model, optim, steps=1, start=step)
                with torch.no_grad():
                    after = _validation(model).item()
        (stage,) = optim.fast_forward.stages
        assert stage.tau > 0
        assert stage.losses[-1][0] == stage.tau + 1  # the weights that were validated last are not those kept
        assert len({loss for _, loss in stage.losses}) == len(stage.losses)
        assert after == dict(stage.losses)[stage.tau]

    def test_works_with_lr_scheduler_and_accelerate(self):
        from accelerate import Accelerator

        model = _make_lora_model()
        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation, interval=2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optim, total_iters=4)
        accelerator = Accelerator(cpu=torch_device == "cpu")
        model, prepared, scheduler = accelerator.prepare(model, optim, scheduler)
        for step in range(4):
            accelerator.backward(_loss(model, seed=step))
            prepared.step()
            scheduler.step()
            prepared.zero_grad()
        assert [stage.step for stage in optim.fast_forward.stages] == [2, 4]

        # put on the optimizer after it was prepared
        optim.fast_forward.remove()
        fast_forward = FastForward(prepared, model, _validation, interval=2)
        for step in range(2):
            accelerator.backward(_loss(model, seed=step))
            prepared.step()
            prepared.zero_grad()
        assert fast_forward.optimizer is optim
        assert [stage.step for stage in fast_forward.stages] == [2]

    @pytest.mark.parametrize("use_dora", [False, True])
    def test_dora_and_its_cache(self, use_dora):
        model = _make_lora_model(use_dora=use_dora)
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-3, validation=_validation, interval=2, search="linear", max_tau=3
        )
        with DoraCaching():
            _train(model, optim, steps=2)
        (stage,) = optim.fast_forward.stages
        assert stage.tau > 0
        model.eval()
        with torch.no_grad():
            assert _validation(model).item() == pytest.approx(dict(stage.losses)[stage.tau], rel=1e-6)

    def test_other_peft_optimizers(self):
        model = _make_lora_model()
        optim = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
        FastForward(optim, model, _validation, interval=2)
        _train(model, optim, steps=4)
        assert [stage.step for stage in optim.fast_forward.stages] == [2, 4]

        # The step of this optimizer calls the one of AdamW: the hooks run for both, but it is one step.
        model = _make_lora_model()
        optim = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3)
        FastForward(optim, model, _validation, interval=2)
        _train(model, optim, steps=4)
        assert [stage.step for stage in optim.fast_forward.stages] == [2, 4]

        model = _make_lora_model()
        optim = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
        FastForward(optim, model, _validation, interval=2)
        lora_a = {name: param.clone() for name, param in model.named_parameters() if "lora_A" in name}
        _train(model, optim, steps=4)
        assert [stage.step for stage in optim.fast_forward.stages] == [2, 4]
        for name, param in model.named_parameters():
            if "lora_A" in name:
                assert torch.equal(param, lora_a[name])

    def test_empty_parameters(self):
        model = _make_lora_model()
        model.empty = nn.Parameter(torch.empty(0, device=torch_device))
        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation, interval=2)
        model.empty.grad = torch.empty_like(model.empty)
        _train(model, optim, steps=2)
        assert optim.fast_forward.stages[0].tau > 0

    def test_remove(self):
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation, interval=2)
        fast_forward = optim.fast_forward
        _train(model, optim, steps=2)
        fast_forward.remove()
        _train(model, optim, steps=2)
        assert len(fast_forward.stages) == 1
        assert optim.fast_forward is None

    def test_remove_forgets_the_count_and_the_failures(self):
        model = _make_lora_model()
        losses = iter(range(1000))
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-3, validation=lambda model: next(losses), interval=2, patience=1
        )
        keys = torch.optim.AdamW(optim.param_groups[0]["params"], lr=1e-3).param_groups[0].keys()
        _train(model, optim, steps=3)
        first = optim.fast_forward
        assert not first.active
        first.remove()
        assert optim.param_groups[0].keys() == keys
        second = FastForward(optim, model, _validation, interval=2, patience=1)
        first.remove()  # this one is off already
        assert optim.fast_forward is second
        _train(model, optim, steps=2, start=3)
        assert [stage.step for stage in second.stages] == [2]
        assert second.stages[0].tau > 0

    def test_copies_of_the_optimizer_are_plain(self):
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation, interval=2)
        _train(model, optim, steps=1)
        model_copy, optim_copy = copy.deepcopy((model, optim))
        plain_model, plain = copy.deepcopy((model, optim))
        pickle.dumps(optim)  # the validation function could not be pickled
        FastForward(optim_copy, model_copy, _validation, interval=2)
        for m, o in ((model_copy, optim_copy), (plain_model, plain), (model, optim)):
            _train(m, o, steps=1, start=1)
        assert not hasattr(plain, "fast_forward")
        assert [stage.step for stage in optim.fast_forward.stages] == [2]
        # the copy starts from the state of the original, including the count
        assert optim_copy.fast_forward.stages == optim.fast_forward.stages
        _assert_equal(_adapter(model_copy), _adapter(model))
        assert any(not torch.equal(p, q) for p, q in zip(_adapter(plain_model).values(), _adapter(model).values()))

    def test_schedule_free_optimizers_are_refused(self):
        class AdamWScheduleFree(torch.optim.AdamW):
            def train(self):
                pass

            def eval(self):
                pass

        with pytest.raises(ValueError, match="AdamWScheduleFree is a schedule-free optimizer"):
            create_fast_forward_optimizer(_make_lora_model(), AdamWScheduleFree, lr=1e-3, validation=_validation)

    def test_bfloat16_parameters_warn(self):
        model = _make_lora_model().to(torch.bfloat16)
        with pytest.warns(UserWarning, match="Keep the trainable parameters in float32"):
            optim = create_fast_forward_optimizer(
                model, torch.optim.AdamW, lr=1e-2, validation=_validation, interval=2
            )
        _train(model, optim, steps=2)
        assert len(optim.fast_forward.stages) == 1

    @pytest.mark.parametrize(
        "kwargs, match",
        [
            ({"interval": 0}, "interval must be an integer >= 1, got 0"),
            ({"warmup_steps": -1}, "warmup_steps"),
            ({"max_tau": 1.5}, "max_tau"),
            ({"patience": 0}, "patience"),
            ({"search": "golden"}, r"search must be one of \['parabolic', 'linear'\], got 'golden'"),
            ({"validation": []}, "at least one batch"),
            ({"validation": [torch.zeros(1)]}, "each batch must be a dict"),
            ({"validation": [{"input_ids": [1, 2], "labels": [1, 2]}]}, "must contain tensors"),
        ],
    )
    def test_raises_for_bad_values(self, kwargs, match):
        kwargs = {"validation": _validation, **kwargs}
        with pytest.raises(ValueError, match=match):
            create_fast_forward_optimizer(_make_lora_model(), torch.optim.AdamW, lr=1e-3, **kwargs)

    def test_raises_for_wrong_types(self):
        model = _make_lora_model()
        with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer"):
            create_fast_forward_optimizer(model, dict, lr=1e-3, validation=_validation)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="validation must be a function"):
            create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation={"input_ids": None})
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="did not find any trainable parameters"):
            create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation)

    def test_raises_for_second_fast_forward_and_foreign_or_sharded_parameters(self):
        model = _make_lora_model()
        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation)
        with pytest.raises(ValueError, match="already does Fast Forward"):
            FastForward(optim, model, _validation)

        other = torch.optim.AdamW(_make_lora_model().parameters(), lr=1e-3)
        with pytest.raises(ValueError, match="is a trainable parameter of the model"):
            FastForward(other, model, _validation)

        next(p for p in model.parameters() if p.requires_grad).ds_id = 0  # as DeepSpeed ZeRO-3 marks them
        with pytest.raises(ValueError, match="sharded parameters"):
            create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=_validation)


class TestFastForwardCausalLM:
    @staticmethod
    def _examples(number: int = 8):
        generator = torch.Generator().manual_seed(0)
        examples = []
        for index in range(number):
            length = 6 + index
            input_ids = torch.randint(1, 64, (length,), generator=generator)
            input_ids[1::2] = 5  # something that can be learned
            examples.append({"input_ids": input_ids, "labels": input_ids.clone()})
        return examples

    @staticmethod
    def _collate(examples):
        return {
            key: nn.utils.rnn.pad_sequence([ex[key] for ex in examples], batch_first=True, padding_value=value)
            for key, value in (("input_ids", 0), ("labels", -100))
        }

    def test_loss_of_batches_does_not_depend_on_the_batch_size(self):
        examples = self._examples()
        losses = []
        for batch_size in (1, 3, 8):
            model = _make_causal_lm()
            batches = [self._collate(examples[i : i + batch_size]) for i in range(0, 8, batch_size)]
            optim = create_fast_forward_optimizer(
                model, torch.optim.AdamW, lr=1e-3, validation=batches, interval=1, search="linear", max_tau=1
            )
            model(**{k: v.to(torch_device) for k, v in self._collate(examples).items()}).loss.backward()
            optim.step()
            losses.append([loss for _, loss in optim.fast_forward.stages[0].losses])
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert losses[2] == pytest.approx(losses[0], rel=1e-5)

    def test_adapters_that_share_memory_are_moved_once(self):
        # the adapters of tied embeddings are different parameters that are views of each other
        model = _make_causal_lm(
            tie_word_embeddings=True, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
        )
        params = [param for param in model.parameters() if param.requires_grad]
        assert len({param.data_ptr() for param in params}) < len(params)
        batch = {k: v.to(torch_device) for k, v in self._collate(self._examples()).items()}
        seen, losses = [], iter([4.0, 3.0, 2.0, 1.0])

        def validation(model):
            seen.append([param.detach().clone() for param in params])
            return next(losses)

        optim = create_fast_forward_optimizer(
            model, torch.optim.SGD, lr=1e-2, validation=validation, interval=2, search="linear", max_tau=3
        )
        for _ in range(2):
            optim.zero_grad()
            model(**batch).loss.backward()
            before = [param.detach().clone() for param in params]
            optim.step()
        assert optim.fast_forward.stages[0].tau == 3
        for tau in range(4):
            for weight, first, old in zip(seen[tau], seen[0], before):
                torch.testing.assert_close(weight, first + tau * (first - old))

    def test_batch_without_targets_counts_nothing(self):
        losses = []
        for number in (1, 2):
            model = _make_causal_lm()
            batch = self._collate(self._examples())
            ignored = {**batch, "labels": torch.full_like(batch["labels"], -100)}  # its mean loss is nan
            optim = create_fast_forward_optimizer(
                model, torch.optim.AdamW, lr=1e-3, validation=[batch, ignored][:number], interval=1, max_tau=4
            )
            model(**{k: v.to(torch_device) for k, v in batch.items()}).loss.backward()
            optim.step()
            losses.append(optim.fast_forward.stages[0].losses)
        assert losses[0] == losses[1]
        assert all(math.isfinite(loss) for _, loss in losses[0])

    def test_no_kv_cache_during_a_stage(self):
        model = _make_causal_lm()
        batch = {k: v.to(torch_device) for k, v in self._collate(self._examples()).items()}
        assert model.config.use_cache
        caches = []

        def validation(model):
            output = model(**batch)
            caches.append(output.past_key_values)
            return output.loss

        optim = create_fast_forward_optimizer(model, torch.optim.AdamW, lr=1e-3, validation=validation, interval=1)
        model(**batch).loss.backward()
        optim.step()
        assert len(caches) > 1 and set(caches) == {None}
        assert model.config.use_cache

    def test_batches_without_labels(self):
        model = _make_causal_lm()
        batch = self._collate(self._examples())
        optim = create_fast_forward_optimizer(
            model, torch.optim.AdamW, lr=1e-3, validation=[{"input_ids": batch["input_ids"]}], interval=1
        )
        model(**{k: v.to(torch_device) for k, v in batch.items()}).loss.backward()
        with pytest.raises(ValueError, match="The model returned no loss"):
            optim.step()

        optim.fast_forward.remove()
        batch["labels"].fill_(-100)
        FastForward(optim, model, [batch], interval=1)
        with pytest.raises(ValueError, match="all of them are -100"):
            optim.step()

    @pytest.mark.parametrize("search", ["parabolic", "linear"])
    def test_trainer_and_resuming_from_its_checkpoint(self, search, tmp_path):
        examples = self._examples(number=24)
        validation = [self._collate(examples[16:])]

        def make_trainer(output_dir):
            model = _make_causal_lm()
            optim = create_fast_forward_optimizer(
                model, torch.optim.AdamW, lr=1e-3, validation=validation, interval=3, search=search
            )
            args = TrainingArguments(
                output_dir=str(output_dir),
                max_steps=12,
                save_steps=4,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                lr_scheduler_type="constant",
                report_to=[],
                disable_tqdm=True,
                use_cpu=torch_device == "cpu",
                logging_steps=100,
            )
            return Trainer(
                model=model,
                args=args,
                train_dataset=examples[:16],
                data_collator=self._collate,
                optimizers=(optim, None),
            )

        trainer = make_trainer(tmp_path)
        trainer.train()
        fast_forward = getattr(trainer.optimizer, "optimizer", trainer.optimizer).fast_forward
        assert [stage.step for stage in fast_forward.stages] == [3, 6, 9, 12]
        assert any(stage.tau > 0 for stage in fast_forward.stages)

        resumed = make_trainer(tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        fast_forward = getattr(resumed.optimizer, "optimizer", resumed.optimizer).fast_forward
        assert [stage.step for stage in fast_forward.stages] == [6, 9, 12]
        _assert_equal(_adapter(trainer.model), _adapter(resumed.model))
