"""Which implementation runs on a GPU: the order, what is said once, and what a named one answers."""

import sys
import warnings

import pytest
import torch

from ffkernels import ops
from ffkernels.engine.config import IMPLS, FastForwardConfig
from ffkernels.ops import dispatch
from ffkernels.ops.dispatch import Availability, choose, resolve
from ffkernels.ops.notices import FFKernelsNotice

GPU = torch.device("cuda", 0)
GOOD = Availability(True, "there")


@pytest.fixture
def pretend(monkeypatch):
    """A machine with a GPU on which these implementations are as given."""

    def set_up(cuda: Availability, triton: Availability) -> None:
        found = {"cuda": cuda, "triton": triton, "cpp": Availability(False, "no compiler", "get one")}
        monkeypatch.setattr(dispatch, "_check", lambda impl, device: found[impl])

    monkeypatch.setattr("ffkernels.ops.notices._announced", set())
    return set_up


def notices(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, FFKernelsNotice)]


def test_the_names_are_those_of_the_configuration():
    assert dispatch.IMPLEMENTATIONS == IMPLS
    assert set(ops.available()) == set(IMPLS) - {"auto"}
    for impl in IMPLS:
        assert FastForwardConfig(impl=impl).impl == impl


NOT_BUILT, NOT_THERE = Availability(False, "not built", "build it"), Availability(False, "gone", "install it")


@pytest.mark.parametrize(
    ("cuda", "triton", "name", "said"),
    [
        (GOOD, GOOD, "cuda", []),
        (NOT_BUILT, GOOD, "triton", ["triton kernels: triton runs (there); not built; build it"]),
        (NOT_BUILT, NOT_THERE, "torch", ["plain torch ops: not built; build it; gone; install it"]),
    ],
)
def test_the_best_is_taken_and_what_was_passed_over_is_said_once(pretend, cuda, triton, name, said):
    pretend(cuda, triton)
    assert resolve("auto", GPU)[0] == name and choose("torch", GPU) == "torch"
    found = notices(lambda: [choose("auto", GPU) for _ in range(3)])
    assert found == [f"weight moves run as {text}" for text in said]
    if triton is GOOD:
        assert resolve("triton", GPU) == ("triton", "asked for")
        assert notices(lambda: choose("triton", GPU)) == []
    if cuda is GOOD:
        assert resolve("auto", GPU) == ("cuda", "fastest on a GPU: there")


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_named_one_that_cannot_run_is_an_error_with_its_cure(pretend, impl):
    pretend(Availability(False, "not built", "build it"), Availability(False, "not built", "build it"))
    with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available: not built; build it"):
        resolve(impl, GPU)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_gpu_kernels_are_not_for_tensors_on_the_cpu(monkeypatch, impl):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=rf"impl='{impl}' runs on a GPU, .* `\.to\('cuda'\)`"):
        ops.TensorTable([torch.zeros(3)], impl=impl)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu():
    found = ops.available()
    for impl in ("cuda", "triton"):
        assert found[impl] == Availability(False, "this torch sees no GPU", "")
        with pytest.raises(RuntimeError, match=f"impl='{impl}' is not available: this torch sees no GPU"):
            resolve(impl, "cuda")


def test_a_broken_triton_is_found_out_before_a_stage(monkeypatch):
    """Whatever the trial raises becomes the reason; nothing of it escapes."""
    monkeypatch.setitem(sys.modules, "ffkernels.ops.triton_ops", None)
    dispatch._triton_trial.cache_clear()
    try:
        reason = dispatch._triton_trial("cpu", 0)
    finally:
        dispatch._triton_trial.cache_clear()
    assert reason.startswith("a Triton trial kernel failed: ")
    assert "ImportError" in reason or "ModuleNotFoundError" in reason


def test_triton_under_its_interpreter_runs_on_the_cpu():
    """In a process of its own: Triton looks at its environment when a kernel is defined."""
    pytest.importorskip("triton", reason="triton is not installed")
    import os
    import subprocess

    program = """
import torch
from ffkernels import ops
sides = [[torch.randn(70), torch.randn(5)] for _ in range(3)]
want = [[t.clone() for t in side] for side in sides]
ops.step_(*sides, True, 0.5, impl="triton")
ops.step_(*want, True, 0.5, impl="torch")
ops.step_(*sides, torch.tensor(False), torch.tensor(0), impl="triton")
ops.step_(*want, False, 0, impl="torch")
print(all(torch.equal(a, b) for x, y in zip(sides, want) for a, b in zip(x, y)), ops.resolve("triton", "cpu"))
table = ops.TensorTable([torch.randn(9)], impl="triton")
ops.delta_(table); ops.checkpoint_(table)
print(ops.delta_absmax(table), table.impl)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == ["True ('triton', 'asked for')", "0.0 triton"], done.stderr
