from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from ffkernels.analysis.commands import app as analyze
from ffkernels.analysis.options import integers, settings, shared_options
from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.config import TrainConfig
from ffkernels.training.presets import preset


def run(command, *arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("x")(command)
    return CliRunner().invoke(app, ["x", *arguments], catch_exceptions=False)


def test_a_command_gets_its_own_and_the_shared_options():
    seen = {}

    @shared_options(omit=("seed",), steps=7)
    def command(ctx: typer.Context, at: Annotated[str, typer.Option(help="Where.")] = "6") -> None:
        """What it does."""
        seen.update(ctx.params, own=at)

    assert run(command, "--lr", "3e-4", "--at", "9", "--data", "a.jsonl", "--quiet").exit_code == 0
    assert (seen["lr"], seen["own"], seen["steps"], seen["quiet"]) == (3e-4, "9", 7, True)
    assert "seed" not in seen and seen["model"] == "tiny"
    assert run(command, "--seed", "3").exit_code == 2
    output = run(command, "--help").output
    assert "What it does." in output and "Where." in output


def test_an_option_of_the_commands_own_replaces_the_shared_one():
    seen = []

    @shared_options()
    def command(ctx: typer.Context, seed: Annotated[str, typer.Option()] = "0,1") -> None:
        seen.append((seed, ctx.params["seed"]))

    assert run(command).exit_code == 0 and seen == [("0,1", "0,1")]


def test_a_misspelt_shared_option_is_refused():
    with pytest.raises(ValueError, match="step: no shared option"):
        shared_options(step=3)
    with pytest.raises(ValueError, match="sed: no shared option"):
        shared_options(omit=("sed",))


def config_of(*arguments, **shared):
    """The settings that a command line comes to."""
    seen = []

    @shared_options(**shared)
    def command(ctx: typer.Context) -> None:
        seen.append(settings(ctx))

    result = run(command, *arguments)
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


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match="rank=0"):
        config_of("--rank", "0")
    with pytest.raises(ValueError, match="search='cubic'"):
        config_of("--search", "cubic")
    with pytest.raises(ValueError, match="--rank: method='full' has no adapter"):
        config_of("--method", "full", "--rank", "4")


def test_lists():
    assert integers("24, 6,12,6", "--at") == (6, 12, 24)
    assert integers("0,3", "--at", low=0) == (0, 3)
    for text in ("0,3", "a", ""):
        with pytest.raises(ValueError, match="--it"):
            integers(text, "--it")


def test_every_command_has_help_and_the_defaults_of_the_contract():
    for command in analyze.registered_commands:
        result = CliRunner().invoke(analyze, [command.name, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0 and "--model" in result.output, command.name
        assert "tiny" in result.output and "instruction" in result.output, command.name


def test_help_needs_no_torch():
    code = "import sys; from ffkernels.analysis import commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
