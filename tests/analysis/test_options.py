import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ffkernels.analysis.commands import app as analyze
from ffkernels.analysis.options import command, integers, settings
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.config import TrainConfig
from ffkernels.training.presets import preset


def run(act, own, *arguments, **shared):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("x", help="What it does.")(command(act, own, **shared))
    return CliRunner().invoke(app, ["x", *arguments], catch_exceptions=False)


def test_a_command_gets_its_own_and_the_shared_options():
    seen = {}

    def x(*arguments):
        own = {"at": ("6", "Where."), "window": (None, "How far.", int)}
        return run(lambda ctx: seen.update(ctx.params), own, *arguments, omit=("seed",), steps=7)

    assert x("--lr", "3e-4", "--at", "9", "--data", "a.jsonl", "--quiet").exit_code == 0
    assert (seen["lr"], seen["at"], seen["steps"], seen["quiet"]) == (3e-4, "9", 7, True)
    assert "seed" not in seen and seen["model"] == "tiny" and seen["window"] is None
    assert x("--window", "4").exit_code == 0 and seen["window"] == 4
    assert x("--seed", "3").exit_code == 2 and x("--window", "a").exit_code == 2
    output = x("--help").output
    assert "What it does." in output and "Where." in output


def test_an_option_of_the_commands_own_replaces_the_shared_one():
    seen = []
    done = run(lambda ctx: seen.append(ctx.params["seed"]), {"seed": ("0,1", "Which.")})
    assert done.exit_code == 0 and seen == ["0,1"]


def test_a_misspelt_shared_option_is_refused():
    with pytest.raises(ValueError, match="step: no shared option"):
        command(print, {}, step=3)
    with pytest.raises(ValueError, match="sed: no shared option"):
        command(print, {}, omit=("sed",))


def config_of(*arguments, **shared):
    """The settings that a command line comes to."""
    seen = []
    result = run(lambda ctx: seen.append(settings(ctx)), {}, *arguments, **shared)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_settings_are_those_of_training_and_of_stages():
    given = "--lr 2e-4 --interval 3 --search linear --max-tau 50 --rank 2 --target-modules a,b --dropout 0.1"
    config = config_of(*given.split(), steps=7)
    assert (config.lr, config.rank, config.steps, config.model) == (2e-4, 2, 7, "tiny")
    assert (config.targets, config.dropout) == (("a", "b"), 0.1)
    stages = config.fast_forward
    assert (stages.interval, stages.search, stages.max_tau, stages.patience) == (3, "linear", 50, None)


def test_the_shared_defaults_are_those_of_training():
    stages = FastForwardConfig(max_tau=1024, patience=None)
    assert config_of() == TrainConfig(out=str(Path("runs/analyze")), fast_forward=stages)


def test_a_preset_is_for_analyses_too():
    config = config_of("--preset", "authors-pythia-1.4b-chat", "--batch-size", "16", lr=3e-4, steps=60)
    wanted = preset("authors-pythia-1.4b-chat")
    assert config.batch_size == 16 and config.model == wanted["model"] and config.task == "chat"
    assert (config.lr, config.rank, config.targets) == (wanted["lr"], wanted["rank"], wanted["targets"])
    stages = wanted["fast_forward"]
    assert config.fast_forward == dataclasses.replace(stages, patience=None)
    assert config_of("--preset", "authors-pythia-1.4b-chat", "--search", "parabolic").lr == wanted["lr"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--rank 0", "rank=0"),
        ("--search cubic", "search='cubic'"),
        ("--method full --rank 4", "--rank: method='full' has no adapter"),
        ("--test-examples 0", "test_examples=0: must be at least 1: an analysis"),
    ],
)
def test_settings_name_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        config_of(*given.split())


def test_lists():
    assert integers("24, 6,12,6", "--at") == (6, 12, 24)
    for text in ("0,3", "a", ""):
        with pytest.raises(ValueError, match="--it"):
            integers(text, "--it")


def test_every_command_has_help_and_the_defaults_of_the_contract():
    for one in analyze.registered_commands:
        result = CliRunner().invoke(analyze, [one.name, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0 and "--model" in result.output, one.name
        assert "tiny" in result.output and "instruction" in result.output, one.name


def test_help_needs_no_torch():
    code = "import sys; from ffkernels.analysis import commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
