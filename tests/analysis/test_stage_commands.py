from __future__ import annotations


def test_loss(analyze):
    words, data = analyze("loss", "--steps", "8", "--interval", "3", "--lr", "3e-4")
    stages = data["fast_forward"]["stages"]
    assert len(stages) == 2 and len(data["optimizer"]["steps"]) == 8
    fell = sum(dict(s["test_losses"])[s["tau"]] < s["test_losses"][0][1] for s in stages if s["tau"])
    walked = sum(s["tau"] > 0 for s in stages)
    assert f"In {fell} of the {walked} stages that took steps the test loss" in words
    assert f"{data['optimizer']['steps'][-1]['test_loss']:.4f} without" in words
    assert f"which had the former after {data['reached']}." in words


def test_tau_sweep(analyze):
    words, data = analyze("tau-sweep", "--at", "4,2", "--taus", "10")
    assert data["config"]["fast_forward"] is None and len(data["taus"]) == 11
    shapes = [sweep[f"of_{loss}"] for sweep in data["sweeps"] for loss in ("validation", "test")]
    assert f"{sum(s['unimodal'] for s in shapes)} of 4 curves have one minimum" in words
    shares = [s["convex_share"] for s in shapes]
    assert f"{100 * min(shares):.0f} % to {100 * max(shares):.0f} % of their second differences" in words


def test_tau_sweep_with_stages(analyze):
    _, data = analyze("tau-sweep", "--at", "2,4", "--taus", "5", "--fast-forward", "--interval", "2")
    assert data["config"]["fast_forward"]["interval"] == 2


def test_stages(analyze):
    words, data = analyze("stages", "--steps", "8", "--interval", "2", "--seeds", "2")
    assert {stage["seed"] for stage in data["stages"]} == {0, 1} and len(data["stages"]) == 8
    rho = data["correlations"]["gradient_norm"]["rho"]
    assert f"τ* and the gradient norm: ρ = {rho:.2f}".replace("-", "−") in words
    assert "of 8 stages took no step" in words
