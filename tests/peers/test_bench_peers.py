"""What bench_peers finds: memory that is held, and which promises a measurement keeps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ffkernels import FastForwardConfig
from ffkernels.training.config import TrainConfig


@pytest.mark.slow
def test_ours_holds_the_same_after_every_stage_and_the_authors_loop_more_and_more(benchmarks, short):
    memory = benchmarks("peers.memory")
    plain = TrainConfig(**{**short, "steps": 24, "lr": 3e-2})
    ours = TrainConfig(**{**short, "steps": 24, "lr": 3e-2, "fast_forward": FastForwardConfig(patience=None)})
    methods = {
        "adam": (plain, None, {}),
        "parabolic": (ours, None, {}),
        "authors": (plain, "authors", {"cap": 30}),
        "peft-prototype": (plain, "peft-prototype", {"cap": 30}),
    }
    rows = [{"name": name, **memory.held(*method)} for name, method in methods.items()]
    rows = {row["name"]: row for row in memory.compare_rows(rows)}
    adapter, model = rows["adam"]["adapter_bytes"], rows["adam"]["model_bytes"]
    assert [len(row["evaluations"]) for row in rows.values()] == [0, 4, 4, 4]
    assert rows["adam"]["beyond_adam"] == [0] * 4
    assert rows["parabolic"]["growth"] == 0
    beyond = rows["authors"]["beyond_adam"]
    assert [b - a for a, b in pairwise(beyond)] == [2 * adapter] * 3
    # Two copies of all parameters, and the graph of its last validation.
    assert min(rows["peft-prototype"]["beyond_adam"]) > 2.1 * model


def test_a_graph_that_is_kept_counts_until_it_is_freed(benchmarks):
    live_bytes, cpu = benchmarks("peers.memory").live_bytes, torch.device("cpu")
    start = live_bytes(cpu)
    weight = torch.ones(1000, requires_grad=True)
    assert live_bytes(cpu) - start == 4000
    loss = weight.exp().sum()  # exp keeps its result
    assert live_bytes(cpu) - start == 4000 + 4000 + 4
    loss.backward()
    weight.grad = None
    assert live_bytes(cpu) - start == 4000 + 4


def run(name, *stages, seed=0, lr=1e-4, steps=12, flops=50):
    return {
        "name": name,
        "lr": lr,
        "seed": seed,
        "optimizer_steps": steps,
        "test_loss": 2.0,
        "reached": None if name == "adam" else True,
        "flops": {"measured": flops, "paper": flops},
        "seconds": {"total": 3.0},
        "validation_forwards": sum(forwards for forwards, _ in stages),
        "stages": [{"forwards": n, "seconds": s} for n, s in stages],
    }


def document(*, authors=(20, 4.0), growth=0):
    memory = {
        "adapter_bytes": 100,
        "live": [0] * 6,
        "beyond_adam": [0] * 5 + [growth],
        "resident": [None] * 6,
    }
    config = {"model": "tiny", "task": "instruction", "lr": [1e-4], "seeds": [0], "memory_rank": 64}
    return {
        **{"kind": "peers", "command": "x", "config": {**config, "batch_size": 8}},
        "machine": {"cpu": "a CPU", "threads": 1, "gpus": []},
        "versions": dict.fromkeys(("torch", "transformers", "peft")),
        "runs": [
            run("adam", flops=100),
            run("linear", (21, 3.0)),
            run("parabolic", (10, 1.0), (10, 1.5)),
            run("authors", authors, authors),
        ],
        "memory": [
            {**memory, "name": name, "growth": growth, "adapters_per_stage": growth / 400}
            for name in ("adam", "parabolic")
        ],
    }


def told(benchmarks, found):
    bench = benchmarks("peers.race")
    found["summary"] = bench.summary(found["runs"])
    found["promises"] = bench.promises(found)
    lines = [*bench.table({"peers.json": found}).splitlines(), *bench.told(found)]
    return {promise["what"].split(",")[0]: promise for promise in found["promises"]}, lines


def test_promises_are_judged_by_what_was_found(benchmarks):
    found = document()
    promises, table = told(benchmarks, found)
    assert promises["forwards"]["found"] == 2.0
    assert promises["seconds per stage"]["found"] == 4.0 / 1.25
    assert all(promise["met"] for promise in promises.values())
    assert "| Fast Forward, `parabolic` | 12 | 20 | 10 | 1.25 | 50 % | 0 % | 0 |" in table
    row = next(row for row in found["summary"] if row["name"] == "parabolic")
    assert (row["test_loss"], row["seconds_per_forward"]) == (2.0, 0.125)
    promises, table = told(benchmarks, document(authors=(19, 1.0), growth=50))
    assert not any(promise["met"] for promise in promises.values())
    assert any(line.startswith("NOT KEPT: forwards") for line in table)


def test_its_defaults_are_one_learning_rate_and_the_peers_are_warmed_up(benchmarks):
    bench = benchmarks("peers.race")
    options = bench.parse([])
    assert (options.lr, options.seeds, options.steps, options.batch_size) == ([1e-4], [0, 1], 120, 64)
    assert bench.comparison(options, 1e-4, 0, "runs").peers == ("authors", "peft-prototype")


@pytest.mark.slow
def test_the_whole_benchmark_in_small(benchmarks, tmp_path):
    found = benchmarks("peers.race").main(["--fast", "--out", str(tmp_path / "peers.json")])
    assert (tmp_path / "peers.json").is_file()
    assert [row["name"] for row in found["memory"]] == [
        "adam", "linear", "parabolic", "authors", "authors-32", "peft-prototype"
    ]  # fmt: skip
    assert {row["name"] for row in found["memory"] if row["growth"] > 0} == {"authors", "authors-32"}
    assert [run["name"] for run in found["runs"]][-1] == "adam-tuned"
