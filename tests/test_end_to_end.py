"""The end-to-end benchmark: what it measures first, what it keeps, how it goes on where it was stopped."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture()
def plan(benchmarks):
    from ffkernels.training.config import TrainConfig

    def build(**changes):
        given = {
            "tasks": ("instruction", "chat"),
            "methods": ("lora", "dora"),
            "rates": (1e-4, None),
            "batch_sizes": (64,),
            "seeds": (0, 1),
        }
        return benchmarks("end_to_end.plan").Plan(TrainConfig(model="tiny"), **{**given, **changes})

    return build


def test_what_tells_most_comes_first(plan):
    rounds = [f"{cell.name} {seed}" for cell, seed in plan(batch_sizes=(64, 128)).rounds()]
    assert rounds[:5] == [
        "instruction lora lr=1e-4 batch=64 0",
        "chat lora lr=1e-4 batch=64 0",
        "instruction lora lr=tuned batch=64 0",
        "chat lora lr=tuned batch=64 0",
        "instruction dora lr=1e-4 batch=64 0",
    ]
    assert len(rounds) == len(set(rounds)) == 32 and rounds[8].endswith("batch=64 1")
    chosen = [cell.name for cell, _ in plan(only=["chat", "lr=1e-4"], seeds=(0,)).rounds()]
    assert chosen == ["chat lora lr=1e-4 batch=64", "chat dora lr=1e-4 batch=64"]


def test_the_tuned_rate_is_known_given_or_looked_for_once(plan, benchmarks, monkeypatch):
    module = benchmarks("end_to_end.plan")
    monkeypatch.setattr(module, "TUNED_LR", {("tiny", "instruction"): 1e-2})
    cell = module.Cell("chat", "lora", 1e-4, 64)
    known = plan().known_rate
    assert known(module.Cell("instruction", "lora", 1e-4, 64), {}) == 1e-2
    assert known(cell, {}) is None and known(cell, {"chat": {"lr": 5e-3}}) == 5e-3
    assert plan(tuned_lr=2e-3).known_rate(cell, {"chat": {"lr": 5e-3}}) == 2e-3
    comparison = plan().comparison(cell, 1, None, Path("runs"))
    assert comparison.sweep and comparison.base.lr == 1e-4 and comparison.seeds == (1,)
    tuned = plan().comparison(module.Cell("chat", "dora", None, 64), 0, 5e-3, Path("runs"))
    assert not tuned.sweep and tuned.base.lr == tuned.tuned_lr == 5e-3 and tuned.base.method == "dora"
    with pytest.raises(ValueError, match="no tuned learning rate is known for 'chat'"):
        plan().comparison(module.Cell("chat", "lora", None, 64), 0, None, Path("runs"))


def test_a_gpu_has_the_papers_batches_and_a_cpu_the_embedded_model(benchmarks, monkeypatch):
    module = benchmarks("end_to_end.__main__")
    cpu, _ = module.make_plan(module.parse(["--device", "cpu"]))
    assert (cpu.base.model, list(cpu.rates), list(cpu.seeds)) == ("tiny", [1e-4, 3e-4], [0, 1, 2])
    assert len(list(cpu.rounds())) == 18 and cpu.base.steps == 120
    monkeypatch.setattr(
        "ffkernels.reporting.machine.choose_device", lambda name: type("D", (), {"type": "cuda"})
    )
    monkeypatch.setattr("ffkernels.training.smollm2.checkpoint", lambda: Path("x"))
    gpu, reason = module.make_plan(module.parse([]))
    assert (gpu.base.model, gpu.base.dtype, reason) == ("smollm2-135m", "bfloat16", None)
    assert list(gpu.rates) == [1e-4, 4e-5, 3e-4, None] and list(gpu.batch_sizes) == [64, 128, 256, 512]

    def missing():
        raise RuntimeError("no network\nand more")

    monkeypatch.setattr("ffkernels.training.smollm2.checkpoint", missing)
    gpu, reason = module.make_plan(module.parse(["--lr", "tuned", "2e-4"]))
    assert gpu.base.model == "tiny" and list(gpu.rates) == [2e-4, None]
    assert reason == "smollm2-135m is not at hand (no network); measured on tiny instead"
    with pytest.raises(ValueError, match="--cells nowhere: no cell has these words"):
        module.make_plan(module.parse(["--cells", "nowhere"]))


def test_medians_and_ranges_of_the_seeds(benchmarks):
    record = benchmarks("end_to_end.record")

    def one(seed, flops, reason=None):
        saved = {"flops_paper": flops, "flops_measured": flops, "seconds": flops}
        entry = {"name": f"parabolic-s{seed}", **(saved if reason is None else dict.fromkeys(saved))}
        entry |= {} if reason is None else {"reason": reason}
        return {
            "seed": seed,
            "runs": [{"name": f"parabolic-s{seed}", "kind": "parabolic"}],
            "savings": [entry],
        }

    (alone,) = record.spreads_of([one(0, 0.5)])
    assert (alone["kind"], alone["count"], alone["median"]["seconds"]) == ("parabolic", 1, 0.5)
    (three,) = record.spreads_of([one(0, 0.5), one(1, 0.9), one(2, 0.6)])
    costs = [three[part]["flops_measured"] for part in ("median", "low", "high")]
    assert costs == [0.6, 0.5, 0.9] and three["count"] == 3
    (missed,) = record.spreads_of([one(0, 0.5), one(1, None, "did not reach it")])
    assert missed["median"] is None and "parabolic-s1" in missed["reason"]
    (alone,) = record.spreads_of([one(0, None, "did not reach it")])
    assert alone["median"] is None and alone["reason"] == "parabolic-s0 did not reach it"
    (two,) = record.spreads_of([one(0, 0.5), one(1, 0.7)])
    assert two["median"]["flops_paper"] == pytest.approx(0.6) and two["low"]["flops_paper"] == 0.5
    assert record.thinned(list(range(100)), 4) == [0, 33, 66, 99] and record.thinned([1, 2], 4) == [1, 2]


def test_a_round_that_got_less_far_does_not_replace_one_that_got_further(benchmarks):
    record = benchmarks("end_to_end.record")

    def one(mark, *kinds):
        runs = [{"name": f"{kind}-s0", "kind": kind} for kind in kinds]
        return {"seed": 0, "complete": False, "mark": mark, "runs": runs, "savings": []}

    entry = {"rounds": [], "spreads": []}
    for mark, kinds in ((1, ["adam"]), (2, ["adam", "linear"]), (3, ["adam"]), (4, ["adam", "linear"])):
        record.add_round(entry, one(mark, *kinds))
        assert [r["mark"] for r in entry["rounds"]] == [{3: 2}.get(mark, mark)]


@pytest.mark.parametrize("text", ['{"kind": "end-to-end", "cells": [', "[1]", "{}", '{"kind": "end-to-end"}'])
def test_half_a_file_is_not_gone_on_with(benchmarks, tmp_path, capsys, text):
    out = tmp_path / "half.json"
    out.write_text(text, encoding="utf-8")
    assert benchmarks("end_to_end.__main__").main([*SMALL, "--out", str(out)]) == 2
    assert f"{out} is no whole result of this benchmark; give another --out" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == text


def test_a_round_that_cannot_be_leaves_the_others_alone(benchmarks, tmp_path, monkeypatch, capsys):
    """A task's package is missing, then Adam diverges: both are said, and a later call may measure them."""
    rounds, module = benchmarks("end_to_end.rounds"), benchmarks("end_to_end.__main__")
    monkeypatch.setattr(benchmarks("end_to_end.plan"), "_probe", lambda comparison: (1.0, 1.0, 1.0))

    def compare(comparison, **_):
        if comparison.base.task == "medical":
            raise RuntimeError("task 'medical' needs simple_icd_10_cm\nmore")
        raise ValueError("adam-s0 diverged")

    monkeypatch.setattr(rounds, "compare", compare)
    out = tmp_path / "e2e.json"
    options = [*SMALL, "--out", str(out), "--tasks"]
    assert module.main([*options, "medical", "chat"]) == 1  # nothing at all was measured
    assert module.main([*options, "chat"]) == 1
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [(one["cell"].split()[0], one["reason"]) for one in document["left_out"]] == [
        ("medical", "task 'medical' needs simple_icd_10_cm"),
        ("chat", "adam-s0 diverged"),
    ]
    first, second = document["command"].split(" && ")
    monkeypatch.setattr("ffkernels.reporting.machine._os_name", lambda: "another build of it")
    assert first.endswith("--tasks medical chat") and second.endswith("--tasks chat")
    assert module.main([*options, "chat", "--tuned-lr", "5e-3"]) == 2
    assert "other conditions: tuned_lr=0.005 (there 0.01)" in capsys.readouterr().err


SMALL = ["--fast", "--steps", "7", "--batch-size", "8", "--test-examples", "16", "--device", "cpu"]


@pytest.mark.slow
def test_one_cell_measured_kept_and_not_measured_again(benchmarks, tmp_path, capsys):
    main, out = benchmarks("end_to_end.__main__").main, tmp_path / "e2e.json"
    assert main([*SMALL, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "expected: about" in said and "parabolic-s0" in said
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["fast"] and document["left_out"] == [] and document["config"]["steps"] == 7
    assert document["command"] == f"python -m benchmarks.end_to_end {' '.join(SMALL)} --out e2e.json"
    assert document["tuned"] == {"instruction": {"lr": 1e-2, "source": "option"}}
    (cell,) = document["cells"]
    assert (cell["name"], cell["lr"]) == ("instruction lora lr=3e-4 batch=8", 3e-4)
    (one,) = cell["rounds"]
    runs = {run["kind"]: run for run in one["runs"]}
    assert set(runs) == {"adam", "parabolic", "linear", "auto", "adam-tuned"} and one["complete"]
    assert runs["adam"]["optimizer_steps"] == 7 and runs["adam"]["taus"] == []
    step, flops, _, loss = runs["adam"]["curve"][-1]
    assert (step, flops) == (7, runs["adam"]["flops"]["measured"])
    assert loss == pytest.approx(runs["adam"]["test_loss"], abs=1e-5)
    saved = {entry["name"]: entry for entry in one["savings"]}
    assert runs["parabolic"]["taus"][0][0] == 6
    spent = runs["parabolic"]["flops"]["measured"] / runs["adam"]["flops"]["measured"]
    assert saved["parabolic-s0"]["flops_measured"] == pytest.approx(1 - spent)
    assert len(cell["spreads"]) == 4

    before = out.read_text(encoding="utf-8")
    assert main([*SMALL, "--out", str(out), "--list"]) == 0
    assert "0 rounds to measure, 1 are in" in capsys.readouterr().out
    assert out.read_text(encoding="utf-8") == before
    other = [*SMALL, "--steps", "8", "--out", str(out)]
    assert main(other) == 2
    assert "other conditions: steps=8 (there 7). Give another --out, or --fresh" in capsys.readouterr().err


@pytest.mark.slow
def test_no_time_and_ctrl_c_keep_what_was_finished(benchmarks, tmp_path, monkeypatch, capsys):
    rounds, module = benchmarks("end_to_end.rounds"), benchmarks("end_to_end.__main__")
    monkeypatch.setattr(benchmarks("end_to_end.plan"), "_probe", lambda comparison: (1.0, 1.0, 1.0))
    real = rounds.compare
    asked = []

    def compare(comparison, *, on_run, on_event):
        """Ctrl-C at the first step of the second run."""
        asked.append(comparison)

        def event(event):
            on_event(event)
            if event["event"] == "step" and names[-1].startswith("parabolic"):
                raise KeyboardInterrupt

        names = []
        return real(
            comparison, on_run=lambda config: (names.append(config.name), on_run(config)), on_event=event
        )

    monkeypatch.setattr(rounds, "compare", compare)
    out = tmp_path / "e2e.json"
    options = [*SMALL, "--seeds", "0", "1", "--out", str(out)]
    assert module.main(options) == 130
    document = json.loads(out.read_text(encoding="utf-8"))
    (one,) = document["cells"][0]["rounds"]
    assert [run["kind"] for run in one["runs"]] == ["adam"] and not one["complete"]
    assert document["left_out"][0]["reason"] == "stopped in parabolic-s0: Ctrl-C"
    assert len(asked) == 1

    # The same again, out of time: the round that is not complete is begun anew, the other one left out.
    assert module.main([*options, "--minutes", "0.001"]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    assert len(asked) == 2 and asked[1].seeds == (0,)
    reasons = {one["seed"]: one["reason"] for one in document["left_out"]}
    assert "no time was left" in reasons[0] and "s were left" in reasons[1]
    assert "2 rounds were left out" in capsys.readouterr().out


def test_what_a_gpu_has_to_save_end_to_end(benchmarks):
    table = benchmarks("end_to_end.table")

    def cell(paper, measured, seconds, tuned=False):
        median = {"flops_paper": paper, "flops_measured": measured, "seconds": seconds}
        spreads = [{"kind": "parabolic", "median": median}, {"kind": "linear", "median": None}]
        return {
            **{"task": "chat", "method": "dora", "lr": 4e-5, "tuned": tuned, "batch_size": 64},
            "spreads": spreads,
        }

    result = {
        "fast": False,
        "config": {"model": "smollm2-135m", "dtype": "bfloat16", "steps": 120},
        "cells": [cell(0.41, 0.40, 0.39), cell(0.4, 0.3, 0.2), cell(-0.01, -0.02, 0.0, tuned=True)],
        "left_out": [{"cell": "medical lora lr=1e-4 batch=64", "seed": 0, "reason": "late"}],
    }
    found = table.end_to_end_targets(result)
    assert [target["met"] for target in found] == [True] * 3 + [False] * 3
    assert (
        found[0]["what"]
        == "chat, dora, lr 4e-5, batch 64: at least 41% of the FLOPs saved, the paper's count"
    )
    assert found[2]["measured"] == "39.0% beside 41.0%"
    result["cells"][0]["spreads"][0]["median"] = None
    missed = table.end_to_end_targets(result)[0]
    assert not missed["met"] and missed["measured"] == "not reached"
    text = "\n".join(table.render_end_to_end(result))
    assert "30% / 40% / 20%" in text and "left out (the file says why): medical lora" in text
    assert text.count("not reached") == 4
    result["cells"][0]["spreads"] = []  # Adam's run ended, the others had no time: that is no failure
    assert len(table.end_to_end_targets(result)) == 3
    assert table.end_to_end_targets({**result, "fast": True}) == []
