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
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft import LoraConfig, get_peft_model, optimizers
from peft.helpers import DoraCaching
from peft.optimizers.fast_forward import FastForward, _linear_search, _parabolic_search

from .testing_utils import torch_device


def _make_model(seed: int = 42, tie_word_embeddings: bool = False, **kwargs):
    torch.manual_seed(seed)
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**size, **layers, pad_token_id=0, tie_word_embeddings=tie_word_embeddings)
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, task_type="CAUSAL_LM", **kwargs)).to(torch_device)


def _examples(number: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    examples = [torch.randint(1, 64, (6 + i,), generator=generator) for i in range(number)]
    for input_ids in examples:
        input_ids[1::2] = 5  # something that can be learned
    return [{"input_ids": input_ids, "labels": input_ids.clone()} for input_ids in examples]


def _collate(examples):
    return {
        key: nn.utils.rnn.pad_sequence([ex[key] for ex in examples], batch_first=True, padding_value=value)
        for key, value in (("input_ids", 0), ("labels", -100))
    }


def _loss(model, seed: int = 1000):
    batch = _collate(_examples(4, seed))
    return model(**{key: value.to(torch_device) for key, value in batch.items()}).loss


def _script(losses):
    """A validation function with given losses, and a list of the weights that it has seen."""
    losses, seen = iter(losses), []

    def validation(model):
        seen.append(_weights(model))
        loss = next(losses)
        if loss is KeyboardInterrupt:
            raise KeyboardInterrupt
        return _loss(model) if loss is None else loss

    return validation, seen


def _create(model, validation=_loss, cls=AdamW, lr=1e-3, interval=2, **kwargs):
    kwargs = {"lr": lr, "validation": validation, "interval": interval, **kwargs}
    return optimizers.create_fast_forward_optimizer(model, cls, **kwargs)


def _train(model, optimizer, steps: int, start: int = 0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        _loss(model, seed=step).backward()
        optimizer.step()
    return optimizer.fast_forward.stages if hasattr(optimizer, "fast_forward") else []


def _weights(model, trainable=True):
    return {n: param.detach().clone() for n, param in model.named_parameters() if param.requires_grad == trainable}


def _assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def _run_search(search, loss_fn, max_tau):
    measured = [0]
    search(lambda tau: measured.append(tau) or loss_fn(tau), loss_fn(0), max_tau)
    return min(measured, key=loss_fn), measured


class TestSearch:
    @pytest.mark.parametrize("minimum", [0, 1, 2, 3, 5, 7, 16, 33, 100, 700, 1023, 1024, 2000])
    def test_search_finds_the_minimum(self, minimum):
        def loss_fn(tau):  # asymmetric, with one minimum
            return (tau - minimum) ** 2 * (1.0 if tau < minimum else 3.0)

        expected = min(minimum, 1024)
        best_tau, measured = _run_search(_linear_search, loss_fn, max_tau=1024)
        assert (best_tau, measured) == (expected, list(range(min(minimum + 1, 1024) + 1)))

        best_tau, measured = _run_search(_parabolic_search, loss_fn, max_tau=1024)
        # the tolerance is 0.1 % of the decrease
        assert loss_fn(best_tau) - loss_fn(expected) <= 1e-3 * (loss_fn(0) - loss_fn(expected))
        assert measured[:2] == [0, 1]
        assert len(measured) <= 26

    @pytest.mark.parametrize("search", [_linear_search, _parabolic_search])
    def test_search_ends_on_any_losses(self, search):
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            losses = torch.rand(65, generator=generator).tolist()
            _, measured = _run_search(search, losses.__getitem__, max_tau=64)
            assert max(measured) <= 64
            assert len(set(measured)) == len(measured)


class TestFastForwardOptimizer:
    @pytest.mark.parametrize("optimizer_cls", [AdamW, SGD, RMSprop])
    @pytest.mark.parametrize("search", ["parabolic", "linear"])
    def test_stages_run_every_interval_steps_and_keep_the_best_weights(self, optimizer_cls, search):
        model = _make_model()
        frozen = _weights(model, trainable=False)
        validation, seen = _script(iter(lambda: None, 0))
        optim = _create(model, validation, optimizer_cls, interval=4, warmup_steps=2, search=search)
        for start, steps in ((0, 6), (6, 4), (10, 4)):
            seen.clear()
            stage = _train(model, optim, steps, start)[-1]
            taus, losses = zip(*stage.losses)
            best = losses.index(min(losses))
            assert (stage.step, taus[0], stage.tau) == (start + steps, 0, taus[best])
            _assert_equal(_weights(model), seen[best])
        assert len(optim.fast_forward.stages) == 3
        assert any(stage.tau > 1 for stage in optim.fast_forward.stages)
        _assert_equal(_weights(model, trainable=False), frozen)

    def test_stages_leave_no_trace(self):
        # Not a single bit may differ from plain AdamW if no repetition is accepted, and apart from the weights also if
        # one is: optimizer state, gradients, training flags (also one that the user has switched off), RNG.
        model, plain_model = _make_model(lora_dropout=0.5), _make_model(lora_dropout=0.5)
        losses, seen = iter([1, 2] * 4 + [3, 2, 1, 4, 5]), set()

        def validation(model):
            torch.rand(3)
            cache = model(torch.ones(1, 1).long().to(torch_device)).past_key_values
            seen.add((any(module.training for module in model.modules()), torch.is_grad_enabled(), cache))
            return next(losses)

        kwargs = {"weight_decay": 0.1, "betas": (0.8, 0.9)}
        optim = _create(model, validation, patience=None, search="linear", **kwargs)
        plain = AdamW([p for p in plain_model.parameters() if p.requires_grad], lr=1e-3, **kwargs)
        assert type(optim) is AdamW
        for start, steps, taus in ((0, 8, [0] * 4), (8, 2, [0] * 4 + [2])):
            tensors, flags = [], []
            for m, o in ((model, optim), (plain_model, plain)):
                m.base_model.model.lm_head.eval()
                torch.manual_seed(start)
                _train(m, o, steps, start)
                params = o.param_groups[0]["params"]
                values = [value for param in params for value in (param.grad, *o.state[param].values())]
                tensors.append(dict(enumerate([*values, torch.get_rng_state()])))
                flags.append([m.config.use_cache, *(module.training for module in m.modules())])
            _assert_equal(*tensors)
            assert flags[0] == flags[1]
            assert [stage.tau for stage in optim.fast_forward.stages] == taus
            if not any(taus):
                _assert_equal(_weights(model), _weights(plain_model))
        assert seen == {(False, False, None)}

    def test_two_copies_of_the_adapter_and_none_of_the_base_model(self):
        # SGD works in place, so all that is allocated in its step is allocated by Fast Forward. The base model is far
        # larger than the adapter, a copy of it would be noticed.
        class Allocations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                known = {t.data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
                new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.data_ptr() not in known]
                made.extend((t.numel(), weakref.ref(t)) for t in new if t.is_floating_point())
                return out

        made = []
        model = _make_model()
        weights = [p for p in model.parameters() if p.requires_grad]
        numel = sum(p.numel() for p in weights)
        assert sum(p.numel() for p in model.parameters()) > 5 * numel
        losses = iter(range(100, 0, -1))
        optim = _create(model, lambda m: next(losses), SGD, search="linear", max_tau=50, foreach=False)
        _loss(model).backward()
        with Allocations():
            optim.step()
        assert made == []
        with Allocations():
            optim.step()
        assert optim.fast_forward.stages[0].tau == 50
        # apart from the two copies, there are only the scalars for the largest update
        assert 2 * numel <= sum(size for size, _ in made) <= 2 * numel + 2 * len(weights) + 2
        assert all(ref() is None for _, ref in made)  # nothing is held until the next step

    @pytest.mark.parametrize(
        "losses, max_tau, measured, tau",
        [
            ([3.0, 2.0, math.nan, 9.0], 2, 3, 1),
            ([3.0, 2.0, math.inf, 9.0], 2, 3, 1),
            ([math.nan, 1.0], 2, 1, 0),
            ([3.0, 2.0, -math.inf, 9.0], 2, 3, 1),
            ([3.0, 2.0, 1.0, 1.5, KeyboardInterrupt], 1024, 4, 2),
            ([3.0, KeyboardInterrupt], 1024, 1, 0),
        ],
    )
    def test_broken_losses_and_interrupts_keep_the_best_weights(self, losses, max_tau, measured, tau):
        model, (validation, seen) = _make_model(), _script(losses)
        optim = _create(model, validation, lr=1e-2, max_tau=max_tau)
        with pytest.raises(KeyboardInterrupt) if KeyboardInterrupt in losses else nullcontext():
            _train(model, optim, steps=2)
        (stage,) = optim.fast_forward.stages
        assert (len(stage.losses), stage.tau) == (measured, tau)
        _assert_equal(_weights(model), seen[[tau for tau, _ in stage.losses].index(tau)])
        assert all(module.training for module in model.modules())
        _train(model, optim, steps=1, start=2)  # training can go on

    @pytest.mark.parametrize(
        "losses, interval, measured",
        [
            (range(1000), 2, [2, 2]),
            # only failures in a row count, losses that are not finite are neither failure nor success
            ([1, 2] + [math.nan] + [2, 1] + [1, 2] + [math.nan] + [1, 2], 1, [2, 1, 2, 2, 1, 2]),
        ],
    )
    def test_patience(self, losses, interval, measured):
        model = _make_model()
        optim = _create(model, _script(losses)[0], lr=1e-2, interval=interval, max_tau=1, patience=2)
        stages = _train(model, optim, steps=10)
        assert [len(stage.losses) for stage in stages] == measured
        assert [stage.step for stage in stages] == [interval * (i + 1) for i in range(len(measured))]

    @pytest.mark.parametrize("checkpoint_step", [3, 4, 7])
    def test_resume_is_exact(self, checkpoint_step):
        model = _make_model()
        optim = _create(model, interval=4)
        _train(model, optim, steps=checkpoint_step)
        state, weights = copy.deepcopy(optim.state_dict()), _weights(model)
        _train(model, optim, steps=12 - checkpoint_step, start=checkpoint_step)

        resumed = _make_model(seed=7)
        resumed.load_state_dict({**model.state_dict(), **weights})
        resumed_optim = _create(resumed, interval=4)
        resumed_optim.load_state_dict(state)
        _train(resumed, resumed_optim, steps=12 - checkpoint_step, start=checkpoint_step)
        _assert_equal(_weights(model), _weights(resumed))

        # a plain optimizer can go on with this state, and Fast Forward with that of a plain optimizer
        plain = AdamW([p for p in resumed.parameters() if p.requires_grad], lr=1e-3)
        optim.load_state_dict(plain.state_dict())
        plain.load_state_dict(state)
        assert _train(model, optim, steps=4)[-1].step == 4

    def test_grad_scaler_that_skips_the_step(self):
        model = _make_model()
        optim = _create(model, interval=1)
        scaler = torch.amp.GradScaler(torch_device, init_scale=4.0)
        before = _weights(model)
        for gradient, steps in ((math.inf, []), (1.0, [1])):
            _assert_equal(_weights(model), before)
            scaler.scale(_loss(model)).backward()
            optim.param_groups[0]["params"][0].grad[0] = gradient
            scaler.step(optim)
            scaler.update()
            optim.zero_grad()
            assert [stage.step for stage in optim.fast_forward.stages] == steps

    @pytest.mark.parametrize("lr, gradient", [(0.0, 0.0), (1e-3, math.nan)])
    def test_update_that_is_zero_or_not_finite_is_not_repeated(self, lr, gradient):
        # e.g. at the start of the warmup, or a fused optimizer that skips the step by itself
        model = _make_model()
        optim = _create(model, cls=SGD, lr=lr, interval=1, patience=1)
        for _ in range(2):  # it is no failure either
            _loss(model, seed=0).backward()
            optim.param_groups[0]["params"][0].grad[0, 0] = gradient
            optim.step()
        assert [stage.losses for stage in optim.fast_forward.stages] == [[], []]

    @pytest.mark.parametrize(
        "context, lora",
        [
            (nullcontext, {}),
            (DoraCaching, {"use_dora": True}),
            # keeps casts of the weights: of the training step's, and of those that were validated last
            (partial(torch.autocast, torch_device, torch.bfloat16), {}),
        ],
    )
    def test_nothing_that_is_cached_outlives_its_weights(self, context, lora):
        model = _make_model(**lora)
        optim = _create(model, lr=3e-2, search="linear")
        for step in range(2):
            with context():
                _train(model, optim, steps=1, start=step)
                with torch.no_grad(), DoraCaching(enabled=False):
                    after = _loss(model.eval()).item()
                model.train()
        (stage,) = optim.fast_forward.stages
        assert stage.tau > 0
        assert stage.losses[-1][0] == stage.tau + 1  # the weights that were validated last are not those kept
        assert len({loss for _, loss in stage.losses}) == len(stage.losses)
        assert after == pytest.approx(dict(stage.losses)[stage.tau], rel=1e-6)

    @pytest.mark.parametrize(
        "factory",
        [
            partial(optimizers.create_loraplus_optimizer, optimizer_cls=AdamW, loraplus_lr_ratio=4),
            # The step of this optimizer calls the one of AdamW: the hooks run for both, but it is one step.
            partial(optimizers.create_riemannian_optimizer, optimizer_cls=AdamW),
            partial(optimizers.create_lorafa_optimizer, r=4, lora_alpha=8),  # freezes lora_A
            lambda model, lr: Accelerator(cpu=torch_device == "cpu").prepare(AdamW(model.parameters(), lr)),
        ],
    )
    def test_existing_optimizers(self, factory):
        model = _make_model()
        optim = factory(model, lr=1e-3)
        fast_forward = FastForward(optim, model, _loss, interval=2)
        frozen = _weights(model, trainable=False)
        _train(model, optim, steps=4)
        assert [stage.step for stage in fast_forward.stages] == [2, 4]
        assert any(stage.tau > 0 for stage in fast_forward.stages)
        _assert_equal(frozen, _weights(model, trainable=False))

    def test_empty_and_bfloat16_parameters(self):
        model = _make_model()
        model.empty = nn.Parameter(torch.empty(0, device=torch_device))
        for matrix in ("lora_A", "lora_B"):
            getattr(model.base_model.model.model.layers[0].self_attn.q_proj, matrix).to(torch.bfloat16)
        with pytest.warns(UserWarning, match="Keep the trainable parameters in float32"):
            optim = _create(model)
        model.empty.grad = torch.empty_like(model.empty)
        assert _train(model, optim, steps=2)[0].tau > 0

    def test_copies_of_the_optimizer_are_plain(self):
        model = _make_model()
        optim = _create(model)
        _train(model, optim, steps=1)
        model_copy, optim_copy = copy.deepcopy((model, optim))
        plain_model, plain = copy.deepcopy((model, optim))
        pickle.dumps(optim)  # the validation function could not be pickled
        FastForward(optim_copy, model_copy, _loss, interval=2)
        for m, o in ((model_copy, optim_copy), (plain_model, plain), (model, optim)):
            _train(m, o, steps=1, start=1)
        assert not hasattr(plain, "fast_forward")
        assert [stage.step for stage in optim.fast_forward.stages] == [2]
        # the copy starts from the state of the original, including the count
        assert optim_copy.fast_forward.stages == optim.fast_forward.stages
        _assert_equal(_weights(model_copy), _weights(model))
        assert any(not torch.equal(p, q) for p, q in zip(_weights(plain_model).values(), _weights(model).values()))

    class AdamWScheduleFree(AdamW):
        train = eval = AdamW.zero_grad

    @pytest.mark.parametrize(
        "kwargs, match",
        [
            ({"interval": 0}, "interval must be an integer >= 1, got 0"),
            ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
            ({"max_tau": 1.5}, "max_tau must be an integer >= 1, got 1.5"),
            ({"patience": 0}, "patience must be an integer >= 1, got 0"),
            ({"search": "golden"}, r"search must be one of \['parabolic', 'linear'\], got 'golden'"),
            ({"validation": []}, r"at least one batch, a dict of tensors as the data collator returns it; got \[\]"),
            ({"validation": [torch.zeros(1)]}, "a dict of tensors"),
            ({"validation": [{"input_ids": [1, 2], "labels": [1, 2]}]}, "a dict of tensors"),
            ({"validation": {"input_ids": None}}, "validation must be a function"),
            ({"cls": AdamWScheduleFree}, "AdamWScheduleFree is a schedule-free optimizer"),
        ],
    )
    def test_raises_for_bad_values(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            _create(_make_model(), **kwargs)

    def test_raises_for_second_fast_forward_and_foreign_or_sharded_parameters(self):
        model, other = _make_model(), _make_model()
        with pytest.raises(ValueError, match="already does Fast Forward"):
            FastForward(_create(model), model, _loss)
        with pytest.raises(ValueError, match="is a trainable parameter of the model"):
            FastForward(AdamW(other.parameters(), lr=1e-3), model, _loss)
        with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got dict"):
            FastForward({}, model, _loss)
        next(p for p in model.parameters() if p.requires_grad).ds_id = 0  # as DeepSpeed ZeRO-3 marks them
        with pytest.raises(ValueError, match="sharded parameters"):
            _create(model)

    def test_loss_of_batches_does_not_depend_on_the_batch_size(self):
        examples, losses = _examples(8), []
        for size in (1, 3, 8):
            batches = [_collate(examples[i : i + size]) for i in range(0, 8, size)]
            ignored = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}  # its mean loss is nan
            model = _make_model()
            optim = _create(model, [*batches, ignored], interval=1, search="linear", max_tau=1)
            losses.append([loss for _, loss in _train(model, optim, steps=1)[0].losses])
        assert losses[1:] == [pytest.approx(losses[0], rel=1e-5)] * 2

    def test_adapters_that_share_memory_are_moved_once(self):
        # the adapters of tied embeddings are different parameters that are views of each other
        tied = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
        model = _make_model(tie_word_embeddings=True, **tied)
        validation, seen = _script([4.0, 3.0, 2.0, 1.0])
        params = [param for param in model.parameters() if param.requires_grad]
        assert len({param.data_ptr() for param in params}) < len(params)
        before = _weights(model)
        optim = _create(model, validation, SGD, lr=1e-2, interval=1, search="linear", max_tau=3)
        assert _train(model, optim, steps=1)[0].tau == 3
        for tau in range(4):
            for name, first in seen[0].items():
                torch.testing.assert_close(seen[tau][name], first + tau * (first - before[name]))

    @pytest.mark.parametrize("labels, match", [({}, "returned no loss"), ({"labels": -100}, "all of them are -100")])
    def test_batches_without_labels(self, labels, match):
        model = _make_model()
        input_ids = _collate(_examples(8))["input_ids"]
        labels = {name: torch.full_like(input_ids, value) for name, value in labels.items()}
        with pytest.raises(ValueError, match=match):
            _train(model, _create(model, [{"input_ids": input_ids, **labels}], interval=1), steps=1)

    @pytest.mark.parametrize("search", ["parabolic", "linear"])
    def test_trainer_and_resuming_from_its_checkpoint(self, search, tmp_path):
        size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": torch_device == "cpu"}
        args = TrainingArguments(str(tmp_path), max_steps=12, save_steps=4, report_to=[], **size)
        ends = []
        for checkpoint, steps in ((None, [3, 6, 9, 12]), (str(tmp_path / "checkpoint-4"), [6, 9, 12])):
            model = _make_model()
            optim = _create(model, [_collate(_examples(24)[16:])], interval=3, search=search)
            trainer = Trainer(model, args, _collate, _examples(16), optimizers=(optim, None))
            trainer.train(resume_from_checkpoint=checkpoint)
            assert [stage.step for stage in optim.fast_forward.stages] == steps
            assert any(stage.tau > 0 for stage in optim.fast_forward.stages)
            ends.append(_weights(model))
        _assert_equal(*ends)
