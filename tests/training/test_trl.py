"""FastForwardCallback in TRL's SFTTrainer, on the embedded model."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from ffkernels import FastForwardCallback, FastForwardConfig, ValidationLoss
from ffkernels.reporting.flops import FlopMeter
from ffkernels.training import trainer_access
from ffkernels.training.models import attention_targets, load_model
from ffkernels.training.offline import documented_functions
from ffkernels.training.step_flops import StepFlops
from ffkernels.training.trainer_data import examples_and_collator

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

SPLITS = {"validation": slice(0, 32), "test": slice(32, 64), "train": slice(64, 464)}


@pytest.fixture(scope="module")
def rows():
    datasets.disable_progress_bars()
    rows = [{"prompt": f'"""{doc}"""\n', "completion": code} for doc, code in documented_functions()]
    rows = [row for row in rows if len(row["prompt"]) <= 40]
    yield {name: datasets.Dataset.from_list(rows[part]) for name, part in SPLITS.items()}
    datasets.enable_progress_bars()


@pytest.fixture
def make(rows, arguments):
    torch.set_num_threads(1)

    def make(*callbacks, **options):
        model, tokenizer = load_model("tiny")
        defaults = {**arguments, "learning_rate": 3e-4, "max_length": 48}
        defaults |= {"bf16": False, "gradient_checkpointing": False}
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**{**defaults, **options}),
            train_dataset=rows["train"],
            eval_dataset={"validation": rows["validation"], "test": rows["test"]},
            processing_class=tokenizer.for_transformers(),
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules=attention_targets(model), task_type="CAUSAL_LM"
            ),
            callbacks=list(callbacks),
        )

    return make


class TestLoss(TrainerCallback):
    """Test loss after every sixth step; stops at a target."""

    __test__ = False

    def __init__(self, target=None):
        self.losses, self.target = {}, target

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        trainer = trainer_access.calling_trainer()
        examples, collator = examples_and_collator(trainer, trainer.eval_dataset["test"])
        self.loss = ValidationLoss(model, examples, collator=collator, check=False)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 6 == 0:
            loss = self.losses[state.global_step] = float(self.loss())
            control.should_training_stop |= self.target is not None and loss <= self.target


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-4, 3e-4])
def test_it_reaches_the_plain_runs_test_loss_with_40_percent_fewer_flops(make, lr):
    options = {"learning_rate": lr, "max_steps": 24, "per_device_train_batch_size": 32, "max_length": 32}
    plain, costs = TestLoss(), StepFlops()
    meter = FlopMeter(0)
    trainer = make(plain, **options)
    trainer_access.wrap_training_step(trainer, lambda *batch: add_to(meter, costs, *batch))
    trainer.train()

    fast, callback = TestLoss(target=plain.losses[24]), FastForwardCallback()
    make(callback, fast, **options).train()
    reached = max(fast.losses)
    assert fast.losses[reached] <= plain.losses[24] < plain.losses[6]
    assert callback.stages[0].tau > 10
    assert callback.flops["measured"] <= 0.6 * meter.measured


@contextmanager
def add_to(meter, costs, model, inputs):
    with costs.batch(model, inputs) as cost:
        yield
    meter.add(cost[0])


def test_it_leaves_trls_own_metrics_to_their_log(make):
    callback = FastForwardCallback(config=FastForwardConfig(interval=3, max_tau=8, patience=None))
    trainer = make(callback, logging_steps=2)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "ff/tau" in entry] == [3, 6]
    theirs = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in theirs] == [2, 4, 6]
    assert all("mean_token_accuracy" in entry and "entropy" in entry for entry in theirs)
    assert not any("entropy" in entry for entry in history if "ff/tau" in entry)
    assert history[-1]["ff/flops_measured"] == callback.flops["measured"]


def test_without_an_accepted_step_it_is_the_plain_run(make, weights, equal, rising):
    plain = make(gradient_accumulation_steps=2)
    plain.train()
    callback = FastForwardCallback(rising(), FastForwardConfig(interval=3, patience=None))
    trainer = make(callback, gradient_accumulation_steps=2)
    trainer.train()
    assert len(callback.stages) == 2 and equal(weights(trainer), weights(plain))


@pytest.mark.slow
def test_resuming_continues_bit_for_bit(make, weights, equal):
    config = FastForwardConfig(interval=3, max_tau=8)
    options = {"save_strategy": "steps", "save_steps": 4}
    through = FastForwardCallback(config=config)
    whole = make(through, **options)
    whole.train()
    callback = FastForwardCallback(config=config)
    trainer = make(callback, **options)
    trainer.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))
    assert [s.losses for s in callback.stages] == [s.losses for s in through.stages]
    assert equal(weights(trainer), weights(whole))
