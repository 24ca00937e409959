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


@pytest.mark.parametrize("batch", [64, 16])
def test_the_table_is_that_of_the_result_file(batch):
    report = load(f"compare_tiny_batch{batch}_2026-11-21.json")
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


def test_the_steps_ratios_are_those_of_the_result_file():
    adapters = load("step_cpu_2026-11-21.json")["adapters"]
    for name, result in adapters.items():
        ratios = [
            f"{result['modes'][mode][other]['ours_over_this']:.2f}"
            for mode in ("warm", "cold")
            for other in ("foreach", "loop", "state_dict")
        ]
        assert f"| {name} | {' | '.join(ratios)} |" in README
