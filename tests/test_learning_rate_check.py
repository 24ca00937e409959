"""Learning rates as the GPU check runs them: within so many seconds, random weights called so."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import record

pytest.importorskip("peft")


@pytest.fixture()
def bench(benchmarks):
    """The benchmark's modules by name."""
    names = ("workloads", "plan", "models", "bench", "contenders", "record", "check_table", "__main__")
    return SimpleNamespace(**{name.strip("_"): benchmarks(f"learning_rate.{name}") for name in names})


@pytest.fixture()
def clock(bench, monkeypatch):
    """A clock that moves by what ``takes`` says of a run; methods in ``broken`` fail."""
    found = SimpleNamespace(now=100.0, began=[], takes=lambda run: 10.0, broken=())

    def measure(run, benches, device):
        found.began.append((found.now - 100, run.workload.method, run.contender, run.lr))
        found.now += found.takes(run)
        head = {"key": run.key, "workload": run.workload.name, "group": run.workload.group}
        head |= {**vars(run.workload), "weights": run.workload.weights, "seed": run.seed, "start": 6.0}
        head |= {"contender": run.contender, "lr": run.lr, "rate": run.lr, "loss": 5.0, "seconds": 1.0}
        return {**head, "loss": None, "failed": "no"} if run.workload.method in found.broken else head

    monkeypatch.setattr(bench.main, "measure", measure)
    monkeypatch.setattr(bench.main, "perf_counter", lambda: found.now)
    return found


def run(bench, tmp_path, seconds):
    out = tmp_path / "rates.json"
    code = bench.main.main(["--plan", "gpu-fast", "--seconds", str(seconds), "--out", str(out)])
    return code, json.loads(out.read_text(encoding="utf-8")), record.lines_of(tmp_path / "rates.jsonl", "key")


def test_no_run_begins_that_would_end_too_late(bench, clock, tmp_path, capsys):
    clock.takes = lambda run: {"auto": 10.0, "adam": 20.0}[run.contender]
    code, result, lines = run(bench, tmp_path, 69.0)
    # The fourth would end at 60 if it took as long as the first of its workload, at 70 as the longest of all.
    assert [at for at, *_ in clock.began] == [0.0, 10.0, 30.0] and code == 0
    assert [one["lr"] for one in result["runs"]] == [None, 1e-2, 2e-2]
    assert list(lines) == [
        f"{one['workload']}, seed 0: {one['contender']} {one['lr']}" for one in result["runs"]
    ]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("no time is left for tiny-llama-random, vera, ") and said.endswith("auto None")
    # What is there is not run again; after vera's first run 10 seconds are expected, after Adam's 20.
    code, result, _ = run(bench, tmp_path, 39.0)
    assert [name for _, *name in clock.began[3:]] == [["vera", "auto", None], ["vera", "adam", 1e-2]]
    assert len(result["runs"]) == 5


def test_the_last_that_fits_is_run(bench, clock, tmp_path):
    assert len(run(bench, tmp_path, 40.0)[1]["runs"]) == 4
    assert [at for at, *_ in clock.began] == [0.0, 10.0, 20.0, 30.0]


def test_what_was_found_is_written_when_it_is_asked_to_end(bench, clock, tmp_path):
    def takes(one):
        if one.lr == 2e-2:
            raise KeyboardInterrupt
        return 1.0

    clock.takes = takes
    with pytest.raises(KeyboardInterrupt):
        run(bench, tmp_path, 1000.0)
    result = json.loads((tmp_path / "rates.json").read_text(encoding="utf-8"))
    assert [one["lr"] for one in result["runs"]] == [None, 1e-2]
    assert result["config"]["weights"] == "random" and result["fast"]


def test_what_cannot_be_trained_is_said_and_does_not_take_the_others_along(bench, clock, tmp_path):
    clock.broken = ("lora",)
    code, result, _ = run(bench, tmp_path, 1000.0)
    methods = [(result["workloads"][one["workload"]]["method"], one["lr"]) for one in result["runs"]]
    assert methods == [("lora", None), ("lora", 1e-2), ("vera", None), ("vera", 1e-2), ("vera", 2e-2)]
    assert code == 1 and sum("failed: " in line for line in bench.check_table.render_rates(result)) == 2


def test_a_model_that_cannot_be_made_ends_a_cpus_runs_and_is_said_on_a_gpu(bench, monkeypatch):
    def broken(*args, device):
        raise RuntimeError("no such package\nbut another")

    monkeypatch.setattr(bench.main, "Bench", broken)
    run = bench.plan.Run(bench.workloads.Workload("chat", 4), 0, "auto")
    with pytest.raises(RuntimeError, match="no such package"):
        bench.main.measure(run, {})
    line = bench.main.measure(run, {}, "cuda")
    assert (line["loss"], line["failed"], line["device"]) == (None, "no such package", "cuda")


def test_a_gpu_that_is_not_there_is_said_before_anything_runs(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main.main(["--plan", "gpu", "--device", "cuda"])
    assert "this torch sees no CUDA device" in capsys.readouterr().err


def test_the_plan_takes_what_is_at_hand(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("FFKERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(bench.models, "find_spec", lambda name: None)
    items = list(bench.plan.gpu())
    names = [item.workload.name for item in items]
    assert all(name.startswith("smollm2-135m-random, ") and "medical" not in name for name in names)
    assert {item.workload.weights for item in items} == {"random"}
    first = list(dict.fromkeys((item.workload.batch, item.workload.method) for item in items))
    assert first[:4] == [(32, "lora"), (32, "lora-256"), (32, "vera"), (128, "lora")] and len(first) == 9
    assert [(item.contender, item.rates) for item in items[2:4]] == [
        ("auto", (None,)),
        ("adam", (3e-4, 1.5e-4, 6e-4)),
    ]
    folder = bench.models.smollm2.cached()
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (folder / name).touch()
    monkeypatch.setattr(bench.models, "find_spec", lambda name: object())
    items = list(bench.plan.gpu())
    assert {item.workload.model for item in items} == {"smollm2-135m"}
    assert {item.workload.weights for item in items} == {"pretrained"}
    tasks = [item.workload.task for item in items if item.seed == 0]
    assert tasks == ["instruction"] * 18 + ["medical"] * 18


def test_random_weights_are_named_and_always_the_same(bench):
    make = bench.workloads.Workload
    workload = make("instruction", 4, 4, method="vera", model="tiny-llama-random")
    assert workload.name == "tiny-llama-random, vera, instruction, batch 4, 4 steps, constant"
    assert workload.group == "tiny-llama-random" and workload.weights == "random"
    assert make("instruction", 4, model="smollm2-135m").weights == make("chat", 4).weights == "pretrained"
    state = torch.get_rng_state()
    (one, tokenizer), (other, _) = (bench.models.loaded(workload, "bfloat16") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one.parameters(), other.parameters())) and tokenizer.vocab_size == 258
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16} and one.config.model_type == "llama"
    for method in ("lora", "lora-256", "vera"):
        adapted = bench.bench.adapted(
            bench.models.loaded(workload, "bfloat16")[0], bench.workloads.METHODS[method], 0
        )
        assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_a_run_says_what_its_weights_are_and_of_a_gpu_what_it_took(bench, monkeypatch):
    workload = bench.workloads.Workload("instruction", 4, 6, model="tiny-llama-random")
    line = bench.main.measure(bench.plan.Run(workload, 0, "adam", 1e-2), {})
    assert line["weights"] == "random" and line["loss"] < line["start"]
    assert not {"seconds_per_step", "peak_gigabytes", "device"} & line.keys()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    meter = bench.main.Meter(torch.device("cuda"))
    times = iter([1.0, 1.5, 9.0, 9.25, 9.75])
    monkeypatch.setattr(bench.main, "perf_counter", lambda: next(times))
    for _ in range(5):
        meter.step()
    assert meter.report() == {"seconds_per_step": 0.5, "peak_gigabytes": 3.0}
    auto = {**line, "contender": "auto", "lr": None, "loss": line["loss"] * 1.01, "device": "cuda"}
    lines = [
        {**one, "commit": None, **meter_of}
        for one, meter_of in ((line, {}), (auto, {"seconds_per_step": 0.0125}))
    ]
    result = bench.record.document(lines[::-1], "gpu")
    assert result["config"]["weights"] == "random" and result["config"]["device"] == "cuda"
    assert result["versions"]["git_commit"] is None and not result["fast"]
    text = bench.check_table.render_rates(result)
    row = next(one for one in text[3].splitlines() if one.startswith("lora, instruction, batch 4, 6 steps"))
    assert row.split()[-6:] == ["+1.0", "%", "0.01", "–", "12.5", "–"]
    assert "-- weights are random: rates and losses say nothing of a pretrained model" in text
    assert bench.check_table.rate_targets(result) == []


def test_targets_are_of_pretrained_weights_and_whole_sweeps(bench):
    def line(contender, lr, loss, method="lora"):
        workload = bench.workloads.Workload("instruction", 8, method=method, model="smollm2-135m")
        head = {"workload": workload.name, "group": workload.group, **vars(workload), "seed": 0, "start": 3.0}
        return {**head, "contender": contender, "lr": lr, "loss": loss, "commit": "abc", "worst": 1.0}

    lines = [line("adam", lr, loss) for lr, loss in ((1e-3, 2.1), (2e-3, 2.0), (4e-3, 2.2))]
    lines += [line("auto", None, 2.13), line("adam", 1e-3, 2.0, "vera"), line("auto", None, 2.0, "vera")]
    (found,) = bench.check_table.rate_targets(bench.record.document(lines, "gpu"))
    assert found["what"].startswith('"auto" at most +6.0 % above tuned Adam, smollm2-135m, lora, ')
    assert not found["met"] and found["measured"] == "+6.5 %"
    assert bench.check_table.rate_targets(bench.record.document(lines, "gpu-fast")) == []
