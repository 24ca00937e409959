"""What the stage benchmark says of a measurement: which promises are kept, and what was never measured."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")


def provider(ms, *, step=None, gap=0.0, gap_of_step=0.0, peak=0):
    return {
        "ms_per_step": {"median": ms, "p20": ms, "p80": ms, "samples": 5},
        "ms_step": step or ms,
        "ms_fixed": 1.0,
        "gap": gap,
        "gap_of_step": gap_of_step,
        "peak_bytes": peak,
        "held_bytes": peak,
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
        "tokens": 5,
        "padded_tokens": 10,
        "providers": {name.replace("_", " "): value for name, value in providers.items()},
        "missing": {},
    }


@pytest.fixture()
def good(benchmarks):
    """A result that keeps every promise, each only just."""
    cases = {(case.model, case.length): case for case in reversed(benchmarks("stage_cases").CASES)}
    smol, llama = "SmolLM2-135M", "Llama-3-8B"
    same = {"stages": 48, "same_tau": 46, "same_losses": 30, "same_weights": 30}
    quiet = dict.fromkeys(("on device", "reads", "launches", "copies", "syncs", "event syncs"), 0)
    return {
        "dry": False,
        "rows": [
            row(cases[smol, 64], authors=provider(9.0), clean_eager=provider(4.0), stage_graph=provider(3.0)),
            row(
                cases[smol, 256],
                stage_graph=provider(3.0, gap=0.5, gap_of_step=0.01),
                step_graph=provider(3.0, gap_of_step=0.009),
            ),
            row(cases[smol, 1024], authors=provider(2.6), step_graph=provider(2.0)),
            row(
                cases[llama, 1024],
                authors=provider(1.3),
                clean_eager=provider(1.0, peak=100),
                ours_eager=provider(1.0, peak=35),
                stage_graph=provider(1.0, peak=34),
            ),
        ],
        "left_out": [],
        "counts": {
            "case": "smallest",
            "evaluations": 4,
            "providers": {
                "step graph": {
                    "stage": {"graphs": 4, "waits": 6, **quiet},
                    "step": {"graphs": 1, "waits": 1, **quiet},
                },
                "stage graph": {
                    "stage": {"graphs": 1, "waits": 1},
                    "step": {"graphs": 0, "waits": 0},
                    "missing": "the profiler ended the process",
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
    table = benchmarks("stage_table")
    found = table.stage_targets(good)
    assert [target["what"] for target in found if not target["met"]] == []
    assert len(found) == 12
    assert table.stage_targets({**good, "dry": True}) == []
    text = "\n".join(table.render_stages(good))
    assert "the profiler ended the process" in text and "50% of the padded" in text


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda r: r["rows"][0]["providers"]["stage graph"]["ms_per_step"].update(median=3.1), "32×64"),
        (lambda r: r["rows"][1]["providers"]["stage graph"].update(gap_of_step=0.0101), "stage graph, Smol"),
        (lambda r: r["rows"][2]["providers"].pop("step graph"), "32×1024"),
        (lambda r: r["rows"][3]["providers"]["ours eager"].update(peak_bytes=36), "ours eager"),
        (lambda r: r["counts"]["providers"]["step graph"]["step"].update(launches=1), "step graph: 1 launch"),
        (lambda r: r["counts"]["providers"]["stage graph"]["stage"].update(waits=2), "1 host sync"),
        (lambda r: r["agreement"]["loss"].update(largest_difference=2e-5), "float32 loss"),
        (lambda r: r["agreement"]["loss"].pop("captured"), "float32 loss"),
        (lambda r: r["agreement"]["tau"].pop("step graph"), "step graph: τ"),
        (lambda r: r["agreement"]["tau"]["stage graph"].update(same_tau=45), ": τ of eager"),
    ],
)
def test_a_broken_promise_is_named(benchmarks, good, spoil, what):
    spoil(good)
    broken = [t for t in benchmarks("stage_table").stage_targets(good) if not t["met"]]
    assert broken and all(what in target["what"] for target in broken)


def test_what_is_missing_is_not_kept(benchmarks, good):
    empty = {**good, "rows": [], "counts": {}, "agreement": {}}
    found = benchmarks("stage_table").stage_targets(empty)
    assert len(found) >= 10 and not any(target["met"] for target in found)
    assert {target["measured"] for target in found} == {"not measured"}


def test_a_trace_is_counted(benchmarks):
    profile = benchmarks("stage_profile")
    events = [
        {"cat": "kernel", "name": "gemm"},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx"},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync"},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaEventSynchronize"},
        {"cat": "cuda_runtime", "name": "cudaEventRecord"},
        {"cat": "cpu_op", "name": "aten::mm"},
        {"name": "no category"},
    ]
    found = profile.counted(events)
    assert {kind: found[kind] for kind in profile.KINDS} == {
        "on device": 2,
        "reads": 1,
        "launches": 2,
        "copies": 1,
        "syncs": 1,
        "event syncs": 1,
    }
    assert profile.per_step({"graphs": 3}, {"graphs": 5}, 2) == {
        "stage": {"graphs": 5},
        "step": {"graphs": 1},
    }


def test_the_stated_lengths_are_those_that_are_made(benchmarks):
    cases = benchmarks("stage_cases")
    mixed = cases.lengths_of(cases.Case(cases.SMOL, 1024))
    assert len(mixed) == 32 and max(mixed) == 1024 and min(mixed) >= 64 and len(set(mixed)) > 20
    assert 0.3 < sum(mixed) / (32 * 1024) < 0.5
    assert cases.lengths_of(cases.Case(cases.SMOL, 64, lengths="equal")) == [64] * 32
    batch = cases.collate(cases.make_examples(cases.Case(cases.SMOL, 64), 300)[:2])
    assert int(batch["attention_mask"].sum()) == int(batch["labels"].ne(-100).sum())
