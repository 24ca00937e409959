from __future__ import annotations

from typer.testing import CliRunner

from ffkernels.analysis.commands import app
from ffkernels.analysis.show import than_adam
from ffkernels.training.compare import Interrupted


def test_interval(analyze):
    words, data = analyze("interval", "--intervals", "2,4", "--check-every", "1")
    assert [run["interval"] for run in data["runs"]] == [2, 4] and data["check_every"] == 1
    best = max(data["runs"], key=lambda run: run["saved"]["measured"])
    assert f"Cheapest at interval {best['interval']}: {than_adam(best['saved']['measured'])}" in words
    assert "Picture: " in words


def test_rank(analyze):
    words, data = analyze("rank", "--ranks", "2", "--scaling", "fixed", "--interval", "4")
    assert [(run["rank"], run["alpha"]) for run in data["runs"]] == [(2, 16)]
    assert data["config"]["fast_forward"]["interval"] == 4 and "Cheapest at rank 2: " in words


def test_full_rank(analyze):
    words, data = analyze("full-rank", "--full-lr", "5e-4")
    assert [run["lr"] for run in data["runs"]] == [1e-3, 1e-3, 5e-4, 5e-4]
    for run in data["runs"]:
        assert f"{run['name']}: {len(run['ff']['stages'])} stages took {run['ff_steps']} steps" in words


def test_convergence(analyze):
    words, data = analyze("convergence", "--window", "4", "--evaluate-every", "2", "--patience", "1")
    assert data["config"]["fast_forward"]["patience"] == 1 and data["window"] == 4
    off = data["switched_off_at"]
    assert (f"switched itself off after optimizer step {off}" if off else "stayed on through all") in words
    if not all(run["converged"] for run in data["runs"]):
        assert "raise --steps" in words


def test_accuracy(analyze, tmp_path):
    words, data = analyze("accuracy", "--questions", "8", "--choices", "3", "--opening", "0")
    pair = data["paired"]["sum"]
    assert data["questions"] == 8 and data["choices"] == [3, 3]
    assert f"Adam alone is right on {pair['adam_only']} of 8 questions" in words
    assert "(McNemar's exact test: p = " in words and "before training" in words


def test_ctrl_c_writes_nothing(analyze, tmp_path, monkeypatch):
    def interrupted(config, **options):
        raise Interrupted("adam-s0")

    monkeypatch.setattr("ffkernels.analysis.interval_sweep.interval", interrupted)
    result = CliRunner().invoke(app, ["interval", "--out", str(tmp_path)])
    assert result.exit_code == 130 and "interrupted in adam-s0; nothing was written" in result.output
    assert not list(tmp_path.iterdir())
