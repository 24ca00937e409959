"""FastForwardCallback in real transformers Trainers, on a model of a few thousand weights."""

import copy
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from ffkernels import FastForward, FastForwardCallback, FastForwardConfig, ValidationLoss
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.reporting.flops import FlopMeter
from ffkernels.stage.program import NO_UPDATE
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.tasks import collate, load_file

AUTO = FastForwardConfig(learning_rate="auto", interval=None)
EVERY_3 = FastForwardConfig(interval=3, max_tau=16, patience=None)
COLLATE = partial(collate, pad_token_id=256)
EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture(scope="module")
def parts(small):
    model, tokenizer = load_model(small["model"])
    task = load_file(small["data"], tokenizer, max_length=16, test_examples=16, validation_examples=8)
    return model, task


@pytest.fixture
def make(parts, arguments):
    """A Trainer of a fresh copy of the model, always the same one."""
    base, task = parts
    data = {"train_dataset": task.train, "eval_dataset": task.validation, "data_collator": COLLATE}

    def make(*callbacks, cls=Trainer, dropout=0.1, **options):
        model = add_adapter(copy.deepcopy(base), rank=4, dropout=dropout, seed=0)
        given = {name: options.pop(name, default) for name, default in data.items()}
        args = TrainingArguments(**{**arguments, **options})
        return cls(model, args, callbacks=list(callbacks) or None, **given)

    return make


def logged(trainer, key="ff/tau"):
    return [entry for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "lr_scheduler_type": "cosine"},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["accumulated", "grouped by length"],
)
def test_a_run_that_never_accepts_a_step_is_the_plain_run_bit_for_bit(make, weights, equal, rising, options):
    plain = make(**options)
    plain.train()
    callback = FastForwardCallback(rising(), FastForwardConfig(interval=2, patience=None))
    trainer = make(callback, **options)
    trainer.train()
    assert [stage.optimizer_step for stage in callback.stages] == [2, 4, 6]
    assert [stage.tau for stage in callback.stages] == [0, 0, 0]
    assert equal(weights(plain), weights(trainer))
    theirs = [e["loss"] for e in plain.state.log_history if "loss" in e]
    assert theirs == [e["loss"] for e in trainer.state.log_history if "loss" in e]
    callback = FastForwardCallback(config=EVERY_3)
    make(callback, **options).train()
    assert callback.stages[0].tau > 0


@pytest.mark.parametrize("way", ["callbacks", "class", "add_callback"])
def test_one_line_is_enough(make, way):
    given = {"callbacks": [FastForwardCallback()], "class": [FastForwardCallback], "add_callback": []}
    trainer = make(*given[way])
    if way == "add_callback":
        trainer.add_callback(FastForwardCallback())
    trainer.train()
    (entry,) = logged(trainer)
    assert entry["step"] == 6 and entry["ff/tau"] > 0
    assert entry["ff/val_loss_after"] < entry["ff/val_loss_before"]


def test_it_does_what_fast_forward_on_the_optimizer_does(make, parts, weights, equal):
    validation = parts[1].validation
    options = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}
    callback = FastForwardCallback(validation, EVERY_3)
    trainer = make(callback, **options)
    trainer.train()

    other = make(**options)
    other.create_optimizer()
    with FastForward(other.model, other.optimizer, [COLLATE(validation)], EVERY_3) as ff:
        other.train()
    assert [s.losses for s in callback.stages] == [s.losses for s in ff.stages]
    assert len(ff.stages) == 2 and ff.stages[0].tau > 0
    assert equal(weights(trainer), weights(other))


def test_the_stage_runs_after_the_gradients_are_freed_and_before_a_save_or_an_evaluation(make):
    gradients, stages = [], []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            stages.append(len(callback.stages))

    def loss(model):
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        return 0.0

    callback = FastForwardCallback(loss, EVERY_3)
    trainer = make(callback, Watch(), max_steps=3)
    trainer.train()
    assert stages == [0, 0, 0] and len(callback.stages) == 1
    assert gradients and not any(gradients)


SCHEDULERS = {
    "linear": {},
    "constant_with_warmup": {},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-5},
}
QUICK = list(SCHEDULERS)[:3]


@pytest.mark.parametrize(
    "scheduler",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS],
)
def test_every_scheduler_goes_its_own_way(make, scheduler):
    options = {"lr_scheduler_type": scheduler, "lr_scheduler_kwargs": SCHEDULERS[scheduler]}
    options |= {"warmup_steps": 2, "logging_steps": 1}
    plain, callback = make(**options), FastForwardCallback(config=EVERY_3)
    plain.train()
    trainer = make(callback, **options)
    trainer.train()
    assert [s.optimizer_step for s in callback.stages] == [3, 6]
    rates = [e["learning_rate"] for e in logged(trainer, "learning_rate")]
    assert rates == [e["learning_rate"] for e in logged(plain, "learning_rate")] and len(rates) == 7


def test_reduce_on_plateau_sees_the_loss_of_the_moved_weights(make):
    callback = FastForwardCallback(config=EVERY_3)
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"}
    trainer = make(callback, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=8, **schedule)
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in logged(trainer, "eval_loss")}
    for stage in callback.stages:  # all 8 examples are in both, weighted by tokens in both
        assert evaluated[stage.optimizer_step] == pytest.approx(stage.loss_after, rel=1e-4)
    assert callback.stages[0].tau > 0


def test_the_steps_own_log_stays_due_when_a_stage_logs(make):
    trainer = make(FastForwardCallback(config=EVERY_3), logging_steps=3)
    trainer.train()
    assert [e["step"] for e in logged(trainer)] == [3, 6]
    assert [e["step"] for e in logged(trainer, "loss")] == [3, 6]


def test_resuming_continues_bit_for_bit_and_keeps_the_callback(make, parts, weights, equal):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9}
    options |= {"lr_scheduler_type": "cosine", "logging_steps": 1}
    validation = parts[1].validation
    through = FastForwardCallback(validation, EVERY_3)
    whole = make(through, **options)
    whole.train()
    assert [s.tau > 0 for s in through.stages].count(True) >= 2
    for restored in (False, True):  # with False the Trainer does not restore callbacks: they do it themselves
        callback = FastForwardCallback(validation, EVERY_3)
        trainer = make(callback, restore_callback_states_from_checkpoint=restored, **options)
        trainer.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))
        assert [s.losses for s in callback.stages] == [s.losses for s in through.stages]
        assert equal(weights(trainer), weights(whole))
        assert callback in trainer.callback_handler.callbacks
        assert callback.flops == through.flops and callback.stage_flops == through.stage_flops
        assert logged(trainer, "ff/stages")[0]["ff/stages"] == 3


def test_the_state_in_a_checkpoint_is_json_and_makes_a_callback_again(make, tmp_path):
    callback = FastForwardCallback(config=EVERY_3)
    trainer = make(callback, save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train()
    saved = json.loads((tmp_path / "out/checkpoint-3/trainer_state.json").read_text())
    state = saved["stateful_callbacks"]["FastForwardCallback"]
    assert state["attributes"]["saved"]["fast_forward"]["optimizer_steps"] == 3
    again = FastForwardCallback.from_state(state)
    assert again is not callback and again.saved["flops"] == callback.flops


def test_a_checkpoint_of_a_plain_run_is_continued_with_a_notice_and_can_be_saved(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    make(max_steps=2, **options).train()
    callback = FastForwardCallback(config=EVERY_3)
    trainer = make(callback, max_steps=4, **options)
    with pytest.warns(FFKernelsNotice, match="from a checkpoint without a Fast Forward state"):
        trainer.train(resume_from_checkpoint=True)
    assert [s.optimizer_step for s in callback.stages] == [3]  # counted as the Trainer counts
    assert (tmp_path / "out/checkpoint-4/trainer_state.json").is_file()


def test_training_again_begins_anew(make):
    callback = FastForwardCallback(config=EVERY_3)
    trainer = make(callback, max_steps=3)
    trainer.train()
    first = callback.flops["measured"] - callback.stage_flops["measured"]
    trainer.train()
    assert [s.optimizer_step for s in callback.stages] == [3]
    assert callback.flops["measured"] - callback.stage_flops["measured"] == first
    assert callback.ff is None and "training_step" not in vars(trainer)


def test_the_best_model_at_the_end_is_the_one_with_the_moved_weights(make):
    callback = FastForwardCallback(config=EVERY_3)
    trainer = make(callback, max_steps=8, learning_rate=3e-3, load_best_model_at_end=True, **EACH_STEP)
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in logged(trainer, "eval_loss")}
    best = min(losses, key=losses.get)
    assert trainer.state.best_global_step == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    for stage in callback.stages:
        assert losses[stage.optimizer_step] == pytest.approx(stage.loss_after, rel=1e-4)


def test_early_stopping_stops(make, rising):
    callback = FastForwardCallback(rising(), EVERY_3)
    stopping = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)
    best = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    trainer = make(callback, stopping, max_steps=30, **best, **EACH_STEP)
    trainer.train()
    assert trainer.state.global_step == 3 and len(callback.stages) == 1
    assert logged(trainer, "ff/stages")[0]["ff/stages"] == 1


def test_after_an_exception_it_lets_go_or_begins_anew(make):
    class Broken(Trainer):
        broken = True

        def training_step(self, *args, **kwargs):
            if self.broken and self.state.global_step == 4:
                raise ZeroDivisionError
            return super().training_step(*args, **kwargs)

    callback = FastForwardCallback(config=EVERY_3)
    trainer = make(callback, cls=Broken)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert callback.ff is not None and len(callback.stages) == 1
    trainer.broken = False
    trainer.train()
    assert [s.optimizer_step for s in callback.stages] == [3, 6]

    trainer.broken = True
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    optimizer = callback.ff.optimizer
    callback.detach()
    assert callback.ff is None and "training_step" not in vars(trainer)
    FastForward(trainer.model, optimizer, lambda model: 0.0).detach()  # nothing is in its way


def test_bf16_autocast_is_in_the_validation_too(make):
    callback = FastForwardCallback(config=EVERY_3)
    full = FastForwardCallback(config=EVERY_3)
    make(full, max_steps=3, dropout=0.0).train()
    make(callback, max_steps=3, dropout=0.0, bf16=True).train()
    stage, exact = callback.stages[0], full.stages[0]
    assert stage.tau > 0
    assert stage.loss_before != exact.loss_before
    assert stage.loss_before == pytest.approx(exact.loss_before, abs=0.05)


@pytest.mark.parametrize(
    ("optim", "skips", "stages", "logs"),
    [
        ("adamw_torch", [False, False, True, True, False, False], [3], [5]),
        ("adamw_torch_fused", [False] * 6, [3, 6], [3, 6]),
    ],
)
def test_a_step_that_loss_scaling_skips_neither_counts_nor_starts_a_stage(
    make, rising, optim, skips, stages, logs
):
    """Six steps; the third and fourth backward pass overflow. A fused optimizer skips by itself."""
    callback, skipped = FastForwardCallback(rising(), EVERY_3), []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            skipped.append(optimizer.step_was_skipped)

    trainer = make(callback, Watch(), max_grad_norm=0.0, max_steps=6, optim=optim)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    backward = iter(range(1, 100))
    weight.register_hook(lambda g: torch.full_like(g, math.inf) if next(backward) in (3, 4) else g)
    trainer.train()
    assert skipped == skips
    assert [s.optimizer_step for s in callback.stages] == stages
    assert [e["step"] for e in logged(trainer)] == logs
    if len(stages) == 2:
        assert callback.stages[0].stopped_because == NO_UPDATE and callback.stages[0].losses == []
        assert "ff/val_loss_before" not in logged(trainer)[0] and logged(trainer)[0]["ff/tau"] == 0


def test_validation_comes_from_many_places(make, parts):
    datasets = pytest.importorskip("datasets")
    task = parts[1]
    validation = task.validation
    table = datasets.Dataset.from_list([{**e, "text": "not the model's"} for e in validation])
    given = {
        "list": validation,
        "dataset": table,
        "iterable": table.to_iterable_dataset(),
        "batches": [COLLATE(validation[:4]), COLLATE(validation[4:])],
        "one batch": COLLATE(validation),
        "loader": torch.utils.data.DataLoader(validation, 4, collate_fn=COLLATE),
        "eval_dataset": None,
    }
    given = {name: FastForwardCallback(one) for name, one in given.items()}
    given["eval_dataset's first"] = FastForwardCallback(examples=8)
    given["dict of datasets"] = FastForwardCallback()
    evaluated = {"eval_dataset's first": validation + task.test, "dict of datasets": {"a": table, "b": table}}
    losses = {}
    for name, callback in given.items():
        options = {"eval_dataset": evaluated[name]} if name in evaluated else {}
        make(callback, max_steps=6, **options).train()
        losses[name] = callback.stages[0].loss_before
    assert losses["list"] == pytest.approx(losses["batches"], rel=1e-6)
    assert all(loss == pytest.approx(losses["list"], rel=1e-6) for loss in losses.values()), losses

    callback = FastForwardCallback(examples=3)
    make(callback, max_steps=6).train()
    assert callback.stages[0].loss_before != losses["list"]


def test_examples_with_several_labels_each_are_collated(arguments):
    class Tagger(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x, labels=None):
            assert x.ndim == 2, "a batch"
            logits = self.head(x)
            return {"loss": torch.nn.functional.mse_loss(logits, labels), "logits": logits}

    examples = [{"x": torch.full((3,), float(i)), "labels": torch.ones(4)} for i in range(8)]
    callback = FastForwardCallback(config=EVERY_3)
    args = TrainingArguments(**{**arguments, "max_steps": 3})
    Trainer(Tagger(), args, train_dataset=examples, eval_dataset=examples, callbacks=[callback]).train()
    assert callback.stages[0].tau > 0


def test_a_validation_loss_of_ones_own(make, parts):
    trainer = make(max_steps=6)
    validation = ValidationLoss(trainer.model, [COLLATE(parts[1].validation)])
    callback = FastForwardCallback(validation)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.stages[0].loss_after == pytest.approx(float(validation()), rel=1e-6)


def test_a_random_collator_draws_the_same_validation_in_every_run_and_leaves_no_trace(make, parts):
    def masking(examples):
        batch = COLLATE(examples)
        batch["labels"][torch.rand(batch["labels"].shape) < 0.3] = -100
        return batch

    plain = make(data_collator=masking)
    plain.train()
    runs = []
    for noise in range(2):
        torch.manual_seed(noise)
        callback = FastForwardCallback(config=EVERY_3)
        make(callback, data_collator=masking).train()
        runs.append([s.losses for s in callback.stages])
    assert runs[0] == runs[1]


def test_examples_are_drawn_anew_from_a_pool(make, parts):
    held_out, runs = parts[1].validation, []
    for given, eval_dataset in ((None, held_out), (held_out, None)):
        callback = FastForwardCallback(given, config=EVERY_3, examples=2, pool=6)
        make(callback, eval_dataset=eval_dataset).train()
        runs.append(callback.stages)
    for stages in runs:
        assert [stage.draw for stage in stages] == [0, 1]
        assert all(stage.evaluations > 1 for stage in stages)
    assert [stage.losses for stage in runs[0]] == [stage.losses for stage in runs[1]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"config": {}}, "FastForwardConfig, got dict"),
        ({"examples": 0}, "examples=0"),
        ({"pool": 31}, "pool=31: must be an integer of at least examples=32, or None"),
        ({"validation": lambda model: 0.0, "pool": 64}, "pool=64: a function has no examples"),
        ({}, "nothing to validate on: pass validation="),
    ],
)
def test_wrong_arguments(make, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(FastForwardCallback(**given), eval_dataset=None).train()


def test_two_on_one_trainer_are_refused(make, parts):
    validation = parts[1].validation
    trainer = make(FastForwardCallback(validation), FastForwardCallback(validation))
    with pytest.raises(RuntimeError, match="already carries a FastForward"):
        trainer.train()


def test_without_a_trainer_it_says_so():
    callback = FastForwardCallback([])
    with pytest.raises(RuntimeError, match="called by no transformers"):
        callback.on_train_begin(None, None, None)


@pytest.mark.slow
def test_a_batch_size_that_is_found_begins_anew(make):
    class Greedy(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2 and self.state.global_step == 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    callback = FastForwardCallback(config=EVERY_3)
    trainer = make(callback, cls=Greedy, auto_find_batch_size=True)
    trainer.train()
    assert [s.optimizer_step for s in callback.stages] == [3, 6]
    assert "training_step" not in vars(trainer)


def test_flops_are_those_of_the_meter(make, parts, weights):
    seen = []

    class Watching(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append({k: v.clone() for k, v in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    callback = FastForwardCallback(config=EVERY_3)
    trainer = make(callback, cls=Watching, gradient_accumulation_steps=2)
    out = trainer.train()
    meter = FlopMeter(sum(p.numel() for p in weights(trainer)))
    for batch in seen:
        meter.training_step(trainer.model, batch)
    for _ in range(7):
        meter.optimizer_step()
    training = dict(meter.totals)
    for stage in callback.stages:
        meter.stage(stage)
    assert len(seen) == 14 and callback.flops == meter.totals
    assert {k: meter.totals[k] - training[k] for k in training} == callback.stage_flops
    final = trainer.state.log_history[-1]
    for metrics in (out.metrics, final):
        assert metrics["ff/flops_measured"] == meter.measured
        assert metrics["ff/flops_paper"] == meter.paper
        assert metrics["ff/flops_share"] == callback.stage_flops["measured"] / meter.measured
        assert "train_runtime" in metrics


def test_a_training_step_that_somebody_wrapped_since_is_not_counted_twice(make, rising):
    class Wraps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            step = trainer.training_step
            trainer.training_step = lambda *args, **kwargs: step(*args, **kwargs)

    callback = FastForwardCallback(rising(), EVERY_3)
    trainer = make(callback, Wraps())
    first, second = ((trainer.train(), callback.flops)[1] for _ in range(2))
    assert first["measured"] == second["measured"] > 0


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_rate_that_nobody_gave_is_logged_and_goes_with_the_trainers_scheduler(make, schedule):
    callback, rates = FastForwardCallback(config=AUTO), []

    class Rates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            rates.append((kwargs["lr_scheduler"].get_last_lr()[0], callback.ff.learning_rate))

    options = {"max_steps": 12, "learning_rate": 1e-4, "lr_scheduler_type": schedule, "logging_steps": 2}
    trainer = make(callback, Rates(), eval_dataset=None, **options)  # there is nothing to validate
    trainer.train()
    shape = [(12 - step) / 12 if schedule == "linear" else 1.0 for step in range(1, 13)]
    expected = [rate * factor for (_, rate), factor in zip(rates, shape, strict=True)]
    assert [rate for rate, _ in rates] == pytest.approx(expected, rel=1e-9)
    assert [rate for _, rate in rates[:4]] == pytest.approx([1e-5, 4e-5, 16e-5, 64e-5])
    seen = logged(trainer, "ff/learning_rate")
    assert [entry["ff/learning_rate"] for entry in seen] == [rate for _, rate in rates[1::2]]
    assert [entry["step"] for entry in seen] == [2, 4, 6, 8, 10, 12]
    assert all(-1 < entry["ff/alignment"] < 0 for entry in seen[:2])


@pytest.mark.parametrize("cut", [2, 4, 10])
def test_a_trainer_that_is_resumed_finds_the_rate_where_it_was(make, cut, weights, equal):
    """It loads the states of optimizer and scheduler before training begins, and FastForward is made."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 14}
    options |= {"lr_scheduler_type": "cosine", "logging_steps": 1}
    through = FastForwardCallback(config=AUTO)
    whole = make(through, **options)
    whole.train()
    callback = FastForwardCallback(config=AUTO)
    trainer = make(callback, **options)
    trainer.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{cut}"))
    assert equal(weights(trainer), weights(whole))
    for name in ("ff/learning_rate", "learning_rate"):
        assert [e[name] for e in logged(trainer, name)] == [e[name] for e in logged(whole, name)]
    assert max(e["ff/learning_rate"] for e in logged(whole, "ff/learning_rate")) > 50 * 1e-5


def test_saving_at_each_step_leaves_nothing_to_compare_and_is_told(make):
    trainer = make(FastForwardCallback(config=AUTO), save_strategy="steps", save_steps=1, max_steps=2)
    with pytest.warns(FFKernelsNotice, match="with save_steps=1 there is nothing to compare"):
        trainer.train()


def test_patience_switches_it_off(make, rising):
    callback = FastForwardCallback(rising(), FastForwardConfig(interval=1, patience=2))
    make(callback).train()
    assert len(callback.stages) == 2


def test_without_transformers_the_import_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; from ffkernels import FastForwardCallback"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "FastForwardCallback needs transformers: pip install 'ffkernels[hf]'" in run.stderr
