from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner


@pytest.fixture
def analyze(small, tmp_path):
    """Runs an analyze command on the small model; its output in words, and the data it wrote."""

    from ffkernels.analysis.commands import app

    def run(name, *options):
        common = {
            "model": small["model"],
            "data": small["data"],
            "rank": 4,
            "steps": 8,
            "threads": 1,
            "batch-size": 8,
            "max-length": 16,
            "test-examples": 16,
            "validation-examples": 8,
            "warmup-steps": 2,
            "lr": 1e-3,
            "device": "cpu",
            "out": tmp_path,
        }
        for absent in {"rank": ["rank"], "tau-sweep": ["steps"]}.get(name, []):
            del common[absent]
        flags = [part for key, value in common.items() for part in (f"--{key}", str(value))]
        result = CliRunner().invoke(app, [name, *flags, *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert record["analysis"] == name and record["data"]["config"]["batch_size"] == 8
        return " ".join(result.output.split()), record["data"]

    return run
