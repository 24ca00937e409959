"""The stage benchmark: who is measured how often, what is led where, and what is counted."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
import torch

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def test_a_row_holds_what_its_providers_took(benchmarks, monkeypatch):
    bench_stage, cases = benchmarks("stages.bench"), benchmarks("stages.cases")
    case = cases.Case(cases.TINY, 16, evaluations=4, seconds=0.0)
    step_ms = {"authors": 300.0, "bare forward": 10.0, "stage graph": 10.1}
    step_ms |= {"stage graph, linear": 9.9, "bare forward, linear": 9.8}
    stages = []

    class Provider:
        result = 1.5

        def __init__(self, name):
            self.name, self.closed = name, 0

        def stage(self, evaluations):
            assert evaluations == 1 and self.name == "bare forward"

        def close(self):
            closed.append(self.name)

    closed, counted = [], []
    monkeypatch.setattr(
        bench_stage,
        "makers",
        lambda bench: {
            **{name: lambda name=name: Provider(name) for name in step_ms},
            "broken": lambda: 1 / 0,
            "clean eager, late": lambda: Provider("late"),
        },
    )

    def timed(one, evaluations, device):
        if one.name == "late":
            if counted:
                raise RuntimeError("after the first stage")
            return 1.0
        stages.append(one.name)
        return evaluations * step_ms[one.name] / 1000

    monkeypatch.setattr(bench_stage, "timed", timed)
    model, _ = benchmarks("stages.models").make_model(case.model, CPU, torch.float32)
    row = bench_stage.measure(
        case, model, CPU, 0.0, float("inf"), lambda case, providers: counted.append((len(stages), *providers))
    )
    names = (*step_ms, "clean eager, late")
    assert counted == [(5, *names)], "counted before anything is measured, after the first stages"
    assert sorted(closed) == sorted([*step_ms, "late"])
    assert row["missing"] == {
        "broken": "ZeroDivisionError: division by zero",
        "clean eager, late": "RuntimeError: after the first stage",
    }
    found = row["providers"]
    assert list(found) == list(step_ms)
    assert found["authors"]["ms_per_step"]["samples"] == 1
    assert found["stage graph"]["ms_per_step"]["samples"] == 15
    assert found["stage graph"]["gap_of_step"]["value"] == pytest.approx(0.01)
    assert found["stage graph"]["gap_of_step"]["rounds"] == 15
    assert found["authors"]["gap"] == pytest.approx(29.0) and "low" not in found["authors"]["gap_of_step"]
    # The linear search needs no sums by example: its floor is the forward without them.
    assert found["stage graph, linear"]["gap_of_step"]["value"] == pytest.approx(9.9 / 9.8 - 1)
    assert found["bare forward, linear"]["gap_of_step"]["value"] == pytest.approx(-0.02)
    assert "gap" not in found["bare forward"]
    assert row["loss"]["captured"] == 1.5
    assert row["loss"]["ours"] == pytest.approx(row["loss"]["model's own"], rel=1e-6)
    assert sum(rows for rows, _ in row["micro_batches"]) == 32


@pytest.fixture()
def bench(benchmarks, monkeypatch):
    """The tiny model's bench, eight examples, and stages of five evaluations."""
    cases, models = benchmarks("stages.cases"), benchmarks("stages.models")
    monkeypatch.setattr(models, "EXAMPLES", 8)  # Triton's interpreter takes milliseconds for each
    case = cases.Case(cases.TINY, 16, evaluations=5, full=True)
    model, _ = models.make_model(case.model, CPU, torch.float32)
    return benchmarks("stages.providers").Bench(case, model, CPU)


@pytest.fixture()
def fake(monkeypatch):
    """The stand-in for CUDA's graphs that the engine's tests use."""
    name = "ffkernels_fake_cuda"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "graphs" / "fake_cuda.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].FakeCuda.install(monkeypatch)


def executors(providers, bench):
    """Our providers, by kind and search, graphs on the stand-in."""
    from ffkernels.graphs.executors import StageGraphExecutor, StepGraphExecutor
    from ffkernels.stage.eager import EagerExecutor

    kinds = {"eager": EagerExecutor, "step graph": StepGraphExecutor, "stage graph": StageGraphExecutor}
    return {
        (kind, search): providers.Executor(bench, make(), search)
        for kind, make in kinds.items()
        for search in ("parabolic", "linear")
    }


def test_a_search_is_led_to_the_evaluations_that_are_wanted(benchmarks, bench, fake, monkeypatch):
    from ffkernels.search import significance

    providers = benchmarks("stages.providers")
    tested, records = [], []
    real = significance.higher
    monkeypatch.setattr(significance, "higher", lambda *a: tested.append(real(*a)) or tested[-1])

    def program(*arguments):
        records.append(made(*arguments))
        return records[-1]

    made = providers.StageProgram
    monkeypatch.setattr(providers, "StageProgram", program)
    for (kind, search), provider in executors(providers, bench).items():
        for evaluations in (2, 5):
            tested.clear()
            providers.timed(provider, evaluations, CPU)
            taus = [tau for tau, _ in records[-1].search.losses]
            if evaluations == 2:
                assert taus == [0, 1]
            else:
                assert taus == ([0, 1, 2, 3, 4] if search == "linear" else [0, 1, 2, 4, 8])
            assert (records[-1].search.best_tau == 4) == (search == "linear" and evaluations == 5)
            if kind == "eager":
                # What users run decides by losses of the examples: each rise is tested, and only one is sure.
                rises = [True] if evaluations == 2 else [False] * 4
                assert tested == (rises if search == "parabolic" else [])
        provider.start = 2
        providers.timed(provider, 5, CPU)
        if search == "parabolic":
            assert [tau for tau, _ in records[-1].search.losses] == [0, 2, 4, 8, 1]
        provider.close()
    with pytest.raises(ValueError, match="3 evaluations: 2 or 5 are possible"):
        provider.prepare(3)


def test_everything_in_one_batch_is_the_same_loss(benchmarks, bench):
    planned, whole = bench.loss, bench.loss_in_one_batch
    assert len(planned.forward.micro_batches) == 2 and len(whole.forward.micro_batches) == 1
    assert whole.forward.micro_batches[0].input_ids.shape == (8, 15)  # the last token predicts nothing
    assert float(whole.real_loss()) == pytest.approx(float(planned.real_loss()), rel=1e-6)
    assert sorted(whole.example_counts) == sorted(planned.example_counts)
    names = set(benchmarks("stages.providers").makers(bench))
    assert {"ours eager", "ours eager, linear", "ours eager, one batch"} < names


def test_who_runs_in_which_row_on_a_gpu(benchmarks, monkeypatch):
    cases, providers = benchmarks("stages.cases"), benchmarks("stages.providers")
    monkeypatch.setattr(providers, "fastest", lambda device: "step graph")

    def names(micro_batches, **fields):
        loss = SimpleNamespace(forward=SimpleNamespace(micro_batches=[None] * micro_batches))
        case = cases.Case(cases.SMOL, 64, **fields)
        bench = SimpleNamespace(case=case, device=torch.device("cuda"), loss=loss, loss_in_one_batch=loss)
        return set(providers.makers(bench))

    core = {"authors", "clean eager", "ours eager", "bare forward", "step graph"}
    in_one = {"ours eager, one batch", "bare forward, one batch"}
    assert names(1) == core == names(3, one_batch=False) and names(3) == core | in_one
    searches = {f"{name}, linear" for name in ("ours eager", "bare forward", "step graph", "stage graph")}
    ahead = {"step graph, 1 ahead", "step graph, 2 ahead"}
    assert names(3, full=True) == core | in_one | searches | ahead | {"stage graph"}
    assert {name: cases.floor(name) for name in searches | in_one | {"step graph, 1 ahead"}} == {
        **dict.fromkeys(searches - {"bare forward, linear"}, "bare forward, linear"),
        **dict.fromkeys(in_one | {"bare forward, linear", "step graph, 1 ahead"}, "bare forward"),
    }


def test_a_refused_fast_path_is_measured_and_named(benchmarks, bench, monkeypatch):
    from ffkernels.validation import choice

    assert bench.loss.refused == ""
    monkeypatch.setattr(choice, "_compare", lambda *a: (None, "it differs by 3"))
    loss = benchmarks("stages.providers").SteeredLoss(bench.model, bench.batches)
    assert loss.refused == "it differs by 3" and loss.path == "fast"
    assert float(loss.real_loss()) == float(bench.loss.real_loss())


def test_what_is_counted_at_the_calls(benchmarks, bench, fake):
    profile, providers = benchmarks("stages.profile"), benchmarks("stages.providers")
    found = executors(providers, bench)
    step, stage = found["step graph", "parabolic"], found["stage graph", "parabolic"]
    counts = profile.count_both(profile.count_calls, stage, 5, CPU)
    assert counts == {"stage": {"graphs": 1, "operators": 0}, "step": {"graphs": 0, "operators": 0}}
    # τ = 2 is told by a fill, other examples by one copy; the exchange itself copies each tensor of its own:
    # three and the places of each micro-batch, the examples' tokens, and a fill of the divisor.
    changed = profile.count_changes(stage, 5, CPU)
    assert changed["another start"] == {"graphs": 1, "operators": 1}
    assert changed["swap_batch"]["graphs"] == 0 and changed["swap_batch"]["operators"] >= 4 * 2 + 2
    assert changed["after swap_batch"]["graphs"] == 1 and changed["after swap_batch"]["operators"] >= 1
    assert profile.count_both(profile.count_calls, stage, 5, CPU) == counts, "all is as it was"
    counts = profile.count_both(profile.count_calls, step, 5, CPU)
    assert counts["stage"]["graphs"] == 5 and counts["step"] == {"graphs": 1, "operators": 0}
    for provider in found.values():
        provider.close()


def test_waits_are_what_torch_warns_of(benchmarks, monkeypatch):
    import warnings

    profile = benchmarks("stages.profile")
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def stage():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        torch.ones(3)  # on the host

    found = profile.count_calls(stage, torch.device("cuda", 0))
    assert found == {"graphs": 0, "operators": 0, "waits": 2} and modes == ["default", "warn", "default"]


def test_graphs_are_counted_first_and_a_failure_ends_none_of_the_others(benchmarks, tmp_path, monkeypatch):
    bench_stage, cases = benchmarks("stages.bench"), benchmarks("stages.cases")
    seen = []

    def both(way, provider, evaluations, device):
        assert way is bench_stage.count_calls and evaluations == cases.CASES[0].evaluations
        seen.append(provider)
        if provider == "clean":
            raise RuntimeError("out of luck")
        return {"stage": {"graphs": 1}, "step": {"graphs": 0}}

    monkeypatch.setattr(bench_stage, "count_both", both)
    monkeypatch.setattr(bench_stage, "count_changes", lambda *a: {"another start": {"graphs": 1}})
    parser = record.parser("stages.bench", "", out=tmp_path / "out.json")
    report = record.Report(parser, [], counts={})
    every = {"authors": "authors", "clean eager": "clean", "bare forward": "bare", "step graph": "step"}
    bench_stage.count_all(cases.CASES[0], {**every, "stage graph": "stage"}, report)
    assert seen == ["stage", "step", "authors", "clean"]
    written = json.loads((tmp_path / "out.json").read_text())
    counts = written["counts"]["providers"]
    assert counts["stage graph"]["changed"] == {"another start": {"graphs": 1}}
    assert counts["clean eager"] == {} and counts["authors"] == {
        "stage": {"graphs": 1},
        "step": {"graphs": 0},
    }
    assert written["errors"] == ["count of clean eager: RuntimeError: out of luck"]


def test_a_dying_profiler_takes_nothing_along(benchmarks, tmp_path, monkeypatch):
    profile = benchmarks("stages.profile")
    seen = []

    def both(way, provider, evaluations, device):
        seen.append(provider.name)
        if provider.name == "stage graph":
            raise KeyboardInterrupt  # as the end of the process, nothing here catches it
        return {"stage": {"launches": 9}, "step": {"launches": 3}}

    class Provider:
        def __init__(self, name):
            self.name = name

        def close(self):
            pass

    monkeypatch.setattr(profile, "count_both", both)
    monkeypatch.setattr(profile, "Bench", lambda *a: None)
    monkeypatch.setattr(profile, "make_model", lambda *a: (None, "random"))
    names = ("authors", "clean eager", "ours eager", "step graph", "stage graph")
    monkeypatch.setattr(profile, "makers", lambda b: {n: lambda n=n: Provider(n) for n in names})
    path = tmp_path / "profile.json"
    with pytest.raises(KeyboardInterrupt):
        profile.profile_all(path, CPU)
    assert seen == ["step graph", "ours eager", "clean eager", "stage graph"], "the authors' is not profiled"
    found = json.loads(path.read_text())
    assert found["step graph"]["step"] == {"launches": 3}
    assert found["stage graph"] == {"missing": "the profiler ended the process"}
    counts = {"case": "x", "providers": {"stage graph": {"stage": {"graphs": 1, "waits": 1}}}}
    profile.add_profile(counts, found, "exit status -11: ")
    assert counts["providers"]["stage graph"]["stage"] == {"graphs": 1, "waits": 1}
    assert counts["failure"] == "exit status -11: " and profile.PROFILE_SECONDS == 120


@pytest.mark.slow
def test_a_dry_run_from_a_plain_tree(tmp_path):
    """By an interpreter that reads no .pth file, which is where an editable installation would be found."""
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    out = tmp_path / "stage.json"
    command = [sys.executable, "-S", "-m", "benchmarks.stages.bench", "--dry", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [sorted(row["providers"])[:3] for row in found["rows"]] == [
        ["authors", "clean eager", "ours eager"]
    ] * 2
    assert found["counts"]["providers"]["ours eager"]["stage"]["graphs"] == 0
    assert found["agreement"]["loss"]["largest_difference"] < 1e-5 and found["errors"] == []
    assert all(row["weights"] == "random" for row in found["rows"])


def test_a_trace_is_counted(benchmarks):
    profile = benchmarks("stages.profile")
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
    cases, models = benchmarks("stages.cases"), benchmarks("stages.models")
    mixed = models.lengths_of(cases.Case(cases.SMOL, 1024))
    assert len(mixed) == 32 and max(mixed) == 1024 and min(mixed) >= 64 and len(set(mixed)) > 20
    assert 0.3 < sum(mixed) / (32 * 1024) < 0.5
    assert models.lengths_of(cases.Case(cases.SMOL, 64, lengths="equal")) == [64] * 32
    batch = models.collate(models.make_examples(cases.Case(cases.SMOL, 64), 300)[:2])
    assert int(batch["attention_mask"].sum()) == int(batch["labels"].ne(-100).sum())
