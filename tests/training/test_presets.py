"""Presets are configurations, and hold what the authors' script does."""

from __future__ import annotations

import pytest

from ffkernels.training.config import TrainConfig
from ffkernels.training.presets import PAPER_BATCH_SIZES, PAPER_LEARNING_RATES, PRESETS, preset
from ffkernels.training.tasks import TASKS


def test_the_scripts_default_run():
    config = TrainConfig(**preset("authors-llama3-8b-chat"))
    assert (config.model, config.task, config.source) == ("meta-llama/Meta-Llama-3-8B", "chat", "hub")
    assert (config.rank, config.alpha, config.dropout) == (64, 16, 0.1)
    assert config.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (config.lr, config.weight_decay, config.warmup_steps) == (2e-5, 0.0, 0)
    assert (config.micro_batch_size, config.batch_size, config.epochs) == (1, 512, 5)
    assert (config.max_length, config.dtype, config.chat_loss) == (1024, "bfloat16", "all")
    stages = config.fast_forward
    assert (stages.interval, stages.search, stages.patience) == (6, "linear", None)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration_within_the_papers_ranges(name):
    config = TrainConfig(**preset(name))
    assert config.task in TASKS and name.endswith(config.task)
    assert PAPER_LEARNING_RATES[0] <= config.lr <= PAPER_LEARNING_RATES[1]
    assert PAPER_BATCH_SIZES[0] <= config.batch_size <= PAPER_BATCH_SIZES[1]
    assert (config.test_examples, config.validation_examples) == (1000, 32)
    pythia = "pythia" in name
    assert pythia == ("pythia" in config.model) == (config.targets == ("query_key_value",))
    assert config.dtype == ("float32" if pythia else "bfloat16")


def test_there_is_one_for_each_model_and_task():
    assert len(PRESETS) == len(set(PRESETS)) == 12
    assert preset("authors-pythia-6.9b-medical")["model"] == "EleutherAI/pythia-6.9b"


def test_a_changed_preset_leaves_the_next_one_alone():
    preset("authors-pythia-1.4b-chat")["lr"] = 1.0
    assert preset("authors-pythia-1.4b-chat")["lr"] == 2e-5


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset 'paper-table-1' does not exist; allowed are authors-pythia"):
        preset("paper-table-1")
