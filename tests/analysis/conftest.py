import json

import pytest
from typer.testing import CliRunner


@pytest.fixture(scope="session")
def run_of(small):
    """Settings of a run of the small model: changes of them, and Fast Forward's, None for no stages."""
    from ffkernels.engine.config import FastForwardConfig
    from ffkernels.training.config import TrainConfig

    def make(stages=None, **changes):
        return TrainConfig(**{**small, **changes}, fast_forward=stages and FastForwardConfig(**stages))

    return make


@pytest.fixture(scope="module")
def config(request, run_of):
    """The run that a module's ``CONFIG`` says."""
    return run_of(**request.module.CONFIG)


@pytest.fixture(scope="module")
def data(request, config):
    """What a module's ``ANALYSIS`` finds of that run."""
    return request.module.ANALYSIS(config)


@pytest.fixture(scope="session")
def drawn():
    """The panels of the figure that ``draw`` fills with ``data``."""
    from matplotlib.figure import Figure

    def panels(draw, data):
        figure = Figure()
        draw(figure, data)
        return figure.axes

    return panels


@pytest.fixture
def analyze(small, tmp_path):
    """Runs an analyze command on the small model; its output in words, and the data it wrote."""
    from ffkernels.analysis.commands import app

    settings = {**small, "threads": 1, "steps": 8, "out": tmp_path}
    common = {key.replace("_", "-"): value for key, value in settings.items() if key != "evaluate_every"}

    def run(name, *options):
        absent = {"rank": "rank", "tau-sweep": "steps"}.get(name)
        flags = [part for key, value in common.items() if key != absent for part in (f"--{key}", str(value))]
        flags += [part for text in options for part in text.split()]
        result = CliRunner().invoke(app, [name, *flags], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        record = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert record["analysis"] == name and record["data"]["config"]["batch_size"] == 8
        return " ".join(result.output.split()), record["data"]

    return run
