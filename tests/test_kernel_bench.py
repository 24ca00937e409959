"""The benchmarks of weight moves on the CPU: all ways do the same, and a target that is missed is said."""

import json
import sys

import pytest
import torch

from ffkernels import ops

SHAPES = {"Pythia-1.4B r=8": ((8, 64), (192, 8), (192,))}


@pytest.fixture()
def rounds(benchmarks, monkeypatch):
    if not ops.available()["cpp"].ok:
        pytest.skip(ops.available()["cpp"].reason)
    found, before = benchmarks("kernels.rounds"), torch.get_num_threads()
    monkeypatch.setattr(found, "ADAPTERS", SHAPES)
    yield found
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["step", "align"])
def test_all_ways_agree_and_one_that_does_not_is_found(benchmarks, rounds, name):
    module = benchmarks(f"kernels.{name}")
    ways = {way: make(*SHAPES.values()) for way, make in module.WAYS.items()}
    rounds.run_all(ways, module.check_agreement)
    ways["loop"].best[0][0] += 1
    with pytest.raises(RuntimeError, match="loop and"):
        module.check_agreement(ways)


@pytest.mark.parametrize("target, status", [(1e9, 0), (0.0, 1)])
def test_a_target_that_is_missed_three_times_ends_with_one(
    benchmarks, rounds, tmp_path, monkeypatch, capsys, target, status
):
    step = benchmarks("kernels.step")
    monkeypatch.setattr(sys, "argv", ["step", "--out", str(tmp_path)])
    targets = dict.fromkeys(SHAPES, target)
    assert rounds.main("kernels.step", "", step.WAYS, step.check_agreement, targets) == status
    (path,) = tmp_path.glob("step_cpu_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["command"] == f"python -m benchmarks.kernels.step --out {tmp_path.name}"
    (adapter,) = found["adapters"].values()
    assert len(adapter["ratios"]) == (3 if status else 1)
    ways = adapter["modes"]["warm"]
    assert {way: row["rounds"] for way, row in ways.items()} == dict.fromkeys(step.WAYS, 31)
    assert ways["loop"]["ours_over_this"] == ways["ours"]["median_us"] / ways["loop"]["median_us"]
    said = capsys.readouterr().out
    assert ("at most 0.0" in said) == bool(status) and "Pythia-1.4B r=8  cold  state_dict" in said


def test_each_side_of_a_gpu_is_checked_to_do_its_step(benchmarks):
    gpu, step = benchmarks("kernels.step_gpu"), benchmarks("kernels.step")
    (chosen, *_) = benchmarks("kernels.sets").dry_sets()
    every, missing = gpu.sides(chosen, torch.device("cpu"), dry=True)
    assert set(every) >= {"torch loop", "_foreach pair"} and missing["compiled flat pair"]
    assert all(map(gpu.is_right, every.values()))

    class Forgets(step.Foreach):
        def __call__(self):
            torch._foreach_add_(self.weights, self.deltas)

    assert not gpu.is_right(Forgets(chosen.shapes))
