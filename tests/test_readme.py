"""README quotes committed results only: its numbers are made here again from the files it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
ROWS = {
    "adam": "Adam, lr 1e-4",
    "linear": "Fast Forward, `linear` (the paper's)",
    "parabolic": "Fast Forward, `parabolic`",
    "adam-tuned": "Adam, lr 1e-2 (tuned)",
}


SHORT = re.compile(r"<!-- results: end-to-end-short -->\n(.*?)<!-- end of results -->", re.DOTALL)


def load(name: str) -> dict:
    assert name in README, f"README does not name {name}"
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")


def table_rows(report: dict) -> list[str]:
    savings = {entry["name"]: entry for entry in report["savings"]}
    rows = []
    for kind, label in ROWS.items():
        runs = [run for run in report["runs"] if re.fullmatch(rf"{kind}-s\d+", run["name"])]
        assert len(runs) == 3
        cells = [
            f"{median(run['optimizer_steps'] for run in runs):.0f}",
            f"{median(run['validation_forwards'] for run in runs):.0f}",
            f"{median(run['flops']['measured'] for run in runs) / 1e12:.3f}",
            f"{median(run['seconds']['total'] for run in runs):.1f}",
        ]
        saved = savings.get(f"{kind}-median")
        for key in ("flops_measured", "flops_paper", "seconds"):
            cells.append(percent(saved[key]) if saved else "")
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


@pytest.mark.parametrize(("batch", "date"), [(64, "2026-11-21"), (16, "2026-11-29")])
def test_the_table_is_that_of_the_result_file(batch, date):
    report = load(f"compare_tiny_batch{batch}_{date}.json")
    assert report["config"]["batch_size"] == batch
    for row in table_rows(report):
        assert row in README


def test_the_first_sentence_is_the_parabolic_median():
    report = load("compare_tiny_batch64_2026-11-21.json")
    saved = next(entry for entry in report["savings"] if entry["name"] == "parabolic-median")
    claim = (
        f"{percent(saved['flops_measured'])} fewer FLOPs and {percent(saved['seconds'])} less training time"
    )
    assert claim in README
    forwards = {run["name"]: run["validation_forwards"] for run in report["runs"]}
    counts = {
        kind: median(forwards[f"{kind}-s{seed}"] for seed in range(3)) for kind in ("linear", "parabolic")
    }
    assert f"asks for\n{counts['parabolic']} losses where the paper's asks for {counts['linear']}" in README


def end_to_end_rows(report: dict) -> list[str]:
    """A line per task, from the savings of every seed, not from the medians that the file holds as well."""
    found: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    least = min(cell["batch_size"] for cell in report["cells"])
    for cell in report["cells"]:
        if cell["tuned"] or cell["method"] != report["cells"][0]["method"] or cell["batch_size"] != least:
            continue
        for entry in (entry for one in cell["rounds"] for entry in one["savings"]):
            kind = re.sub(r"-s\d+$", "", entry["name"])
            shares = (entry["flops_measured"], entry["seconds"])
            found.setdefault((cell["task"], cell["lr"], kind), []).append(shares)
    rates = sorted({lr for _, lr, _ in found})
    wanted = [(lr, kind) for kind in ("parabolic", "linear") for lr in rates] + [(rates[0], "adam-tuned")]
    rows = []
    for task in {task for task, *_ in found}:
        cells = []
        for lr, kind in wanted:
            shares = found.get((task, lr, kind))
            if shares is None:
                cells.append("–")
            elif any(None in share for share in shares):
                cells.append("not reached")
            else:
                cells.append(", ".join(percent(median(share)) for share in zip(*shares, strict=True)))
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return rows


def test_the_three_tasks_are_those_of_the_result_files():
    (block,) = SHORT.findall(README)
    files = sorted(RESULTS.glob("end_to_end_*.json"))
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    assert not any(report["fast"] for report in reports), "a result of --fast means nothing"
    rows = [row for report in reports for row in end_to_end_rows(report)]
    assert sorted(rows) == sorted(
        line for line in block.splitlines() if re.match(r"\| (instruction|medical|chat) \|", line)
    )
    assert ("not measured yet" in block) == (not files)


def test_the_rows_of_a_result_are_medians_of_its_seeds():
    def cell(lr, tuned=False):
        rounds = [
            {
                "savings": [
                    {"name": f"{kind}-s{seed}", "flops_measured": share + seed / 100, "seconds": share - 0.1}
                    for kind, share in (("linear", -0.2), ("parabolic", 0.8), ("adam-tuned", 0.95))
                ]
            }
            for seed in (0, 1, 2)
        ]
        return {
            "task": "chat",
            "method": "lora",
            "lr": lr,
            "tuned": tuned,
            "batch_size": 64,
            "rounds": rounds,
        }

    report = {"cells": [cell(3e-4), cell(1e-4), cell(1e-2, tuned=True)]}
    report["cells"][0]["rounds"][1]["savings"][0]["flops_measured"] = None
    rows = end_to_end_rows(report)
    assert rows == ["| chat | 81 %, 70 % | 81 %, 70 % | −19 %, −30 % | not reached | 96 %, 85 % |"]


def test_the_steps_ratios_are_those_of_the_result_file():
    adapters = load("step_cpu_2026-11-21.json")["adapters"]
    for name, result in adapters.items():
        ratios = [
            f"{result['modes'][mode][other]['ours_over_this']:.2f}"
            for mode in ("warm", "cold")
            for other in ("foreach", "loop", "state_dict")
        ]
        assert f"| {name} | {' | '.join(ratios)} |" in README


def test_that_no_stage_runs_at_a_tuned_learning_rate_is_in_the_result_file():
    report = load("compare_tiny_tuned_lr_batch16_2026-11-29.json")
    config = report["config"]
    assert (config["lr"], config["batch_size"], config["steps"]) == (1e-2, 16, 240)
    runs = {run["name"]: run for run in report["runs"]}
    for seed in range(3):
        adam, ours = (runs[f"{name}-s{seed}"] for name in ("adam", "parabolic"))
        assert ours["stages"] == ours["validation_forwards"] == 0
        step = adam["flops"]["measured"] / adam["optimizer_steps"]
        assert ours["flops"]["measured"] == pytest.approx(step * ours["optimizer_steps"], rel=1e-2)
    assert "at 1e-2 none ran in 240 steps of batch 16, with three seeds" in " ".join(README.split())
