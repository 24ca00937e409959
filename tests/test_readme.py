"""README and docs/results.md quote committed results only: their numbers are made here again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SAID = " ".join(README.split())
DOC = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
ROWS = {
    "adam": "Adam, lr 1e-4",
    "linear": "Fast Forward, `linear` (the paper's)",
    "parabolic": "Fast Forward, `parabolic`",
    "auto": "Adam, no learning rate given",
    "adam-tuned": "Adam, lr 1e-2 (tuned)",
}
UNTUNED = ROWS | {"adam-untuned": "Adam, lr 1e-2 (tuned elsewhere)"}
del UNTUNED["adam-tuned"]


def load(name: str) -> dict:
    files = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in files, f"benchmarks/results/README.md does not list {name}"
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def percent(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")


def table_rows(report: dict) -> list[str]:
    savings = {entry["name"]: entry for entry in report["savings"]}
    rows = []
    untuned = any(run["name"].startswith("adam-untuned") for run in report["runs"])
    for kind, label in (UNTUNED if untuned else ROWS).items():
        runs = [run for run in report["runs"] if re.fullmatch(rf"{kind}-s\d+", run["name"])]
        assert len(runs) == 3
        cells = [
            f"{median(run['optimizer_steps'] for run in runs):.0f}",
            f"{median(run['validation_forwards'] for run in runs):.0f}",
            f"{median(run['flops']['measured'] for run in runs) / 1e12:.3f}",
            f"{median(run['seconds']['total'] for run in runs):.1f}",
        ]
        saved = savings.get(f"{kind.replace('untuned', 'tuned')}-median")
        for key in ("flops_measured", "flops_paper", "seconds"):
            cells.append(percent(saved[key]) if saved else "")
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


@pytest.mark.parametrize("batch", [64, 16])
def test_the_table_is_that_of_the_result_file(batch):
    report = load(f"compare_tiny_batch{batch}_2026-11-29.json")
    assert report["config"]["batch_size"] == batch
    for row in table_rows(report):
        assert (row in README) == (batch == 64) and (row in DOC) == (batch == 16)


def test_what_is_said_of_the_paper_s_search_at_a_small_batch():
    savings = {entry["name"]: entry for entry in load("compare_tiny_batch16_2026-11-29.json")["savings"]}
    assert all(savings["linear-median"][cost] < 0 for cost in ("flops_measured", "flops_paper", "seconds"))
    assert "at batch 16 more than it saves" in SAID


@pytest.mark.parametrize("batch", [64, 16])
def test_that_no_learning_rate_saves_as_much_is_in_the_result_file(batch):
    savings = {e["name"]: e for e in load(f"compare_tiny_batch{batch}_2026-11-29.json")["savings"]}
    auto, ours, tuned = (savings[f"{kind}-median"] for kind in ("auto", "parabolic", "adam-tuned"))
    assert tuned["flops_measured"] > auto["flops_measured"] >= ours["flops_measured"]
    assert '`learning_rate="auto"` saves as much, without stages' in SAID


def test_the_first_sentence_is_the_parabolic_median():
    report = load("compare_tiny_batch64_2026-11-29.json")
    saved = next(entry for entry in report["savings"] if entry["name"] == "parabolic-median")
    claim = (
        f"{percent(saved['flops_measured'])} fewer FLOPs and {percent(saved['seconds'])} less training time"
    )
    assert claim in SAID
    assert "(benchmarks/results/compare_tiny_batch64_2026-11-29.json)" in README
    forwards = {run["name"]: run["validation_forwards"] for run in report["runs"]}
    counts = {
        kind: median(forwards[f"{kind}-s{seed}"] for seed in range(3)) for kind in ("linear", "parabolic")
    }
    assert (
        f"one validation per step: {counts['linear']} where the default takes {counts['parabolic']}" in SAID
    )


def medians(report: dict) -> dict[tuple[str, str, str], list[str]]:
    """By cost, task and rate: what each search and the tuned rate saved, from the savings of every seed."""
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for cell in (cell for cell in report["cells"] if not cell["tuned"]):
        lr = f"{cell['lr']:.0e}".replace("e-0", "e-")
        for entry in (entry for one in cell["rounds"] for entry in one["savings"]):
            kind = re.sub(r"-s\d+$", "", entry["name"])
            for cost in ("flops_measured", "flops_paper", "seconds"):
                found.setdefault((cost, cell["task"], lr), {}).setdefault(kind, []).append(entry[cost])
    return {
        key: [percent(median(of[kind])) for kind in ("linear", "parabolic", "adam-tuned")]
        for key, of in found.items()
    }


def shown(caption: str) -> dict[tuple[str, str], list[str]]:
    """The medians in one of the tables of the end-to-end result, without their ranges."""
    embedded = DOC.partition("### The embedded model")[2].partition("\n### ")[0]
    (table,) = re.findall(rf"^\*\*{re.escape(caption)}.*?:\n\n(.*?)\n\n", embedded, re.DOTALL | re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {(task, lr): [cell.partition(" (")[0] for cell in cells] for task, lr, *cells in rows}


def test_the_three_tasks_are_those_of_the_result_file():
    (path,) = RESULTS.glob("end_to_end_tiny_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert not report["fast"], "a result of --fast means nothing"
    wanted = medians(report)
    for cost, caption in (
        ("flops_measured", "FLOPs saved** (the paper's Figure 2), measured"),
        ("flops_paper", "FLOPs saved**, in the paper's count"),
        ("seconds", "Time saved** (the paper's Figure 3)"),
    ):
        assert shown(caption) == {key[1:]: cells for key, cells in wanted.items() if key[0] == cost}
    said = " ".join(DOC.partition("## ")[0].split())
    for lr, words in (("1e-4", "{} to {} % fewer FLOPs at 1e-4"), ("3e-4", "{} to {} % fewer at 3e-4")):
        cells = [int(row[1][:-2]) for key, row in wanted.items() if key[::2] == ("flops_measured", lr)]
        assert words.format(min(cells), max(cells)) in said
    tuned = [int(row[2][:-2]) for key, row in wanted.items() if key[0] == "flops_measured"]
    assert f"saves {min(tuned)} to {max(tuned)} % on the same way" in said


def test_the_medians_of_a_result_are_those_of_its_seeds():
    rounds = [
        {
            "savings": [
                {"name": f"{kind}-s{seed}", "flops_measured": share + seed / 100, "seconds": share - 0.1}
                | {"flops_paper": share}
                for kind, share in (("linear", -0.2), ("parabolic", 0.8), ("adam-tuned", 0.95))
            ]
        }
        for seed in (0, 1, 2)
    ]
    cells = [{"task": "chat", "lr": lr, "tuned": lr == 1e-2, "rounds": rounds} for lr in (3e-4, 1e-2)]
    assert medians({"cells": cells}) == {
        ("flops_measured", "chat", "3e-4"): ["−19 %", "81 %", "96 %"],
        ("flops_paper", "chat", "3e-4"): ["−20 %", "80 %", "95 %"],
        ("seconds", "chat", "3e-4"): ["−30 %", "70 %", "85 %"],
    }


def test_the_steps_ratios_are_those_of_the_result_file():
    adapters = load("step_cpu_2026-11-21.json")["adapters"]
    for name, result in adapters.items():
        ratios = [
            f"{result['modes'][mode][other]['ours_over_this']:.2f}"
            for mode in ("warm", "cold")
            for other in ("foreach", "loop", "state_dict")
        ]
        assert f"| {name} | {' | '.join(ratios)} |" in DOC


@pytest.mark.parametrize(("batch", "steps"), [(64, 120), (16, 240)])
def test_that_no_stage_runs_at_a_tuned_learning_rate_is_in_the_result_file(batch, steps):
    report = load(f"compare_tiny_tuned_lr_batch{batch}_2026-11-29.json")
    config = report["config"]
    assert (config["lr"], config["batch_size"], config["steps"]) == (1e-2, batch, steps)
    runs = {run["name"]: run for run in report["runs"]}
    for seed in range(3):
        adam, ours = (runs[f"{name}-s{seed}"] for name in ("adam", "parabolic"))
        assert ours["stages"] == ours["validation_forwards"] == 0
        step = adam["flops"]["measured"] / adam["optimizer_steps"]
        assert ours["flops"]["measured"] == pytest.approx(step * ours["optimizer_steps"], rel=1e-2)
    said = "at 1e-2 none ran in 120 steps of batch 64 or 240 of batch 16, with three seeds"
    assert said in " ".join(DOC.split()) and "and no stage runs" in SAID


def test_where_no_learning_rate_is_worse_than_one_is_said():
    doc = " ".join(DOC.split())
    runs = {
        name: {run["name"]: run for run in load(f"compare_tiny_{name}_2026-11-29.json")["runs"]}
        for name in ("batch64", "batch16", "tuned_lr_batch64", "tuned_lr_batch16")
    }
    for name in ("batch64", "batch16"):
        for seed in range(3):
            kinds = "auto", "adam-tuned" if name == "batch64" else "adam-untuned"
            auto, tuned = (runs[name][f"{kind}-s{seed}"] for kind in kinds)
            assert auto["optimizer_steps"] == 15
            assert 2 < auto["flops"]["measured"] / tuned["flops"]["measured"] < 3
    assert "its rise takes ten of 15 steps, and it needs more than twice the FLOPs of the tuned rate" in doc
    above = [
        runs["tuned_lr_batch64"][f"auto-s{seed}"]["test_loss"]
        / runs["tuned_lr_batch64"][f"adam-s{seed}"]["test_loss"]
        - 1
        for seed in range(3)
    ]
    missed = sum(share > 1e-3 for share in above)
    assert missed == 3 and "with three seeds of three" in doc
    worst = f"ends {100 * max(above):.1f} % above"
    assert worst in doc
    steps = [runs["tuned_lr_batch16"][f"auto-s{seed}"]["optimizer_steps"] for seed in range(3)]
    assert f"it is there after {min(steps)} to {max(steps)} of 240" in doc


def test_what_no_learning_rate_leaves_is_in_the_result_file(benchmarks):
    data = load("rate_workloads_2026-11-30.json")
    entries = data["evaluation"]
    tuned = [entry["tuned_lr"] for entry in entries]
    assert max(tuned) / min(tuned) == 4000 and not any(entry["seeds"][0] >= 10 for entry in entries)
    shares = {
        name: [share for entry in entries for share in entry["share"][name]] for name in entries[0]["share"]
    }
    auto = shares["auto"]
    others = [of for name, of in shares.items() if name != "auto"]
    assert max(auto) <= 0.08 and median(auto) <= 0.02
    assert all(median(auto) < median(of) and max(auto) < max(of) for of in others)
    worst = next(entry["workload"] for entry in entries if max(auto) in entry["share"]["auto"])
    assert ", prompt, " in worst
    assert (
        f"On {len(entries)} workloads whose tuned rates lie a factor of 4,000 apart it leaves "
        f"{100 * median(auto):.1f} % of the loss that tuned Adam recovers, in the median of {len(auto)} "
        f"runs, and {100 * max(auto):.1f} % in the worst, prompt tuning"
    ) in SAID
    assert len(others) == 14 and "[all fourteen others]" in SAID
    few = [entry for entry in entries if "batch 4, 100 steps" not in entry["workload"]]
    took = f"{data['seconds'] / 3600:.1f} hours for {len(data['runs'])} runs"
    assert took in " ".join(benchmarks("learning_rate").__doc__.split())
    count = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    runs = count[sum(len(entry["seeds"]) for entry in few)]
    assert f"100 steps of batch 4; {runs} of the runs with batch 32, 128 or 1,000 steps" in SAID


def test_what_a_real_model_says_is_in_the_result_file(benchmarks):
    results = benchmarks("learning_rate.table").Results(load("alignment_rates_smollm2_2026-11-30.json"))
    above = [(line["workload"], results.above(line)) for line in results.of("auto")]
    shares = [share for _, share in above]
    near = [share for share in shares if share <= 0.03]
    assert f"within 3 % of tuned Adam's loss in {len(near)} of {len(above)} runs" in SAID
    assert len(above) == len(near) + 1 and f"in the twelfth {100 * max(shares):.1f} % above it" in SAID
    lora = [share for name, share in above if ", lora" in name]
    assert (sum(share < 0 for share in lora), len(lora)) == (7, 8)
    beside = []
    for (name, seed), best in results.tuned.items():
        mine = [line for line in results.of("adam") if (line["workload"], line["seed"]) == (name, seed)]
        if seed == 1 and {best["lr"] / 2, 2 * best["lr"]} <= {line["lr"] for line in mine}:
            beside.append(name)
    assert len(beside) == 3 and all(", lora" in name for name in beside)
    assert "in three of LoRA's cells only" in " ".join(DOC.split())
    assert "In seven of LoRA's eight runs" in " ".join(DOC.split())


def test_how_many_of_peft_s_methods_are_near_is_in_the_result_file(benchmarks):
    entries = benchmarks("learning_rate.peft_table").entries(load("peft_methods_2026-11-29.json"))
    shares = {one.method.label: one.share(one.auto) for one in entries}
    near = sum(share <= 0.08 for share in shares.values())
    assert (
        len(shares) == 43
        and "[43 of PEFT's methods]" in SAID
        and f" {near} are within 8 %; C3A fails." in SAID
    )
    assert max(shares, key=shares.get) == "C3A" and shares["C3A"] > 1
