"""A Trainer's run in which no stage finds a step is the plain run bit for bit, resumed or not."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from ffkernels import FastForwardCallback, FastForwardConfig

FAMILIES = ["llama", "qwen3", "gemma", "gpt_neox"]
EVERY_2 = FastForwardConfig(interval=2, max_tau=16, patience=None)


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 64, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [logs["loss"]] if "loss" in logs else []


@pytest.fixture
def train(arguments, tiny_model):
    """Final weights and optimizer state, and the losses that were logged."""

    def train(family, folder, callback=None, resume=None):
        losses = Losses()
        options = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        options |= {"max_grad_norm": 0.5, "lr_scheduler_type": "linear", "logging_steps": 1}
        options |= {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 3}
        # Of GPT-NeoX a Trainer saves the head under a name that it does not find again: tied, it need not.
        trainer = Trainer(
            tiny_model(family, attention_dropout=0.1, tie_word_embeddings=family == "gpt_neox"),
            TrainingArguments(**{**arguments, **options}),
            train_dataset=examples(32, seed=1),
            data_collator=default_data_collator,
            callbacks=[losses, *([callback] if callback is not None else [])],
        )
        trainer.train(resume_from_checkpoint=resume)
        state = [value for one in trainer.optimizer.state.values() for value in one.values()]
        return [*(p.detach().clone() for p in trainer.model.parameters()), *state], losses.seen

    return train


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_step_it_is_the_plain_run_resumed_or_not(train, family, tmp_path, equal, rising):
    plain, losses = train(family, tmp_path / "plain")

    steady, through = FastForwardCallback(rising(), EVERY_2), tmp_path / "through"
    state, seen = train(family, through, steady)
    assert [stage.tau for stage in steady.stages] == [0, 0]
    assert equal(state, plain) and seen == losses

    again = FastForwardCallback(rising(), EVERY_2)
    state, seen = train(family, tmp_path / "resumed", again, resume=str(checkpoint(through, 3)))
    assert [stage.optimizer_step for stage in again.stages] == [2, 4]
    assert equal(state, plain) and seen == losses[3:]
    assert again.flops == steady.flops


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_with_stages_is_the_one_that_was_not_stopped(train, family, tmp_path, equal):
    validation, through = examples(32, seed=1)[:8], tmp_path / "through"
    steady = FastForwardCallback(validation, EVERY_2)
    state, losses = train(family, through, steady)
    assert any(stage.tau > 0 for stage in steady.stages)
    again = FastForwardCallback(validation, EVERY_2)
    resumed, seen = train(family, tmp_path / "resumed", again, resume=str(checkpoint(through, 3)))
    assert [stage.losses for stage in again.stages] == [stage.losses for stage in steady.stages]
    assert equal(resumed, state) and seen == losses[3:]
    assert again.flops == steady.flops
