from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from ffkernels.analysis.commands import app as analyze
from ffkernels.analysis.options import SHARED, integers, seeds_of, settings, shared_options


def run(command, *arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    app.command("x")(command)
    return CliRunner().invoke(app, ["x", *arguments], catch_exceptions=False)


def test_a_command_gets_its_own_and_the_shared_options():
    seen = {}

    @shared_options(omit=("seed",), steps=7)
    def command(flags: dict[str, Any], at: Annotated[str, typer.Option(help="Where.")] = "6") -> None:
        """What it does."""
        seen.update(flags, at=at)

    assert run(command, "--lr", "3e-4", "--at", "9", "--data", "a.jsonl", "--quiet").exit_code == 0
    assert (seen["lr"], seen["at"], seen["steps"], seen["quiet"]) == (3e-4, "9", 7, True)
    assert "seed" not in seen and seen["model"] == "tiny"
    assert run(command, "--seed", "3").exit_code == 2
    output = run(command, "--help").output
    assert "What it does." in output and "Where." in output


def test_an_option_of_the_commands_own_replaces_the_shared_one():
    seen = []

    @shared_options()
    def command(flags: dict[str, Any], seed: Annotated[str, typer.Option()] = "0,1") -> None:
        seen.append((seed, "seed" in flags))

    assert run(command).exit_code == 0 and seen == [("0,1", False)]


def test_a_misspelt_shared_option_is_refused():
    with pytest.raises(ValueError, match="step: no shared option"):
        shared_options(step=3)
    with pytest.raises(ValueError, match="sed: no shared option"):
        shared_options(omit=("sed",))


def test_settings_are_those_of_training_and_of_stages():
    config = settings(lr=2e-4, interval=3, search="linear", max_tau=50, rank=2, out="somewhere", quiet=True)
    assert (config.lr, config.rank, config.model, config.out) == (2e-4, 2, "tiny", "runs")
    stages = config.fast_forward
    assert (stages.interval, stages.search, stages.max_tau, stages.patience) == (3, "linear", 50, None)
    assert settings(patience=4, executor="eager").fast_forward.patience == 4
    for name, (_, default) in SHARED.items():
        if hasattr(config, name) and name not in ("lr", "rank", "out"):
            assert getattr(config, name) == default, name


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match="rank=0"):
        settings(rank=0)
    with pytest.raises(ValueError, match="search='cubic'"):
        settings(search="cubic")


def test_lists():
    assert integers("24, 6,12,6", "--at") == (6, 12, 24)
    assert integers("0,3", "--at", low=0) == (0, 3)
    assert seeds_of("3") == (0, 1, 2) and seeds_of("7,") == (7,) and seeds_of("5,1") == (5, 1)
    for text in ("0,3", "a", ""):
        with pytest.raises(ValueError, match="--it"):
            integers(text, "--it")
    for text in ("0", "-1", "1,1", "x", ",", "-1,2"):
        with pytest.raises(ValueError, match="seeds="):
            seeds_of(text)


def test_every_command_has_help_and_the_defaults_of_the_contract():
    for command in analyze.registered_commands:
        result = CliRunner().invoke(analyze, [command.name, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0 and "--model" in result.output, command.name
        assert "tiny" in result.output and "instruction" in result.output, command.name


def test_help_needs_no_torch():
    code = "import sys; from ffkernels.analysis import commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
