import pytest
from typer.testing import CliRunner

from ffkernels.analysis.commands import app
from ffkernels.analysis.show import than_adam
from ffkernels.reporting.numbers import percent
from ffkernels.training.compare import Interrupted


@pytest.mark.parametrize(
    ("name", "more", "shown"),
    [
        ("gradients", "--batches 3", ["consistency before", "Gradients of different batches agree"]),
        ("similarity", "--window 4", ["all earlier steps", "A gradient's mean cosine"]),
        ("plane", "--grid 3 --examples 4", ["W_FF", "the straight line from W_SGD to W_FF"]),
    ],
)
def test_a_command_prints_what_was_seen_and_writes_data_and_picture(analyze, name, more, shown):
    words, data = analyze(name, "--interval 3 --max-tau 20", more)
    for text in (*shown, f"{name}.json", f"{name}.png"):
        assert text in words
    assert data["config"]["steps"] == 8 and data["config"]["fast_forward"]["interval"] == 3


def test_loss(analyze):
    words, data = analyze("loss", "--steps 8 --interval 3 --lr 3e-4")
    stages = data["fast_forward"]["stages"]
    assert len(stages) == 2 and len(data["optimizer"]["steps"]) == 8
    fell = sum(dict(s["test_losses"])[s["tau"]] < s["test_losses"][0][1] for s in stages if s["tau"])
    walked = sum(s["tau"] > 0 for s in stages)
    assert f"In {fell} of the {walked} stages that took steps the test loss" in words
    assert f"{data['optimizer']['steps'][-1]['test_loss']:.4f} without" in words
    assert f"which had the former after {data['reached']}." in words


def test_tau_sweep(analyze):
    words, data = analyze("tau-sweep", "--at 4,2 --taus 10")
    assert data["config"]["fast_forward"] is None and len(data["taus"]) == 11
    shapes = [sweep[f"of_{loss}"] for sweep in data["sweeps"] for loss in ("validation", "test")]
    assert f"{sum(s['unimodal'] for s in shapes)} of 4 curves have one minimum" in words
    shares = [s["convex_share"] for s in shapes]
    assert f"{percent(min(shares))} to {percent(max(shares))} of their second differences" in words
    _, data = analyze("tau-sweep", "--at 2,4 --taus 5 --fast-forward --interval 2")
    assert data["config"]["fast_forward"]["interval"] == 2


def test_stages(analyze):
    words, data = analyze("stages", "--steps 8 --interval 2 --seeds 2")
    assert {stage["seed"] for stage in data["stages"]} == {0, 1} and len(data["stages"]) == 8
    rho = data["correlations"]["gradient_norm"]["rho"]
    assert f"τ* and the gradient norm: ρ = {rho:.2f}".replace("-", "−") in words
    assert "of 8 stages took no step" in words


def test_interval(analyze):
    words, data = analyze("interval", "--intervals 2,4 --check-every 1")
    assert [run["interval"] for run in data["runs"]] == [2, 4] and data["check_every"] == 1
    best = max(data["runs"], key=lambda run: run["saved"]["measured"])
    assert f"Cheapest at interval {best['interval']}: {than_adam(best['saved']['measured'])}" in words
    assert "Picture: " in words


def test_rank(analyze):
    words, data = analyze("rank", "--ranks 2 --scaling fixed --interval 4")
    assert [(run["rank"], run["alpha"]) for run in data["runs"]] == [(2, 16)]
    assert data["config"]["fast_forward"]["interval"] == 4 and "Cheapest at rank 2: " in words


def test_full_rank(analyze):
    words, data = analyze("full-rank", "--full-lr 5e-4")
    assert [run["lr"] for run in data["runs"]] == [1e-3, 1e-3, 5e-4, 5e-4]
    for run in data["runs"]:
        assert f"{run['name']}: {len(run['ff']['stages'])} stages took {run['ff_steps']} steps" in words


def test_convergence(analyze):
    words, data = analyze("convergence", "--window 4 --evaluate-every 2 --patience 1")
    assert data["config"]["fast_forward"]["patience"] == 1 and data["window"] == 4
    off = data["switched_off_at"]
    assert (f"switched itself off after optimizer step {off}" if off else "stayed on through all") in words
    assert all(run["converged"] for run in data["runs"]) or "raise --steps" in words


def test_accuracy(analyze):
    words, data = analyze("accuracy", "--questions 8 --choices 3 --opening 0")
    pair = data["paired"]["sum"]
    assert data["questions"] == 8 and data["choices"] == [3, 3]
    assert f"Adam alone is right on {pair['adam_only']} of 8 questions" in words
    assert "(McNemar's exact test: p = " in words and "before training" in words


def test_ctrl_c_writes_nothing(tmp_path, monkeypatch):
    def interrupted(config, *, intervals, check_every, watch):
        raise Interrupted("adam-s0")

    monkeypatch.setattr("ffkernels.analysis.sweeps.interval", interrupted)
    result = CliRunner().invoke(app, ["interval", "--out", str(tmp_path)])
    assert result.exit_code == 130 and "interrupted in adam-s0; nothing was written" in result.output
    assert not list(tmp_path.iterdir())
