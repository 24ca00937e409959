"""Presets are configurations, and hold what the authors' script does and what the paper's tables say."""

import warnings

import pytest

from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.training.config import TrainConfig
from ffkernels.training.presets import PRESETS, preset
from ffkernels.training.tasks import TASKS

# Appendix E, Tables 1 to 3: learning rate, micro-batch, batch size, rank; None is blank.
PAPER = """
pythia-1.4b  medical 4e-5 2 128 8   instruction 5e-6 2 64 8   chat 2e-5 2 512 64
pythia-2.8b  medical 4e-5 1 128 8   instruction 5e-6 1 64 8   chat 2e-5 2 512 64
pythia-6.9b  medical 4e-5 - 128 8   instruction 5e-6 - 64 8   chat 2e-5 1 512 64
llama3-8b    medical 4e-5 - 128 8   instruction 5e-6 - 64 8   chat 2e-5 - 512 64
"""
ROWS = [
    (model, cells[at], *cells[at + 1 : at + 5])
    for model, *cells in map(str.split, PAPER.strip().splitlines())
    for at in (0, 5, 10)
]
TOLD = ("lr", "micro_batch_size", "batch_size", "rank")


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


@pytest.mark.parametrize(("model", "task", "lr", "micro", "batch", "rank"), ROWS)
def test_the_papers_tables(model, task, lr, micro, batch, rank):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values = preset(f"paper-{model}-{task}")
    blank = micro == "-"
    assert [values[key] for key in TOLD] == [float(lr), 1 if blank else int(micro), int(batch), int(rank)]
    told = f"the paper's table leaves the micro-batch of {model} on {task} blank; the authors' script's"
    assert [str(one.message).startswith(told) for one in said] == [True] * blank
    rest = preset(f"authors-{model}-{task}")
    assert {key: values[key] for key in rest if key not in TOLD} == {
        key: value for key, value in rest.items() if key not in TOLD
    }


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore::ffkernels.ops.notices.FFKernelsNotice")
def test_every_preset_is_a_configuration(name):
    config = TrainConfig(**preset(name))
    assert config.task in TASKS and name.endswith(config.task)
    assert (config.test_examples, config.validation_examples) == (1000, 32)
    pythia = "pythia" in name
    assert pythia == ("pythia" in config.model) == (config.targets == ("query_key_value",))
    assert config.dtype == ("float32" if pythia else "bfloat16")


def test_there_are_two_for_each_model_and_task():
    assert len(PRESETS) == len(set(PRESETS)) == 24 and len(ROWS) == 12
    assert preset("authors-pythia-6.9b-medical")["model"] == "EleutherAI/pythia-6.9b"
    with pytest.warns(FFKernelsNotice, match="blank"):
        assert preset("paper-pythia-6.9b-medical")["model"] == "EleutherAI/pythia-6.9b"


def test_a_changed_preset_leaves_the_next_one_alone():
    preset("authors-pythia-1.4b-chat")["lr"] = 1.0
    assert preset("authors-pythia-1.4b-chat")["lr"] == 2e-5


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset 'paper-table-1' does not exist; allowed are authors-pythia"):
        preset("paper-table-1")
