"""The benchmark of learning rates: what a run may spend, what counts as a failure, and what is said of it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch


def line(contender, lr, loss, *, task="chat", seed=0, schedule="constant", **fields):
    return {
        **{"task": task, "seed": seed, "schedule": schedule, "variant": "standard", "steps": 120},
        **{"contender": contender, "lr": lr, "loss": loss, "failed": None, "found": None, "forwards": 0},
        **{"own_flops": 0, "budget": 100, "curve": [[0, 0, 3.0], [30, 50, 2.2], [60, 100, loss]]},
        **fields,
    }


def a_sweep(**fields):
    return [
        line("adam", lr, loss, **fields) for lr, loss in ((5e-3, 2.1), (1e-2, 2.0), (2e-2, 2.2), (1e-4, 1.9))
    ]


class Steps:
    """A bench whose steps cost 10 FLOPs each, and a validation 4."""

    session = SimpleNamespace(
        validation=SimpleNamespace(flops=4), trainable=[torch.nn.Parameter(torch.ones(2))]
    )

    def batch(self, step):
        return None, 10


def test_what_is_charged_shortens_the_run_and_its_decay(benchmarks):
    work = benchmarks("learning_rate_runs").Work(Steps(), 1e-3, "linear", 20, 4)
    assert work.budget == 200 and work.total == 20
    assert [work.shape(step) for step in (0, 3, 4, 12, 20)] == [0.25, 1.0, 1.0, 0.5, 0.0]
    work.charge(forwards=11)  # 44 FLOPs are more than four steps
    assert (work.total, work.forwards, work.flops) == (15, 11, 44)
    assert work.shape(15) == 0.0 and work.shape(4) == 1.0
    work.charge(batches=2, flops=30)
    assert (work.total, work.batches, work.flops) == (12, 2, 74)
    work.charge(batches=20)
    assert work.total == 0


def test_a_run_is_compared_with_the_best_of_the_sweep_under_its_own_conditions(benchmarks):
    table = benchmarks("learning_rate_table")
    lines = [*a_sweep(), *a_sweep(seed=1), line("find", 1e-5, 2.02, found=1e-2, forwards=14)]
    lines += [
        line("find", 1e-3, 2.06, found=2e-2, forwards=21),
        line("find", 3e-2, 9.0),
    ]  # 3e-2 is not claimed
    best = table.tuned(lines)
    assert best[table.conditions(lines[0])]["lr"] == 1e-2  # 1e-4 is none of the sweep's
    assert table.gap(lines[-3], best) == pytest.approx(0.01)
    (one,) = table.verdicts(lines)
    assert (one["runs"], one["near"], one["diverged"], one["forwards"]) == (2, 0.5, 0, [17.5, 21])
    assert one["worst"] == pytest.approx(0.03) and one["median"] == pytest.approx(0.02)


def test_failures_are_named(benchmarks):
    table = benchmarks("learning_rate_table")
    lines = [
        *a_sweep(),
        line("find", 1e-5, 2.03, found=0.0123),
        line("find", 1e-4, 2.12, found=2.31e-2, forwards=22),
        line("find", 1e-3, None, failed="training loss nan in step 7"),
        line("find", 1e-2, 2.0, curve=[[0, 0, 3.0], [30, 50, 3.1], [60, 100, 2.0]], found=1e-2),
        line("prodigy", 1e-2, None, failed="no such package"),
        line("prodigy", 1e-3, 2.5),
    ]
    assert [one.split(": ", 1)[1] for one in table.failures(lines)] == [
        "find from 1e-4: 22 validation forwards",
        "find from 1e-4: found 2.3e-2, 6.0% above Adam at 1e-2",
        "find from 1e-3: training loss nan in step 7",
        "find from 1e-2: above where it began",
        "prodigy from 1e-2: no such package",
    ]
    (one,) = table.verdicts(lines)
    assert one["worst"] is None and one["near"] == 0.5 and one["diverged"] == 2


def test_flops_to_a_loss_lie_between_the_measured_ones(benchmarks):
    flops_to = benchmarks("learning_rate_table").flops_to
    run = line("adam", 1e-2, 2.0)
    assert flops_to(run, 2.1) == pytest.approx(75.0)
    assert flops_to(run, 2.0) == 100.0 and flops_to(run, 1.99) is None
    run["curve"].insert(1, [10, 20, None])
    assert flops_to(run, 2.2) == 50.0


def test_plans_have_no_run_twice_in_another_guise(benchmarks):
    plan = benchmarks("learning_rate_plan")
    runs = [run for run in plan.grid() if run.contender == "find" and run.steps == plan.STEPS]
    for schedule in ("constant", "linear"):
        covered = {(r.task, r.seed, r.lr) for r in runs if (r.schedule, r.variant) == (schedule, "standard")}
        assert covered >= {(t, s, lr) for t in plan.TASKS for s in plan.SEEDS for lr in plan.CLAIMED}
    # The seeds that the rule was chosen on are not those that it is judged by.
    assert not {run.seed for run in plan.calibrate()} & {run.seed for run in runs}


def test_a_real_model_is_compared_at_equal_flops_and_at_as_many_steps(tool):
    rates = tool("results_rates")
    found = line("find", 1e-5, 2.05, optimizer_steps=45, found=0.00702)
    apart = line("find", 1e-3, 9.0, optimizer_steps=45, found=0.02)
    lines = [{**one, "optimizer_steps": 60} for one in a_sweep()] + [found, apart]
    config = {"tasks": ["chat"], "model": "smollm2-135m", "steps": 60, "warmup_steps": 6, "rank": 8}
    config |= {"dtype": "bfloat16", "batch_size": 8, "max_length": 64}
    config |= {"test_examples": 9, "validation_examples": 32}
    data = {"kind": rates.KIND, "fast": False, "config": config, "command": "c"}
    data |= {"runs": lines, "calibration": []}
    data |= {"machine": {"gpus": [], "cpu": "x", "threads": 1}}
    data |= {"versions": dict.fromkeys(("torch", "transformers", "peft"), "1")}
    text = rates.learning_rates({"some": data}).splitlines()
    # Tuned Adam is at 2.2 after 30 steps and at 2.0 after 60, so at 2.1 after 45.
    assert text[-2].endswith("| 1e-5 | 7e-3 | 45 | 0 | 2.050 | +2.5 % | −2.4 % |")
    assert text[-1].endswith("| 1e-3 | 2e-2 | 45 | 0 | 9.000 | diverged | diverged |")


@pytest.mark.slow
def test_a_dry_run_is_written_and_not_run_again(benchmarks, tmp_path, capsys):
    bench, path = benchmarks("learning_rate"), tmp_path / "runs.jsonl"
    assert bench.main(["--plan", "fast", "--runs", str(path)]) == 0
    done = bench.finished(path)
    assert len(done) == 5 and all(math.isfinite(one["loss"]) for one in done.values())
    assert all(one["flops"] <= one["budget"] for one in done.values() if one["contender"] != "keep")
    assert bench.main(["--plan", "fast", "--runs", str(path)]) == 0
    assert "0 runs to do" in capsys.readouterr().out and bench.finished(path) == done


def test_what_the_documentation_says_of_it(tool, tmp_path):
    rates, record = tool("results_rates"), tool("learning_rate_record")
    assert rates.learning_rates({}) == rates.NOTHING
    lines = [*a_sweep(), line("find", 1e-5, 2.03, found=0.0123, forwards=11, own_flops=5)]
    lines += [line("prodigy", 1e-4, None, failed="no such package"), line("adam", 1e-3, 2.6)]
    lines += [line("find", 1e-4, 1.0, found=0.01, seed=10)]
    data = record.document(lines, "python x.py", fast=False)
    assert [one["seed"] for one in data["calibration"]] == [10] and len(data["runs"]) == len(lines) - 1
    doc = tool("results_doc")
    record.write(data, tmp_path / "benchmarks" / "results" / "learning_rate_tiny_2026-01-01.json")
    results = doc.read_results(tmp_path)
    text = doc.builders(results)["learning-rates"]()
    assert "What failed (1 line):\n\n- chat, seed 0, constant, standard: prodigy from 1e-4: no such" in text
    assert "| constant | 1 | 100 % | +1.5 % | +1.5 % | 0 | 11 (11) |" in text
    assert '| `learning_rate="find"`, no stages | 1e-5 | 1 | +1.5 % | +1.5 % | 5 % |' in text
    assert "| Adam | 1e-3 | 1 | +30.0 % | +30.0 % | 0 % | not reached |" in text
    assert "| prodigy | 1e-4 | 1 | failed |" in text
    assert "| Adam, tuned by a sweep | – | 1 |" in text
