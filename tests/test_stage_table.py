"""What the stage benchmark says of a measurement: which promises are kept, and what was never measured."""

import subprocess
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_needs_neither_torch_nor_the_package():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import benchmarks.gpu_check.table; print('well')"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True)
    assert done.stdout == "well\n", done.stderr


def test_what_is_promised_fits_into_one_call(benchmarks):
    cases = benchmarks("stages.cases")
    first = cases.CASES[: cases.ROWS_BEFORE_PROFILE]
    measured = [
        (cases.SMOL, 64),
        (cases.SMOL, 256),
        (cases.SMOL, 1024),
        (cases.LLAMA, 1024),
        (cases.LLAMA, 64),
    ]
    assert [(case.model, case.length) for case in first] == measured
    # 30 s to start, 40 for losses and τ, and the profiler's 120 at most.
    assert 30 + sum(case.seconds for case in first) + 40 + 120 <= 470
    assert first[0].full and first[1].full, "both searches, where the percent is judged"


def test_a_verdict_takes_the_spread_into_account(benchmarks):
    judged = benchmarks("stages.table").judged

    def gap(low, value, high, rounds=15):
        return {"low": low, "value": value, "high": high, "rounds": rounds}

    assert judged(gap(0.004, 0.006, 0.009), 0.01) == "met"
    assert judged(gap(0.011, 0.012, 0.013), 0.01) == "not met"
    assert judged(gap(0.002, 0.006, 0.012), 0.01) == "not resolved"
    assert judged(gap(0.009, 0.015, 0.021), 0.01) == "not resolved"
    assert judged(gap(0.004, 0.006, 0.009, rounds=14), 0.01) == "not resolved"
    assert judged({"value": 0.001}, 0.01) == "not resolved"


def provider(ms, *, gap=0.0, low=0.0, high=0.0, peak=0.0):
    return {
        "ms_per_step": {"median": ms, "p20": ms, "p80": ms, "samples": 15},
        "ms_step": ms,
        "ms_fixed": 1.0,
        "gap": gap,
        "gap_of_step": {"value": (low + high) / 2, "low": low, "high": high, "rounds": 15},
        "gigabytes": {"peak": peak, "held": peak / 2},
        "first_stage_seconds": 1.0,
    }


def row(case, **providers):
    return {
        "case": case.name,
        "model": case.model,
        "length": case.length,
        "lengths": case.lengths,
        "evaluations": case.evaluations,
        "weights": "random",
        "gigabytes": 0.27,
        "tokens": 5,
        "padded_tokens": 10,
        "micro_batches": [[20, 8], [12, 16]],
        "providers": {name.replace("__", ", ").replace("_", " "): value for name, value in providers.items()},
        "missing": {},
    }


@pytest.fixture()
def good(benchmarks):
    """A result that keeps every promise, each only just."""
    cases = {(case.model, case.length): case for case in reversed(benchmarks("stages.cases").CASES)}
    smol, llama = "SmolLM2-135M", "Llama-3-8B"
    same = {"stages": 48, "same_tau": 46, "same_losses": 30, "same_weights": 30}
    quiet = dict.fromkeys(("on device", "reads", "launches", "copies", "syncs", "event syncs"), 0)
    return {
        "dry": False,
        "rows": [
            row(cases[smol, 64], authors=provider(9.0), clean_eager=provider(4.0), stage_graph=provider(3.0)),
            row(
                cases[smol, 256],
                stage_graph=provider(3.0, gap=0.5, low=0.008, high=0.01),
                step_graph=provider(3.0, high=0.009),
                stage_graph__linear=provider(3.0, high=0.009),
                step_graph__linear=provider(3.0, high=0.009),
            ),
            row(cases[smol, 1024], authors=provider(2.6), step_graph=provider(2.0)),
            row(
                cases[llama, 1024],
                authors=provider(1.3),
                clean_eager=provider(1.0, peak=100.0),
                ours_eager=provider(1.0, peak=35.0),
                stage_graph=provider(1.0, peak=34.0),
            ),
        ],
        "left_out": [],
        "counts": {
            "case": "smallest",
            "evaluations": 10,
            "profiled evaluations": 4,
            "failure": "exit status -11: ",
            "providers": {
                "step graph": {
                    "stage": {"graphs": 10, "operators": 3, "waits": 12},
                    "step": {"graphs": 1, "operators": 0, "waits": 1},
                    "profile": {"stage": {**quiet, "launches": 2}, "step": quiet},
                },
                "stage graph": {
                    "stage": {"graphs": 1, "operators": 0, "waits": 1},
                    "step": {"graphs": 0, "operators": 0, "waits": 0},
                    "changed": {"another start": {"graphs": 1, "operators": 1, "waits": 1}},
                    "profile": {"missing": "the profiler ended the process"},
                },
            },
        },
        "agreement": {
            "loss": {"model": "x", "weights": "random", "captured": 1.0, "largest_difference": 9e-6},
            "tau": {"dtype": "torch.bfloat16", "stages": 48, "step graph": same, "stage graph": same},
        },
        "errors": [],
    }


def test_every_promise_can_be_kept(benchmarks, good):
    table = benchmarks("stages.table")
    found = table.stage_targets(good)
    assert [target["what"] for target in found if not target["met"]] == []
    assert {target["verdict"] for target in found} == {"met"} and len(found) == 14
    assert table.stage_targets({**good, "dry": True}) == []
    assert "0.90% [0.80%, 1.00%] (50.00% with the stage's fixed 1.00 ms)" in [t["measured"] for t in found]
    launches = next(t["measured"] for t in found if t["what"].startswith("stage graph: 1 graph launch"))
    assert launches == (
        "graphs 1, operators 0, waits 1; another start: graphs 1, operators 1, waits 1; "
        "not profiled: the profiler ended the process"
    )
    text = "\n".join(table.render_stages(good))
    assert "50% of the padded ones), planned as 20×8 + 12×16" in text
    assert "random weights of 0.27 GB" in text and "the profiler ended the process" in text
    line = next(line for line in text.split("\n") if "100.000" in line)
    assert line.split() == (
        "clean eager 1.000 [1.000, 1.000] 100.000 50.000 0.0% 1.000 0.00% [0.00%, 0.00%] 15 1.00 1.00".split()
    )


def put(*path, **fields):
    return lambda result: reduce(getitem, path, result).update(fields)


def drop(*path):
    return lambda result: reduce(getitem, path[:-1], result).pop(path[-1])


def gap_of(name, **fields):
    return put("rows", 1, "providers", name, "gap_of_step", **fields)


def count_of(name, *path, **fields):
    return put("counts", "providers", name, *path, **fields)


@pytest.mark.parametrize(
    ("spoil", "what", "verdict"),
    [
        (put("rows", 0, "providers", "stage graph", "ms_per_step", median=3.1), "32×64", "not met"),
        (gap_of("stage graph", high=0.0101), "stage graph, Smol", "not resolved"),
        (gap_of("stage graph", low=0.0101, high=0.02), "stage graph, Smol", "not met"),
        (gap_of("stage graph", rounds=3), "stage graph, Smol", "not resolved"),
        (
            gap_of("step graph, linear", high=0.0101),
            "step graph, linear, SmolLM2-135M 32×256: a step at most 1% over the bare forward, linear",
            "not resolved",
        ),
        (drop("rows", 2, "providers", "step graph"), "32×1024", "not measured"),
        (put("rows", 3, "providers", "ours eager", "gigabytes", peak=36), "ours eager", "not met"),
        (count_of("step graph", "profile", "step", launches=1), "step graph: 1 graph launch", "not met"),
        (count_of("step graph", "step", operators=1), "step graph: 1 graph launch", "not met"),
        (count_of("stage graph", "stage", waits=2), "1 host sync", "not met"),
        (count_of("stage graph", "stage", operators=1), "1 host sync", "not met"),
        (put("agreement", "loss", largest_difference=2e-5), "float32 loss", "not met"),
        (drop("agreement", "loss", "captured"), "float32 loss", "not measured"),
        (drop("agreement", "tau", "step graph"), "step graph: τ", "not measured"),
        (put("agreement", "tau", "stage graph", same_tau=45), ": τ of eager", "not met"),
        (put("agreement", "tau", "stage graph", stages=39, same_tau=39), ": τ of eager", "not resolved"),
    ],
)
def test_a_broken_promise_is_named(benchmarks, good, spoil, what, verdict):
    if "stage graph" in what or what == ": τ of eager":
        good["agreement"]["tau"]["stage graph"] = dict(good["agreement"]["tau"]["stage graph"])
    spoil(good)
    broken = [t for t in benchmarks("stages.table").stage_targets(good) if not t["met"]]
    assert broken and all(what in target["what"] for target in broken)
    assert {target["verdict"] for target in broken} == {verdict}


def test_what_is_missing_is_not_kept(benchmarks, good):
    empty = {**good, "rows": [], "counts": {}, "agreement": {}}
    found = benchmarks("stages.table").stage_targets(empty)
    assert len(found) >= 10 and not any(target["met"] for target in found)
    assert {(t["verdict"], t["measured"]) for t in found} == {("not measured", "nothing")}
    assert benchmarks("stages.table").render_stages(empty)
