"""docs/results.md quotes committed SFT results only."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def rows() -> list[str]:
    """The table's rows as the files give them."""
    rows = []
    for path in sorted(RESULTS.glob("sft_*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        config = report["config"]
        assert all(saving["reached"] for saving in report["savings"])
        name = {"tiny": "embedded", "smollm2-135m": "SmolLM2-135M"}[config["model"]]
        name += f", batch {config['batch_size']}" if config["batch_size"] != 32 else ""
        for lr in {saving["lr"] for saving in report["savings"]}:
            saved = sorted(s["flops_measured"] for s in report["savings"] if s["lr"] == lr)
            text = f"{saved[0]:.0%}".replace("%", " %")
            if len(saved) > 1:
                text += f" – {saved[-1]:.0%}".replace("%", " %") + f" ({len(saved)} seeds)"
            rate = f"{lr:.0e}".replace("e-0", "e-")
            rows.append(f"| {name} | {rate} | {config['steps']} | {text} |")
    return rows


def test_the_sft_table_is_that_of_the_files():
    wanted = rows()
    assert len(wanted) >= 5
    assert sorted(wanted) == sorted(
        line for line in DOC.splitlines() if line.startswith(("| embedded |", "| SmolLM2"))
    )
