"""From runs to evidence: shares, what is complete, how it goes on; and the plan that it is of."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from benchmarks import record as files

INF = math.inf
CURVE = [[0.5, 10.0, 2.5], [1.0, 20.0, 2.0]]
NAMES = {
    *(
        "auto",
        "Fast Forward, 1e-4",
        "Adam, 1e-4",
        "Adam, 2e-4",
        "Thinking Machines",
        "sweep of 3",
        "gen",
        "gala",
    ),
    *("hypergradient", "schedule-free+", "mechanic", "prodigy", "greedy", "lightning"),
}


@pytest.fixture()
def bench(benchmarks):
    """The benchmark's modules by name."""
    names = ("workloads", "plan", "record", "table", "shares", "profile", "__main__")
    return SimpleNamespace(**{name.strip("_"): benchmarks(f"learning_rate.{name}") for name in names})


@pytest.fixture()
def small(bench, monkeypatch):
    """Two workloads, seeds 0 and 1, two contenders besides "auto"; one workload to calibrate on."""
    plan, chat, medical = bench.plan, *(bench.workloads.Workload(t, 4, 100) for t in ("chat", "medical"))
    middle = bench.workloads.METHODS["lora"].rate

    def evaluation():
        for seed, workload in ((0, chat), (0, medical), (1, chat), (1, medical)):
            yield plan.oracle(workload, seed, middle)
            yield plan.Item(workload, seed, "auto")
            yield plan.Item(workload, seed, "adam", (1e-4,))
            yield plan.Item(workload, seed, "gen")
            yield plan.oracle(workload, seed, middle)

    def calibration():
        yield plan.oracle(medical, 10, middle, first=10)
        yield plan.Item(medical, 10, "auto")
        yield plan.Item(medical, 10, "adam", (1e-3, 2e-3))
        for step in ("hypergradient 1e-4", "hypergradient 1e-5"):
            yield plan.Item(medical, 10, step)

    def both():
        yield from calibration()
        yield from evaluation()

    for make in (calibration, evaluation):
        monkeypatch.setitem(plan.PLANS, make.__name__, make)
    monkeypatch.setitem(plan.PLANS, "workloads", both)
    return SimpleNamespace(chat=chat, medical=medical)


def line_of(run, loss, **fields):
    workload = run.workload
    return {
        **{"key": run.key, "workload": workload.name, "group": workload.group, **vars(workload)},
        **{"seed": run.seed, "contender": run.contender, "lr": run.lr, "loss": loss, "start": 4.0},
        **{"taken": 100, "own": 0.0, "worst": 1.0790966, "worst_at": 1, "seconds": 20.04, "curve": CURVE},
        **{"rate": run.lr or 0.0123456, "rates": [1e-6, 4e-6], "cosines": [None, -0.3], "commit": "abc"},
        **fields,
    }


def run_all(plan, name, loss_of, done=None):
    """The lines of a plan that is run to its end; ``loss_of(run)`` is what each ends at."""
    done, keys = {} if done is None else done, []
    for item in plan.PLANS[name]():
        while (run := item.next(done)) is not None:
            keys.append(run.key)
            done[run.key] = line_of(run, loss_of(run))
    assert len(keys) == len(set(keys))
    return done


def losses(run):
    """Tuned: 1e-2 (medical 2e-2) at 2.0; L₀ is 4."""
    best = 2e-2 if run.workload.task == "medical" else 1e-2
    if run.lr is not None:
        return 2.0 + min(1.9, 0.25 * abs(math.log2(run.lr / best)))
    return {"auto": 2.04, "gen": 2.2 if run.seed else None}.get(run.contender, 2.5)


def entry(document, task, kind="evaluation"):
    return next(one for one in document[kind] if f", {task}, " in one["workload"])


def without(done, *parts):
    return {key: line for key, line in done.items() if not all(part in key for part in parts)}


def test_a_share_is_what_is_left_of_what_tuned_adam_recovers(bench, small):
    done = run_all(bench.plan, "workloads", losses)
    document = bench.record.document(done.values(), "workloads")
    chat, medical = entry(document, "chat"), entry(document, "medical")
    # (2.04 − 2) / (4 − 2), (2.2 − 2) / 2, (3.66 … − 2) / 2.
    assert chat["share"]["auto"] == [0.02, 0.02] and chat["share"]["gen"] == [None, 0.1]
    assert chat["share"]["Adam, 1e-4"] == pytest.approx([0.125 * math.log2(100)] * 2, abs=1e-5)
    assert list(chat["share"]) == ["auto", "Adam, 1e-4", "gen"] and chat["seeds"] == [0, 1]
    assert (chat["tuned_lr"], chat["tuned_lrs"], chat["inside"]) == (1e-2, [1e-2] * 2, True)
    assert medical["tuned_lr"] == 2e-2 and document["incomplete"] == []
    (one,) = document["calibration"]
    assert one["seeds"] == [10] and list(one["share"]) == [
        *("auto", "Adam, one constant (1e-3)", "Adam, one constant (2e-3)"),
        *("hypergradient 1e-4", "hypergradient 1e-5"),
    ]
    assert document["kind"] == "rate_workloads" and document["machine"]["threads"] == 1
    assert document["versions"]["git_commit"] == "abc"
    assert document["config"]["constant"] == bench.plan.CONSTANT
    assert document["seconds"] == round(20.04 * len(done)) and len(document["runs"]) == len(done)


def test_the_lowest_loss_counts_whoever_ran_the_rate(bench, small):
    def lower(run):
        return 1.0 if run.lr == 1e-4 and run.seed == 1 else losses(run)

    done = run_all(bench.plan, "evaluation", lower)
    document = bench.record.document(done.values(), "evaluation")
    chat = entry(document, "chat")
    assert chat["tuned_lrs"] == [1e-2, 1e-4] and chat["share"]["Adam, 1e-4"][1] == 0.0
    assert chat["share"]["auto"] == [0.02, round(1.04 / 3, 5)]
    assert chat["inside"] is True, "the sweep of seed 1 went on below 1e-4"
    below = without(done, "chat", "seed 1: adam 5e-05")
    assert entry(bench.record.document(below.values(), "evaluation"), "chat")["seeds"] == [0]
    assert document["calibration"] == []


def test_what_failed_is_infinite_and_what_is_better_than_tuned_is_negative(bench, small):
    done = run_all(bench.plan, "evaluation", losses)
    key = next(key for key in done if "chat" in key and "seed 1: auto" in key)
    failed = {k: v for k, v in done[key].items() if k not in ("start", "curve", "rate")}
    done[key] = {**failed, "loss": None, "failed": "no"}
    other = key.replace("chat", "medical")
    done[other] = {**done[other], "loss": 1.9}
    document = bench.record.document(done.values(), "evaluation")
    assert entry(document, "chat")["share"]["auto"] == [0.02, None]
    assert entry(document, "medical")["share"]["auto"] == [0.02, -0.05]
    shares = bench.shares.Shares(document)
    assert shares.shares["auto"] == [0.02, INF, 0.02, -0.05]
    assert shares.costs("auto")[1] == (INF, INF)


@pytest.mark.parametrize(
    "gone, missing, left",
    [
        (("chat", "seed 1: gen"), [(1, ["gen"])], [0]),
        (("chat", "seed 0: auto"), [(0, ["auto"])], [1]),
        (("chat", "seed 1: adam 0.02"), [(1, ["the oracle"])], [0]),
        (("chat", "seed 1: adam 0.0001"), [(1, ["Adam, 1e-4"])], [0]),
        # The best rate of seed 0 is what the others are run at.
        (("chat", "seed 0: adam 0.005"), [(0, ["the oracle"]), (1, ["the oracle"])], []),
        (("chat", "seed 1"), [], [0]),  # not begun
    ],
)
def test_a_seed_counts_when_all_have_run_and_else_is_named(bench, small, gone, missing, left):
    done = without(run_all(bench.plan, "evaluation", losses), *gone)
    document = bench.record.document(done.values(), "evaluation")
    assert [(one["seed"], one["missing"]) for one in document["incomplete"]] == missing
    assert {one["workload"] for one in document["incomplete"]} <= {small.chat.name}
    seeds = [one["seeds"] for one in document["evaluation"] if one["workload"] == small.chat.name]
    assert seeds == ([left] if left else [])
    assert entry(document, "medical")["seeds"] == [0, 1]
    if missing:
        said = bench.shares.unfinished(document).splitlines()[2:]
        assert said[0] == (
            f"- LoRA, α = 16, chat, batch 4, 100 steps, constant, seed {missing[0][0]}: without "
            + bench.shares.label(missing[0][1][0])
        )


def test_a_sweep_whose_best_rate_is_at_its_end_is_not_at_its_end(bench, small):
    done = run_all(bench.plan, "evaluation", losses)
    done = without(done, "medical", "seed 0: adam 0.04")
    document = bench.record.document(done.values(), "evaluation")
    assert [one["workload"] for one in document["evaluation"]] == [small.chat.name]
    assert {one["missing"][0] for one in document["incomplete"]} == {"the oracle"}
    inside = bench.record.inside
    assert inside({1e-2: 1.0, 8e-3: 2.0, 2e-2: INF}) and not inside({1e-2: 1.0, 4e-3: 2.0, 2e-2: 2.0})
    assert not inside({1e-2: 1.0, 5e-3: 2.0}) and not inside({1e-2: 1.0, 5e-3: 2.0, 4e-2: 2.0})


def test_runs_that_adam_recovers_nothing_on_and_runs_of_other_plans_are_left_out(bench, small):
    done = run_all(bench.plan, "evaluation", lambda run: 2.5 + (losses(run) or 0))
    run = bench.plan.Run(bench.workloads.Workload("chat", 4, 120), 0, "auto")
    document = bench.record.document([*done.values(), line_of(run, 2.0)], "evaluation")
    assert document["evaluation"] == [] and run.workload.name not in document["workloads"]
    assert len(document["runs"]) == len(done)
    assert bench.shares.summary(document).startswith("*No workload has been run to its end.*")
    assert "recovers anything" in bench.shares.summary(document)


def same(document):
    """What does not depend on when a document was made."""
    machine = {k: v for k, v in document["machine"].items() if k != "load"}
    return {**document, "machine": machine, "measured_at": None}


def test_a_result_has_all_that_is_needed_to_go_on(bench, small):
    done = run_all(bench.plan, "workloads", losses)
    odd = next(line for line in done.values() if line["lr"] == 1e-2)
    run = bench.plan.Run(small.chat, 0, "adam", 4.6875e-05)  # five digits: its key must come back
    done[run.key] = line_of(run, 3.123456789)
    odd["curve"] = [[0.12346, 1.234, 2.12346], [1.0, 2.0, None]]
    document = json.loads(files.text_of(bench.record.document(done.values(), "workloads")))
    lines = bench.record.resumed(document)
    assert [line["key"] for line in lines] == list(done)
    assert lines[-1]["lr"] == 4.6875e-05 and lines[-1]["loss"] == 3.12346
    assert "rates" not in document["runs"][0] and "cosines" not in document["runs"][0]
    assert document["runs"][list(done).index(odd["key"])]["curve"] == [
        [0.1235, 1.23, 2.1235],
        [1.0, 2.0, None],
    ]
    assert same(bench.record.document(lines, "workloads")) == same(document)
    assert all(
        item.next({line["key"]: line for line in lines}) is None for item in bench.plan.PLANS["workloads"]()
    )
    kept = bench.record.resumed(document, "auto")
    assert kept == [line for line in lines if line["contender"] != "auto"] and len(kept) < len(lines)
    with pytest.raises(ValueError, match="a result of the kind 'ranks' has no runs on workloads to resume"):
        bench.record.resumed({"kind": "ranks"})


def test_runs_of_another_machine_are_told_apart(bench, small):
    done = run_all(bench.plan, "evaluation", losses)
    document = bench.record.document(done.values(), "evaluation")
    here = document["machine"]["cpu"]
    assert not any("cpu" in run for run in document["runs"])
    document["machine"]["cpu"] = "another"
    lines = bench.record.resumed(document)
    lines[0]["cpu"] = here
    again = bench.record.document(lines, "evaluation")
    assert again["machine"]["cpu"] == here and "cpu" not in again["runs"][0]
    assert {run["cpu"] for run in again["runs"][1:]} == {"another"}
    assert bench.shares.measured("x.json", again).endswith(" Some runs: another.")
    assert not bench.shares.measured("x.json", document).endswith("another.")


def test_the_command_goes_on_with_a_result_where_there_are_no_runs(bench, small, tmp_path, monkeypatch):
    done = run_all(bench.plan, "workloads", losses)
    (gone,) = [key for key in done if "chat" in key and "seed 1: gen" in key]
    result, runs = tmp_path / "rate_workloads_2026-01-01.json", tmp_path / "runs.jsonl"
    files.write(bench.record.document(without(done, gone).values(), "workloads"), result)
    measured = []

    def measure(run, benches, device):
        measured.append(run.key)
        return {k: v for k, v in line_of(run, losses(run)).items() if k != "commit"}

    monkeypatch.setattr(bench.main, "measure", measure)
    command = ["--plan", "workloads", "--runs", str(runs), "--resume", str(result)]
    assert bench.main.main(command) == 0 and measured == [gone]
    assert set(files.lines_of(runs, "key")) == set(done)
    runs.write_text("", encoding="utf-8")  # a file that is there is not filled again
    assert bench.main.main([*command, "--list"]) == 0 and runs.read_text(encoding="utf-8") == ""
    runs.unlink()
    out = tmp_path / "new.json"
    assert bench.main.main([*command, "--out", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["incomplete"] == [{"workload": small.chat.name, "seed": 1, "missing": ["gen"]}]
    assert measured == [gone]


def test_the_sets_have_nothing_in_common_that_would_tell(bench):
    plan = bench.plan
    seeds = [{seed for _, seed in bench.record.places(name)} for name in ("calibration", "evaluation")]
    assert seeds == [{10}, {0, 1, 2}]
    tasks, methods = (
        [{getattr(w, part) for w in ws} for ws in (plan.CALIBRATION, plan.EVALUATION)]
        for part in ("task", "method")
    )
    assert "chat" in tasks[1] and "chat" not in tasks[0]
    assert len(methods[1] - methods[0]) >= 8
    assert not {w.name for w in plan.CALIBRATION} & {w.name for w in plan.EVALUATION}


def test_the_plan_runs_each_once_and_is_complete_at_its_end(bench):
    """Every contender by its name; ``run_all`` fails for a run that comes twice."""
    plan, constant = bench.plan, f"Adam, one constant ({bench.table.rate(bench.plan.CONSTANT)})"
    for (workload, seed), items in bench.record.places("evaluation").items():
        assert bench.record.contenders(items, "evaluation").keys() == NAMES | {constant}
        assert sum(item.more is not None for item in items) == 2, (workload.name, seed)
    few = [item for item in plan.PLANS["evaluation"]() if item.workload in plan.EVALUATION[:2]]
    few += [item for item in plan.PLANS["calibration"]() if item.workload in plan.CALIBRATION[:2]]

    def loss(run):
        best = bench.workloads.METHODS[run.workload.method].rate / 4
        return 2.0 + (min(1.9, 0.3 * abs(math.log2(run.lr / best))) if run.lr else 0.1)

    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.PLANS, "few", lambda: iter(few))
        run_all(plan, "few", loss, done)
        assert all(item.next(done) is None for item in few)
    document = bench.record.document(done.values(), "workloads")
    assert document["incomplete"] == []
    assert [(one["workload"], one["seeds"]) for one in document["evaluation"]] == [
        (workload.name, [0, 1, 2]) for workload in plan.EVALUATION[:2]
    ]
    assert [one["seeds"] for one in document["calibration"]] == [[10], [10]]
    assert document["evaluation"][0]["tuned_lr"] == 2.5e-3
    workloads = [(i.workload, i.seed, i.contender, i.rates) for i in plan.PLANS["workloads"]()]
    parts = [
        (i.workload, i.seed, i.contender, i.rates)
        for p in ("calibration", "evaluation")
        for i in plan.PLANS[p]()
    ]
    others = [part for part in parts if part[2] != "adam"]
    assert workloads == parts and len(set(others)) == len(others)
