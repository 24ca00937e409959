"""What a command line with a preset comes to."""

import pytest

pytest.importorskip("typer")
from typer.main import get_command

from ffkernels.cli import app
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training import options
from ffkernels.training.config import TrainConfig

PRESET = {
    "model": "some/model",
    "task": "chat",
    "lr": 2e-5,
    "rank": 64,
    "targets": ("query_key_value",),
    "epochs": 5,
    "beta2": 0.95,
    "fast_forward": FastForwardConfig(interval=9, search="linear", patience=None, warmup=3),
}


@pytest.fixture
def context(monkeypatch):
    """``context("train", "--lr", "1e-3")``: the context in which the command would run."""
    monkeypatch.setattr("ffkernels.training.presets.preset", lambda name: {"paper": PRESET}[name])

    def make(command, *arguments):
        return get_command(app).commands[command].make_context(command, list(arguments))

    return make


@pytest.mark.parametrize("command", ["train", "compare", "tokens"])
def test_the_defaults_of_the_command_line_are_those_of_the_configuration(context, command):
    defaults = TrainConfig()
    config = options.training(context(command))
    differing = {k for k, v in config.to_dict().items() if v != defaults.to_dict()[k]}
    assert differing <= {"out"}
    if command != "tokens":
        fixed = {"search": "parabolic"} if command == "compare" else {}  # there it is both
        stages = options.stages(context(command), **fixed)
        assert stages == FastForwardConfig(max_tau=1024)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_says_by_what_a_stage_runs(context, command):
    (patience,) = [p for p in context(command).command.params if p.name == "patience"]
    assert "agreement of gradients and updates" in patience.help and "0 never does" in patience.help


def test_both_searches_are_no_search_of_one_run(context):
    with pytest.raises(ValueError, match="search='both'"):
        options.stages(context("train", "--search", "both"))


def test_options_are_settings(context):
    given = ["--target-modules", "a, b", "--out", "x/y", "--task", "chat", "--chat-loss", "assistant"]
    given += ["--source", "hub", "--lora-plus-ratio", "4", "--optimizer", "lora-plus", "--method", "dora"]
    config = options.training(context("train", *given))
    assert (config.targets, config.out, config.task) == (("a", "b"), "x/y", "chat")
    assert (config.source, config.chat_loss, config.method) == ("hub", "assistant", "dora")
    assert (config.optimizer, config.lora_plus_ratio) == ("lora-plus", 4.0)
    assert options.training(context("tokens", "--data", "f.jsonl")).data == "f.jsonl"


def test_a_ratio_for_the_peer_lora_plus_is_no_mistake(context):
    config = options.training(context("compare", "--peer", "lora-plus", "--lora-plus-ratio", "4"))
    assert (config.optimizer, config.lora_plus_ratio) == ("adamw", 4.0)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_preset_replaces_what_was_not_given(context, command):
    ctx = context(command, "--preset", "paper")
    config = options.training(ctx)
    assert {name: getattr(config, name) for name in PRESET if name != "fast_forward"} == {
        name: value for name, value in PRESET.items() if name != "fast_forward"
    }
    assert (config.batch_size, config.fast_forward) == (64, None)
    assert options.stages(ctx) == PRESET["fast_forward"]


def test_what_is_given_wins_over_a_preset_also_where_it_is_the_default(context):
    given = ["--lr", "1e-4", "--target-modules", "dense", "--model", "tiny", "--interval", "6"]
    ctx = context("train", "--preset", "paper", *given, "--patience", "3", "--search", "parabolic")
    config = options.training(ctx)
    assert (config.lr, config.targets, config.model) == (1e-4, ("dense",), "tiny")
    assert (config.rank, config.task) == (64, "chat")
    stages = options.stages(ctx)
    assert (stages.interval, stages.patience, stages.search, stages.warmup) == (6, 3, "parabolic", 3)


def test_no_learning_rate_is_given(context):
    """auto is the stages' setting, beside a preset too; it needs none of them."""
    for given in ([], ["--preset", "paper"]):
        ctx = context("train", *given, "--lr", "auto")
        assert options.stages(ctx).learning_rate == "auto"
        assert options.training(ctx).lr == TrainConfig().lr
    ctx = context("train", "--lr", "auto", "--no-fast-forward")
    stages = options.stages(ctx, interval=None)
    assert (stages.learning_rate, stages.interval) == ("auto", None)
    assert options.training(context("train", "--lr", "3e-3")).lr == 3e-3
    assert options.stages(context("train", "--lr", "3e-3")).learning_rate == "keep"
    with pytest.raises(ValueError, match="lr='fast': must be a number above 0, or auto"):
        options.training(context("train", "--lr", "fast"))
    assert options.stages(context("compare"), search="linear").learning_rate == "keep"


def test_a_pool_of_validation_examples_is_no_smaller_than_a_draw(context):
    config = options.training(context("train", "--resample-validation", "256"))
    assert (config.resample_validation, config.validation_examples, config.held_out_examples) == (
        256,
        32,
        256,
    )
    assert options.training(context("train")).held_out_examples == 32
    with pytest.raises(ValueError, match=r"=31: must be .* at least validation_examples=32"):
        options.training(context("train", "--resample-validation", "31"))


def test_steps_that_are_given_are_not_replaced_by_the_presets_epochs(context):
    config = options.training(context("train", "--preset", "paper", "--steps", "7"))
    assert (config.steps, config.epochs) == (7, None)
    config = options.training(context("train", "--preset", "paper", "--epochs", "2"))
    assert config.epochs == 2


def test_seeds_are_a_count_or_a_list():
    seeds_of = options.seeds_of
    assert seeds_of("3") == (0, 1, 2) and seeds_of("7,") == (7,) and seeds_of("5,1") == (5, 1)
    for text in ("0", "-1", "1,1", "x", ",", "-1,2"):
        with pytest.raises(ValueError, match="seeds="):
            seeds_of(text)


@pytest.mark.filterwarnings("ignore:the paper's table leaves")
def test_every_preset_is_a_training_run(monkeypatch):
    from ffkernels.training.presets import PRESETS, preset

    command = get_command(app).commands["train"]
    for name in PRESETS:
        ctx = command.make_context("train", ["--preset", name])
        config = options.training(ctx, fast_forward=options.stages(ctx))
        assert config == TrainConfig(**preset(name))
