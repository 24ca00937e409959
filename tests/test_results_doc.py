"""Documentation says what the committed results say, and what makes it so is right."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
FILES = (RESULTS / "README.md").read_text(encoding="utf-8")


def run(kind, lr, steps, validations, taus, share):
    whole = 1_000_000_000_000
    return {
        "name": f"{kind}-s0",
        "kind": kind,
        "lr": lr,
        "target": 2.6001,
        "optimizer_steps": steps,
        "test_loss": 2.6,
        "flops": {"paper": whole, "measured": int(share * whole)},
        "seconds": {"total": 20.0 * share},
        "validation_forwards": validations,
        "stages": len(taus),
        "taus": taus,
        "curve": [[0, 0, 0.0, 3.0], [steps, int(share * whole), 20.0 * share, 2.6]],
    }


def cell(task, lr, *, method="lora", tuned=False, parabolic=0.8, linear=0.3, seeds=3):
    def spread(kind, middle):
        found = {"kind": kind, "count": seeds}
        for end, offset in (("median", 0.0), ("low", -0.05), ("high", 0.02)):
            costs = {"flops_paper": middle + 0.04, "flops_measured": middle, "seconds": middle - 0.01}
            found[end] = {cost: value + offset * (seeds > 1) for cost, value in costs.items()}
        return found

    runs = [
        run("adam", lr, 120, 0, [], 1.0),
        run("linear", lr, 12, 300, [[6, 150], [12, 80]], 1 - linear),
        run("parabolic", lr, 12, 29, [[6, 151]], 1 - parabolic),
        run("adam-tuned", 1e-2, 6, 0, [], 0.05),
    ]
    return {
        "name": f"{task} {method} lr={lr:g} batch=64",
        "task": task,
        "method": method,
        "lr": lr,
        "tuned": tuned,
        "batch_size": 64,
        "rounds": [{"seed": seed, "complete": True, "runs": runs, "savings": []} for seed in range(seeds)],
        "spreads": [spread("linear", linear), spread("parabolic", parabolic), spread("adam-tuned", 0.95)],
    }


def document():
    """An end-to-end result with the numbers of nobody's machine."""
    return {
        "kind": "end-to-end",
        "fast": False,
        "command": "python benchmarks/end_to_end.py",
        "measured_at": "2026-01-01T00:00:00+00:00",
        "seconds": 1200.0,
        "machine": {"cpu": "a CPU", "threads": 2, "gpus": []},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "config": {
            **{"model": "tiny", "rank": 8, "alpha": 16.0, "dtype": "float32", "steps": 120, "max_length": 64},
            **{"warmup_steps": 8, "test_examples": 1000, "validation_examples": 32},
        },
        "tuned": {"instruction": {"lr": 1e-2, "source": "table"}, "chat": {"lr": 5e-3, "source": "sweep"}},
        "cells": [
            cell("chat", 3e-4, parabolic=0.55),
            cell("instruction", 3e-4, parabolic=0.6),
            cell("instruction", 1e-4),
            cell("chat", 1e-4, linear=-0.2),
        ],
        "left_out": [{"cell": "chat dora lr=1e-4 batch=64", "seed": s, "reason": "late"} for s in (0, 1)],
    }


NAME = "end_to_end_tiny_cpu_2026-01-01.json"


@pytest.fixture()
def checkout(tmp_path):
    """A checkout of documents, pictures and results, with an end-to-end result more."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    shutil.copytree(ROOT / "docs" / "images", tmp_path / "docs" / "images")
    for name in ("README.md", "docs/results.md", "docs/learning-rate.md"):  # the fourth came with the results
        shutil.copy(ROOT / name, tmp_path / name)
    for path in (tmp_path / "benchmarks" / "results").glob("end_to_end_*.json"):
        path.unlink()
    (tmp_path / "benchmarks" / "results" / NAME).write_text(json.dumps(document()), encoding="utf-8")
    return tmp_path


def test_the_documentation_is_up_to_date(tool):
    assert tool("results_doc").outdated(ROOT, write=False) == [], "python -m tools.results_doc makes it anew"


def test_every_result_is_listed():
    for path in sorted(RESULTS.rglob("*.json")):
        assert f"| `{path.relative_to(RESULTS).as_posix()}` |" in FILES


def test_writing_makes_the_check_pass_and_a_changed_number_makes_it_fail(tool, checkout, capsys):
    main = tool("results_doc").main
    where = ["--root", str(checkout)]
    assert main([*where, "--check"]) == 1
    assert "docs/results.md" in capsys.readouterr().out
    assert main(where) == 0
    assert main([*where, "--check"]) == 0
    for name, old, new in (
        ("docs/results.md", "| 80 % (75 to 82) |", "| 81 % (75 to 82) |"),
        ("README.md", "| 86 % |", "| 90 % |"),
    ):
        text = (checkout / name).read_text(encoding="utf-8")
        assert old in text
        (checkout / name).write_text(text.replace(old, new, 1), encoding="utf-8")
        assert main([*where, "--check"]) == 1
        assert name in capsys.readouterr().out
        (checkout / name).write_text(text, encoding="utf-8")
    result = checkout / "benchmarks" / "results" / NAME
    changed = document()
    changed["cells"][0]["rounds"][0]["runs"][0]["curve"][1][3] = 2.7  # only a plot shows it
    result.write_text(json.dumps(changed), encoding="utf-8")
    capsys.readouterr()
    assert main([*where, "--check"]) == 1
    said = capsys.readouterr().out
    assert "images/end_to_end_tiny_cpu_curves.png" in said and "results.md" not in said


def test_the_tables_have_the_form_of_the_figures(tool, benchmarks):
    doc, figures = tool("results_doc"), benchmarks("end_to_end.figures")
    build = doc.builders({NAME: document()})
    text = build["end-to-end"]()
    measured, paper, seconds, work = (part.split("\n\n")[1] for part in text.split("\n\n**")[1:])
    assert measured.splitlines()[2:] == [
        "| chat | 1e-4 | −20 % (−25 to −18) | 80 % (75 to 82) | 95 % (90 to 97) |",
        "| chat | 3e-4 | 30 % (25 to 32) | 55 % (50 to 57) | 95 % (90 to 97) |",
        "| instruction | 1e-4 | 30 % (25 to 32) | 80 % (75 to 82) | 95 % (90 to 97) |",
        "| instruction | 3e-4 | 30 % (25 to 32) | 60 % (55 to 62) | 95 % (90 to 97) |",
    ]
    assert "| chat | 1e-4 | −16 % (−21 to −14) | 84 % (79 to 86) | 99 % (94 to 101) |" in paper
    assert "| chat | 1e-4 | −21 % (−26 to −19) | 79 % (74 to 81) | 94 % (89 to 96) |" in seconds
    assert "| chat | 1e-4 | 120 | 12, 300, 150 | 12, 29, 151 | 6 |" in work
    assert "41 to 87 % in the paper, 59 to 84 % with `parabolic` and −16 to 34 % with `linear` here" in text
    assert "40 to 81 % in the paper, 54 to 79 % with `parabolic`" in text
    assert "(1e-2 for instruction, 5e-3 for chat) saves 95 % on the way" in text
    assert text.count("chat dora lr=1e-4 batch=64 (seeds 0, 1)") == text.count("chat dora") == 1
    assert "(images/end_to_end_tiny_cpu_saved.png)" in text
    assert figures.end_to_end({}, {}) == "*Not measured yet: `make bench-e2e`.*"


def test_a_target_that_was_missed_and_a_single_seed_are_named_so(benchmarks):
    data = document()
    data["cells"] = [cell("chat", 1e-4, seeds=1), cell("chat", 1e-2, tuned=True, parabolic=0.01, seeds=1)]
    data["cells"].insert(1, cell("chat", 3e-4, seeds=1))
    missed = {"kind": "linear", "count": 1, "median": None, "low": None, "high": None, "reason": "…"}
    data["cells"][0]["spreads"][0] = missed
    text = benchmarks("end_to_end.figures").end_to_end({NAME: data}, {})
    assert "| chat | 1e-4 | not reached | 80 % | 95 % |" in text
    assert "| chat | 1e-2 (tuned) | 30 % | 1 % | 95 % |" in text
    assert "Started at the tuned rate itself, `parabolic` saves 1 %." in text
    assert "and 34 % (target not reached in 1 of 2 cells) with `linear` here" in text
    assert "“not reached”" not in text  # by whom needs no saying where there is one seed
    data["cells"][1]["spreads"][0] = missed
    text = benchmarks("end_to_end.figures").end_to_end({NAME: data}, {})
    assert "and nothing (target not reached in 2 of 2 cells) with `linear` here" in text


def test_what_is_incomplete_or_means_nothing_is_not_passed_off_as_whole(benchmarks):
    figures, data = benchmarks("end_to_end.figures"), document()
    for number, commit in enumerate(("aaa", "aaa", "bbb+changes")):
        data["cells"][0]["rounds"][number]["git_commit"] = commit
    data["cells"][1] = cell("instruction", 3e-4, parabolic=0.6, seeds=2)
    data["cells"][3] = cell("chat", 1e-4, seeds=1)
    text = figures.end_to_end({NAME: data}, {})
    assert "| instruction | 3e-4 | 30 % (25 to 32; 2 of 3 seeds) | 60 % (55 to 62; 2 of 3 seeds) |" in text
    assert "| chat | 1e-4 | 30 % (1 of 3 seeds) | 80 % (1 of 3 seeds) |" in text
    assert "; commit ?, aaa, bbb+changes. `python benchmarks/end_to_end.py`" in text
    data["fast"] = True
    assert figures.end_to_end_files({NAME: data}) == {}


def test_every_kind_is_in_the_legend_though_the_first_cell_missed_the_target(benchmarks):
    from matplotlib.figure import Figure

    data = document()
    first = benchmarks("end_to_end.figures").in_order(data)[0]
    first["spreads"][0] |= {"median": None, "low": None, "high": None}
    figure = Figure(layout="constrained")
    benchmarks("end_to_end.plots").draw_saved(figure, data)
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(said) == sorted(
        [
            "the paper's range",
            "Fast Forward, linear (the paper's)",
            "Fast Forward, parabolic",
            "Adam, tuned lr",
        ]
    )


@pytest.mark.parametrize("methods", [["lora"], ["lora", "dora"]])
def test_pictures_are_small_and_know_their_data(benchmarks, tmp_path, methods):
    plots, data = benchmarks("end_to_end.plots"), document()
    data["cells"] = [
        cell(task, lr, method=method, tuned=lr == 1e-2, seeds=1)
        for method in methods
        for lr in (1e-4, 1e-2)
        for task in ("instruction", "chat")
    ]
    found = plots.pictures(NAME, data)
    assert list(found) == ["end_to_end_tiny_cpu_saved.png", "end_to_end_tiny_cpu_curves.png"]
    for file, (_, draw) in found.items():
        plots.write(tmp_path / file, draw, data)
        assert 5_000 < (tmp_path / file).stat().st_size <= plots.MOST_BYTES
        assert plots.shown_digest(tmp_path / file) == plots.digest(data)
    other = copy.deepcopy(data)
    other["cells"][0]["spreads"][0]["median"]["seconds"] += 0.001
    assert plots.digest(other) != plots.digest(data)
    assert plots.shown_digest(tmp_path / "none.png") is None


def test_the_newest_counts_and_two_of_a_kind_are_refused(tool, benchmarks):
    doc, step = tool("results_doc"), benchmarks("kernels.step")
    adapters = {"modes": {m: {o: {} for o in ("foreach", "loop", "state_dict")} for m in ("warm", "cold")}}
    files = {}
    for date, ratio in (("2026-02-01", 0.5), ("2026-01-31", 0.25)):
        data = copy.deepcopy(adapters)
        for mode in data["modes"].values():
            for other in mode.values():
                other["ours_over_this"] = ratio
        files[f"step_cpu_{date}.json"] = {"adapters": {"small": data}}
    assert step.table(files).splitlines()[2] == "| small |" + " 0.50 |" * 6
    later = NAME.replace("2026", "2027")
    with pytest.raises(ValueError, match=r"two results draw end_to_end_tiny_cpu_curves\.png, end_to_end_"):
        doc.builders({NAME: document(), later: document()})


def test_only_places_where_every_way_was_measured_are_compared(benchmarks):
    def resampled(arm, seed, flops, loss, lr=3e-4, steps=12):
        curve = [[0, 0, 5.0], [6, flops // 4, 4.0], [12, flops, loss]]
        return {
            "task": "chat",
            "lr": lr,
            "seed": seed,
            "arm": arm,
            "steps": steps,
            "test_loss": loss,
            "flops": flops,
            "curve": curve,
        }

    ways = (("adam", 100, 4.0), ("fixed 32", 80, 2.0), ("resampled 32", 88, 1.9), ("fixed 128", 160, 2.0))
    data = {
        "kind": "resampled-validation",
        "runs": [resampled(arm, 0, flops, loss) for arm, flops, loss in ways],
        "command": "python x.py",
        "config": {"model": "tiny", "batch_size": 64, "interval": 6, "pool": 256, "steps": 12},
        **{name: document()[name] for name in ("machine", "versions")},
    }
    data["runs"] += [resampled(*way[:1], 0, *way[1:], lr=1e-4) for way in ways[:2]]  # not all of them
    data["runs"] += [resampled("adam", 1, 100, 4.0), resampled("fixed 8", 0, 80, 2.4)]
    data["runs"] += [resampled("fixed 8", 0, 160, 1.5, steps=24)]
    text = benchmarks("stages.resampled").table({"resampled_validation_x.json": data})
    assert "tasks × seeds: 0 at 1e-4, 1 at 3e-4." in text
    rows = text.splitlines()[4:]
    assert rows[0] == "| the same 32 | – | 80 % (80 to 80) | +0.0 % (+0.0 to +0.0) | 1.00 | 1 |"
    assert rows[1] == "| 32 others | – | 78 % (78 to 78) | −5.0 % (−5.0 to −5.0) | 1.10 | 1 |"
    assert rows[3] == "| the same 8 |  | – | – | – | 0 |"
    assert "Test losses after 24 steps at 3e-4, one seed: chat 1.5000 with the same 8." in text
    for run in data["runs"]:
        if run["arm"] == "fixed 32":
            run["curve"] = run["curve"][:1]
    text = benchmarks("stages.resampled").table({"resampled_validation_x.json": data})
    assert "| the same 32 | – | not reached in 1 of 1 |" in text


def test_a_training_that_missed_the_target_has_no_share(benchmarks):
    entries = [{"lr": 1e-4, "reached": r, "flops_measured": 0.5 if r else None} for r in (True, False)]
    result = {
        "kind": "sft",
        "config": {"model": "tiny", "batch_size": 32, "steps": 7},
        "savings": entries,
    }
    assert "| embedded | 1e-4 | 7 | not reached |" in benchmarks("end_to_end.sft").table(
        {"sft_x.json": result}
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("<!-- results: nothing -->\n<!-- end of results -->", "no block 'nothing'; there are "),
        ("<!-- results: sft -->\n", "1 blocks of results begin and 0 end"),
    ],
)
def test_a_block_that_cannot_be_filled_is_named(tool, text, what):
    with pytest.raises(ValueError, match=what):
        tool("results_doc").filled(text, {"sft": lambda: ""})


def sft_rows() -> list[str]:
    """The SFT table's rows, made here a second time."""
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
    wanted = sft_rows()
    assert len(wanted) >= 5
    assert sorted(wanted) == sorted(
        line for line in DOC.splitlines() if line.startswith(("| embedded |", "| SmolLM2"))
    )


def test_the_words_on_sft_are_those_of_the_file():
    report = json.loads((RESULTS / "sft_smollm2_alpha16_2026-11-21.json").read_text(encoding="utf-8"))
    runs = {(r["name"], r["lr"]): r for r in report["runs"]}
    taus = [stage["tau"] for stage in runs["fast_forward", 3e-4]["stages"]]
    assert f"repeat the update {taus[0]} and {taus[1]} times only" in " ".join(DOC.split())
    curve = {point["step"]: point["test_loss"] for point in runs["fast_forward", 1e-4]["curve"]}
    gap = curve[6] - runs["plain", 1e-4]["test_loss"]
    assert f"after step 6, ends {gap:.3f} above what 36 plain steps reach" in " ".join(DOC.split())


def test_what_is_said_of_the_searches_is_what_was_measured():
    said = " ".join((DOC + FILES).split())
    data = json.loads(max(RESULTS.glob("search_noise_tiny_*.json")).read_text(encoding="utf-8"))
    assert f"The loss at every τ was measured over {len(data['stages'])} stages" in said
    names = {
        "linear": "`linear`",
        "every rise counts": "`parabolic`, every rise counts",
        "parabolic": "`parabolic`",
    }
    sides = {"cold": "`parabolic` from 1", "warm": "`parabolic` from the first stage's τ*"}
    for dtype in ("bfloat16", "float32"):
        whole = next(g for g in data["groups"] if g["dtype"] == dtype and g["lr"] is None)["searches"]
        later = next(each for each in data["warm_start"][dtype] if each["lr"] is None)
        found = [(names[name], one) for name, one in whole.items()]
        found += [(f"second stages: {sides[side]}", later[side]) for side in sides]
        for name, one in found:
            cells = [dtype, one["stages"], name, one["reached"], f"{one['mean_evaluations']:.1f}"]
            cells += [f"{100 * one[lost]:.2f} %" for lost in ("mean_lost", "worst_lost")]
            row = f"| {' | '.join(map(str, cells))} |"
            assert row in FILES and (row in DOC) == (name in ("`linear`", "`parabolic`"))
    warm = [data["warm_start"][dtype] for dtype in ("bfloat16", "float32")]
    means = [each["warm"]["mean_evaluations"] for some in warm for each in some if each["lr"] is None]
    assert f"as in training, take {min(means):.0f} to {max(means):.0f} losses" in said
    slow = next(g for g in data["groups"] if g["dtype"] == "bfloat16" and g["lr"] == 4e-5)
    linear = slow["searches"]["linear"]
    assert f"`linear` finds {linear['reached']} of {linear['stages']}" in said
    rule = data["rule"]
    rises, exact = (rule[dtype]["verdicts"] for dtype in ("bfloat16", "float32"))
    assert rises["beyond_sure"] == 0 == exact["beyond"]
    assert f"none of {rises['beyond']} rises before a lower loss was called proven" in said
    assert f"{rises['passed_unsure']} of {rises['passed']} behind the lowest were not" in said
    assert f"(float32: {exact['passed_unsure']} of {exact['passed']})" in said
    for dtype, words in (("bfloat16", "under bf16"), ("float32", "in float32")):
        rates = [100 * share for share in rule[dtype]["sure_of_noise"].values()]
        assert f"{min(rates):.1f} % to {max(rates):.1f} % of new losses a proven rise {words}" in said or (
            f"{min(rates):.1f} % to {max(rates):.1f} % {words}" in said
        )
