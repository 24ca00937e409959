"""What is said of shares: costs read off curves, ranks, who beats "auto", candidates, profile, documents."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import record as files

ROOT = Path(__file__).resolve().parents[1]
INF = math.inf
CURVE = [[0.5, 10.0, 2.5], [1.0, 20.0, 2.0]]
RIVALS = ("gala", "gen", "greedy", "hypergradient", "lightning", "mechanic", "prodigy", "schedule-free+")
FIXED = ("Fast Forward, 1e-4", "Adam, 1e-4", "Adam, 2e-4", "Adam, one constant (3e-3)")


@pytest.fixture()
def bench(benchmarks):
    """The benchmark's modules by name."""
    names = ("workloads", "plan", "record", "table", "shares", "profile")
    return SimpleNamespace(**{name: benchmarks(f"learning_rate.{name}") for name in names})


def line_of(run, loss, **fields):
    workload = run.workload
    return {
        **{"key": run.key, "workload": workload.name, "group": workload.group, **vars(workload)},
        **{"seed": run.seed, "contender": run.contender, "lr": run.lr, "loss": loss, "start": 4.0},
        **{"own": 0.0, "worst": 1.0, "worst_at": 1, "seconds": 20.0, "curve": CURVE},
        **{"rate": run.lr or 0.0123456, "commit": "abc", **fields},
    }


@pytest.mark.parametrize(
    "curve, expected",
    [
        ([[0.1, 2.0, 3.0], [0.2, 4.0, 2.0]], (0.15, 3.0)),  # 2.5 lies half way
        ([[0.2, 4.0, 2.5]], (0.2, 4.0)),
        ([[0.2, 4.0, 2.0]], (0.15, 3.0)),  # from 4 at no cost
        ([[0.6, 4.0, 2.0]], (0.6, 4.0)),  # half of the budget was spent on something else
        ([[0.1, 2.0, None], [0.2, 4.0, 2.0]], (0.2, 4.0)),
        ([[0.1, 2.0, 2.0], [0.2, 4.0, 3.0]], (0.075, 1.5)),  # that it rose again is another matter
        ([[0.1, 2.0, 3.0], [1.0, 4.0, 2.6]], (INF, INF)),
        ([], (INF, INF)),
    ],
)
def test_where_a_curve_gets_to_a_loss(bench, curve, expected):
    assert bench.shares.reached(curve, 4.0, 2.5) == pytest.approx(expected)


def evidence(bench, **shares):
    """A result of one workload, a seed per share; contenders by name, of which all have the curve CURVE."""
    workload = bench.workloads.Workload("chat", 4, 100)
    count = len(next(iter(shares.values())))
    runs = []
    for seed in range(count):
        runs.append(line_of(bench.plan.Run(workload, seed, "adam", 1e-2), 2.0))
        runs += [line_of(bench.plan.Run(workload, seed, name), 2.5) for name in shares]
    config = {"constant": 3e-3, "hypergradient": "hypergradient 1e-5", "model": "tiny", "rank": 8}
    config |= {"max_length": 64, "optimizer": "AdamW", "warmup_steps": "8, of auto none"}
    one = {"workload": workload.name, "tuned_lr": 1e-2, "tuned_lrs": [1e-2] * count, "inside": True}
    one |= {"seeds": list(range(count)), "share": shares}
    fields = {"group": workload.group, **vars(workload)}
    return {
        **{"kind": "rate_workloads", "evaluation": [one], "calibration": [], "incomplete": []},
        **{"workloads": {workload.name: fields}, "runs": runs, "config": config},
        **{"command": "python x", "machine": {"cpu": "a CPU", "threads": 1, "gpus": []}},
        "versions": {"git_commit": "abc", "torch": "2", "transformers": "5", "peft": "0.2"},
    }


def test_costs_are_multiples_of_what_the_oracle_needs(bench):
    data = evidence(bench, auto=[0.1, 0.1, 0.1], gen=[0.1, 0.1, 0.1])
    # The oracle ends at 2; 2 % of what it recovers is 0.04: at 2.04, 0.92 of the second half is behind it.
    own = (0.5 + 0.46 / 0.5 * 0.5, 10 + 0.46 / 0.5 * 10)
    curves = {0: [[0.48, 5.0, 2.04]], 1: [[1.0, 20.0, 2.05]], 2: [[0.96, 9.6, 2.0]]}  # all charged before
    for run in data["runs"]:
        if run["contender"] == "gen":
            run["curve"] = curves[run["seed"]]
    shares = bench.shares.Shares(data)
    assert shares.costs("auto") == [(1.0, 1.0)] * 3
    flops, seconds = zip(*shares.costs("gen"), strict=True)
    assert flops == pytest.approx((0.48 / own[0], INF, 0.96 / own[0]))
    assert seconds == pytest.approx((5 / own[1], INF, 9.6 / own[1]))
    row = next(row for row in bench.shares.standing(data).splitlines() if row.startswith("| GeN"))
    assert row.endswith("| 0 | 1.00 | 0.50 |")
    for run in data["runs"]:
        if (run["contender"], run["seed"]) == ("gen", 0):
            run["curve"] = None  # two of three never get there
    row = next(row for row in bench.shares.standing(data).splitlines() if row.startswith("| GeN"))
    assert row.endswith("| 0 | never | never |")
    for run in data["runs"]:
        run["start"] = 1.9  # a quarter of the examples says nothing there
    assert bench.shares.Shares(data).costs("gen") == []


def test_a_row_per_contender_the_lowest_median_first(bench):
    data = evidence(
        bench,
        auto=[0.01, 0.03, 0.09],
        gen=[0.02, -0.01, 0.05],
        greedy=[0.9, None, None],
        gala=[0.03, 0.08, None],
    )
    head, _, tuned, *rows = bench.shares.standing(data).splitlines()
    assert head.startswith(
        "| not recovered, 3 runs | median | worst | within 2 % | within 8 % | not finite |"
    )
    assert tuned == "| Adam, tuned; its sweep charged to nobody | +0.0 % | +0.0 % | 3 | 3 | 0 | 1.00 | 1.00 |"
    mine = ('`learning_rate="auto"`', "+3.0 %", "+9.0 %", "1", "2", "0", "1.00", "1.00")
    assert rows == [
        "| GeN | +2.0 % | +5.0 % | 2 | 3 | 0 | 1.00 | 1.00 |",
        "| " + " | ".join(f"**{cell}**" for cell in mine) + " |",
        "| GALA | +8.0 % | not finite | 0 | 2 | 1 | 1.00 | 1.00 |",
        "| GreedyLR | not finite | not finite | 0 | 0 | 2 | 1.00 | 1.00 |",
    ]


def test_the_short_list_has_auto_wherever_it_stands(bench):
    """Five lowest medians, the two lowest worst cases; "auto" is the last in both here."""
    medians = dict(zip(RIVALS[:7], (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07), strict=True))
    data = evidence(bench, auto=[0.2, 0.8, 0.9], **{n: [0.0, middle, 0.5] for n, middle in medians.items()})
    rows = bench.shares.shortlist(data).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [
        *("+1.0 %", "+2.0 %", "+3.0 %", "+4.0 %", "+5.0 %"),
        "**+80.0 %**",
    ]
    assert rows[-1] == '| **`learning_rate="auto"`** | **+80.0 %** | **+90.0 %** | **0** |'


def test_who_beats_auto_in_both_comes_before_who_beats_it_in_one(bench):
    data = evidence(
        bench, auto=[0.04, 0.04, 0.5], gen=[0.01, 0.01, 0.9], gala=[0.02, 0.02, 0.4], greedy=[0.1, 0.2, None]
    )
    assert bench.shares.beaten(data).splitlines() == [
        "- GALA: median +2.0 % against +4.0 %; worst +40.0 % against +50.0 %; lower in 3 of 3 runs",
        "- GeN: median +1.0 % against +4.0 %; worst +90.0 % against +50.0 %, which is no better; "
        "lower in 2 of 3 runs",
    ]
    assert bench.shares.beaten(evidence(bench, auto=[0.01], greedy=[0.01])) == "*none.*"


def test_a_row_per_workload_and_how_far_tuned_rates_lie_apart(bench):
    data = evidence(bench, auto=[0.02, None], gen=[0.3, 0.1], gala=[0.1, None])
    data["runs"][0] |= {"loss": 1.9, "start": 4.1}
    workload = bench.workloads.Workload("medical", 4, 100)
    data["workloads"][workload.name] = {"group": workload.group, **vars(workload)}
    data["evaluation"] += evidence(bench, auto=[0.1], gen=[0.2])["evaluation"]
    data["evaluation"][1] |= {"workload": workload.name, "tuned_lr": 4e-2, "tuned_lrs": [4e-2]}
    data["evaluation"][1]["inside"] = False
    data["runs"] += [line_of(bench.plan.Run(workload, 0, c), 2.0) for c in ("auto", "gen")]
    data["runs"].append(line_of(bench.plan.Run(workload, 0, "adam", 4e-2), 2.0))
    _, _, chat, medical = bench.shares.each_workload(data).splitlines()
    assert chat == (
        "| LoRA, α = 16, chat, batch 4, 100 steps, constant | 1e-2 | 1e-2, 1e-2 | 4.100, 4.000 | "
        "1.9000, 2.0000 | +2.0 %, not finite | 1.2e-2, 1.2e-2 | GeN | +20.0 % |"
    )
    assert "| 4e-2 (at the grid's end) | 4e-2 | 4.000 | 2.0000 | +10.0 % |" in medical
    where = "LoRA, α = 16, {}, batch 4, 100 steps, constant"
    assert bench.shares.span(data) == (
        "Tuned rates of 2 workloads lie a factor of 4 apart, from 1e-2 "
        f"({where.format('chat')}) to 4e-2 ({where.format('medical')})."
    )


def test_the_best_candidates_of_the_calibration_are_marked(bench):
    names = ("auto", "Adam, one constant (1e-3)", "Adam, one constant (2e-3)")
    names += ("hypergradient 1e-4", "hypergradient 1e-5")
    shares = ([0.1], [0.3]), ([0.2], [0.9]), ([0.3], [0.2]), ([None], [0.0]), ([0.1], [0.1])
    data = evidence(bench, auto=[0.0])
    data["calibration"] = [
        {"seeds": [10], "share": {name: pair[i] for name, pair in zip(names, shares, strict=True)}}
        for i in (0, 1)
    ]
    text = bench.shares.calibrated(data)
    assert "the evaluation has Adam at 3e-3 and hypergradient 1e-5:" in text and "calibration, 2 runs" in text
    assert text.splitlines()[4:] == [
        '| `learning_rate="auto"` | +20.0 % | +30.0 % |',
        "| **Adam, one constant (2e-3)** | **+25.0 %** | **+30.0 %** |",
        "| Adam, one constant (1e-3) | +55.0 % | +90.0 % |",
        "| **hypergradient 1e-5** | **+10.0 %** | **+10.0 %** |",
        "| hypergradient 1e-4 | not finite | not finite |",
    ]


def test_the_points_of_a_profile(bench):
    points = bench.profile.points([0.02, -0.1, INF, 0.02])
    assert points == [(1e-3, 0.25), (0.02, 0.75), (1.0, 0.75)]
    assert bench.profile.points([1.0, 2.0]) == [(1e-3, 0.0), (1.0, 0.5)]


def test_the_picture_has_a_line_per_contender_and_auto_stands_out(bench):
    figures = pytest.importorskip("matplotlib.figure")
    names = (*RIVALS, *FIXED, "Thinking Machines", "sweep of 3")
    data = evidence(bench, auto=[0.01, None])
    data["evaluation"][0]["share"] |= {name: [0.02, 0.3] for name in names}
    figure = figures.Figure(layout="constrained")
    bench.profile.draw(figure, data)
    (axes,), legend = figure.axes, figure.legends[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert len(lines) == 15 == len(legend.get_texts()) and axes.get_xscale() == "log"
    auto = lines.pop('learning_rate="auto"')
    assert auto.get_linewidth() > 2 * max(line.get_linewidth() for line in lines.values())
    looks = {(line.get_color(), str(line._dash_pattern)) for line in lines.values()}
    assert len(looks) == len(lines), "two lines cannot be told apart"
    assert [text.get_text() for text in legend.get_texts() if text.get_fontweight() == "bold"] == [
        'learning_rate="auto"'
    ]
    words = bench.profile.words(evidence(bench, auto=[0.01, None], gen=[0.02, 0.3]))
    assert "of 2 runs, auto has 1 within 2 % and 1 within 8 %; of the others GeN is best in median" in words


def test_the_documents_show_the_newest_result_and_its_picture(bench, tool, benchmarks, tmp_path):
    pytest.importorskip("matplotlib")
    doc, plots = tool("results_doc"), benchmarks("end_to_end.plots")
    for name in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    for path in (tmp_path / "benchmarks" / "results").glob("rate_workloads_*.json"):
        path.unlink()
    missing = "*Not measured yet: `python -m benchmarks.learning_rate --plan workloads`.*"
    assert doc.builders(doc.read_results(tmp_path))["rate-workloads"]() == missing
    assert doc.builders(doc.read_results(tmp_path))["rate-workloads-each"]() == missing
    document = evidence(bench, auto=[0.02, 0.02, 0.01], gen=[0.03, None, 0.05])
    calibrated = {"seeds": [10], "share": {"auto": [0.1], "Adam, one constant (2e-3)": [0.2]}}
    document["calibration"] = [calibrated]
    result = tmp_path / "benchmarks" / "results" / "rate_workloads_2026-01-01.json"
    files.write(document, result)
    image = tmp_path / "docs" / "images" / bench.profile.FILE
    image.unlink(missing_ok=True)
    assert "docs/images/rate_profile.png" in doc.outdated(tmp_path, write=True)
    assert doc.outdated(tmp_path, write=False) == []
    assert 5_000 < image.stat().st_size <= plots.MOST_BYTES
    page = (tmp_path / "docs" / "results.md").read_text(encoding="utf-8")
    assert '| **`learning_rate="auto"`** | **+2.0 %** | **+2.0 %** | **3** | **3** |' in page
    assert "of 3 runs, auto has 3 within 2 %" in page and "](images/rate_profile.png)" in page
    each = (tmp_path / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    assert "| `rate_workloads_2026-01-01.json` | ways to a learning rate" in each
    assert "| **Adam, one constant (2e-3)** |" in each
    document["evaluation"][0]["share"]["auto"][0] = 0.03
    files.write(document, result)
    assert "docs/images/rate_profile.png" in doc.outdated(tmp_path, write=False)
    result.unlink()
    assert "docs/images/rate_profile.png" in doc.outdated(tmp_path, write=True) and not image.exists()


def smollm2_lines(bench, above):
    """Cells of the plan ``smollm2``, "auto" above the best of three rates by what is given."""
    lines = []
    sweeps = [item for item in bench.plan.smollm2() if item.contender == "adam"]
    for item, part in zip(sweeps, above, strict=False):
        at = item.rates[0]
        for lr, loss in ((at, 2.0), (at / 2, 2.1), (2 * at, None)):
            lines.append(line_of(bench.plan.Run(item.workload, 0, "adam", lr), loss))
        lines.append(line_of(bench.plan.Run(item.workload, 0, "auto"), 2.0 * (1 + part)))
    return lines


def test_the_cells_of_smollm2(bench, tool):
    lines = smollm2_lines(bench, [0.01, 0.031, -0.02])
    lines = [line for line in lines if (line["lr"], line["task"]) != (6e-3, "medical")]
    again = bench.plan.Workload("instruction", 8, 120, method="lora", model="smollm2-135m")
    lines.append(line_of(bench.plan.Run(again, 1, "auto"), 2.2))
    lines.append(line_of(bench.plan.Run(again, 1, "adam", 3e-3), 2.0))
    data = bench.record.document(lines, "smollm2")
    words, _, _, _, *rows = bench.table.cells(data).splitlines()
    assert words == (
        "2 of 4 runs in 3 cells end within 3 % of the loss of tuned Adam (20 runs of the plan left); tuned "
        "rates lie a factor of 10 apart, from 3e-4 to 3e-3."
    )
    assert rows == [
        "| LoRA, α = 16 | instruction | 8 | +1.0 %, +10.0 % | +1.0 %, +10.0 % | 3e-3 | 1.2e-2, 1.2e-2 |",
        "| LoRA, α = 16 | medical | 8 | +3.1 % | +3.1 % | 3e-3 (at the grid's end) | 1.2e-2 |",
        "| LoRA, α = 256 | instruction | 8 | −2.0 % | −2.0 % | 3e-4 | 1.2e-2 |",
    ]
    old = copy.deepcopy(data)
    old["workloads"] = {f"{name}, short": one for name, one in data["workloads"].items()}
    for run in old["runs"]:
        run["workload"] += ", short"
    before, after = "alignment_rates_smollm2_2026-01-01.json", "alignment_rates_smollm2_2026-01-02.json"
    missing = "*Not measured yet: `python -m benchmarks.learning_rate --plan smollm2`.*"
    build = tool("results_doc").builders({before: old})
    assert build["smollm2-rates"]() == missing and "above Adam at 3e-3" in build["learning-rates"]()
    build = tool("results_doc").builders({before: old, after: data})
    assert words in build["smollm2-rates"]() and "SmolLM2" not in build["learning-rates"]()
