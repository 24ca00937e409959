from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")
import typer
from typer.testing import CliRunner

from ffkernels.analysis.gradient_commands import COMMANDS


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    for name, command in COMMANDS.items():
        app.command(name)(command)
    return app


@pytest.fixture
def arguments(small, tmp_path):
    options = {k: v for k, v in small.items() if k not in ("evaluate_every", "steps")}
    options |= {"steps": 6, "interval": 3, "max_tau": 20, "out": tmp_path / "out", "threads": 1}
    return [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]


@pytest.mark.parametrize(
    ("name", "more", "shown"),
    [
        ("gradients", ["--batches", "3"], ["consistency before", "Gradients of different batches agree"]),
        ("similarity", ["--window", "4"], ["all earlier steps", "A gradient's mean cosine"]),
        ("plane", ["--grid", "3", "--examples", "4"], ["W_FF", "On the straight line from W_SGD to W_FF"]),
    ],
)
def test_a_command_prints_what_was_seen_and_writes_data_and_picture(
    app, arguments, tmp_path, name, more, shown
):
    result = CliRunner().invoke(app, [name, *arguments, *more])
    assert result.exit_code == 0, result.output
    output = result.output
    for text in (*shown, f"{name}.json", f"{name}.png"):
        assert text in output
    record = json.loads((tmp_path / "out" / f"{name}.json").read_text(encoding="utf-8"))
    assert record["analysis"] == name and record["data"]["config"]["steps"] == 6
    assert record["data"]["config"]["fast_forward"]["interval"] == 3
    assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["gradients", "similarity", "plane"])
def test_every_command_has_help(app, name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and "Fig." in result.output
