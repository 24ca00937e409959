"""What the GPU check says of a measurement: which promises are kept, and what was never measured."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("transformers")


STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGINT, {handler})
print("begun", flush=True)
try:
    time.sleep(60)
finally:
    print("what was found so far", flush=True)
"""


@pytest.mark.parametrize(
    "handler",
    ["signal.default_int_handler", pytest.param("signal.SIG_IGN", marks=pytest.mark.slow)],
)
def test_a_stage_whose_time_is_up_says_what_it_found(benchmarks, tmp_path, monkeypatch, handler):
    check = benchmarks("gpu_check")
    monkeypatch.setattr(check, "LAST_WORDS_SECONDS", 1)
    command = [sys.executable, "-c", STUBBORN.format(handler=handler)]
    done = check.run(check.Stage("slow", command, 5), tmp_path, 5.0)
    assert (done["status"], done["reason"]) == ("failed", "stopped after 5 s")
    assert "begun" in done["output"] and done["seconds"] < 20
    assert ("what was found so far" in done["output"]) == (handler == "signal.default_int_handler")


def test_single_stages_can_be_chosen(benchmarks, tmp_path):
    check = benchmarks("gpu_check")
    every = [stage.name for stage in check.stages(tmp_path, False, [])]
    assert every[:4] == ["build", "provenance", "tests", "tests-stage"]
    assert every[4:7] == ["bench-stage", "bench-step", "end-to-end"]
    assert every[7] == "tests-profile", "what may end its process has one of its own, after what counts"
    one = check.stages(tmp_path, False, ["bench-stage"])
    assert [stage.name for stage in one] == ["build", "provenance", "bench-stage"]
    assert one[-1].limit == check.BUDGET_SECONDS > float(one[-1].command[-1]) > 300
    alone, among = (
        next(stage for stage in check.stages(tmp_path, False, only) if stage.name == "end-to-end")
        for only in (["end-to-end"], [])
    )
    assert 60 * float(among.command[-1]) < among.limit <= 100
    assert 300 < 60 * float(alone.command[-1]) < alone.limit == check.BUDGET_SECONDS
    with pytest.raises(SystemExit, match=r"--only nothing: there are build, provenance, tests"):
        check.stages(tmp_path, True, ["nothing"])


def test_what_a_gpu_has_to_save_end_to_end(benchmarks):
    table = benchmarks("end_to_end_table")

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
