import json

import pytest
import torch

from ffkernels import doctor, ops
from ffkernels.doctor import describe, diagnose
from ffkernels.ops import Availability


def test_the_diagnosis_says_what_auto_means():
    found = diagnose("cpu")
    assert json.loads(json.dumps(found)) == found
    assert (found["ops"]["name"], found["ops"]["reason"]) == ops.resolve("auto", "cpu")
    assert found["executor"]["name"] == "eager"
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["machine"]["device"] == "cpu"
    assert set(found["implementations"]) == set(ops.available())


def test_the_text_names_everything_that_was_found():
    found = diagnose("cpu")
    text = describe(found)
    for part in (found["versions"]["torch"], found["ops"]["reason"], found["executor"]["reason"]):
        assert part in text


def without_cpp(monkeypatch, compiler):
    torch_only = {"torch": Availability(True, "always"), "cpp": Availability(False, "not built", "build it")}
    monkeypatch.setattr(doctor.ops, "available", lambda: torch_only)
    monkeypatch.setattr(doctor.ops, "resolve", lambda impl, device: ("torch", "not built"))
    monkeypatch.setattr(doctor, "find_compiler", lambda: compiler)


def test_advice_where_the_compiled_ops_are_missing(monkeypatch):
    without_cpp(monkeypatch, ["g++"])
    advice = diagnose("cpu")["advice"]
    assert {"what": "cpp ops are not available (not built)", "cure": "build it"} in advice


def test_advice_where_the_compiler_is_missing_too(monkeypatch):
    without_cpp(monkeypatch, None)
    found = diagnose("cpu")
    cure = next(a["cure"] for a in found["advice"] if a["what"].startswith("cpp"))
    assert "install" in cure and cure.endswith("`ffkernels doctor --build`")
    assert cure in describe(found)


def test_advice_where_cores_are_idle_and_packages_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_physical_cores", lambda: torch.get_num_threads() + 1)
    versions = {**doctor.version_info(doctor.PACKAGES), "peft": None}
    monkeypatch.setattr(doctor, "version_info", lambda more: versions)
    cures = [a["cure"] for a in diagnose("cpu")["advice"]]
    threads = torch.get_num_threads() + 1
    assert f"OMP_NUM_THREADS={threads}, or --threads {threads} with train and compare" in cures
    assert "pip install 'ffkernels[hf]'" in cures


@pytest.mark.parametrize("device", ["gpu", "cuda:0:1"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=f"device='{device}'"):
        diagnose(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused():
    with pytest.raises(ValueError, match="no CUDA device"):
        diagnose("cuda")


def test_hardware_threads_of_one_core_are_one_core(monkeypatch):
    siblings = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(siblings), raising=False)
    monkeypatch.setattr(
        doctor.Path, "read_text", lambda path: siblings[int(path.parts[-3].removeprefix("cpu"))] + "\n"
    )
    assert doctor._physical_cores() == 2


def on_a_gpu(monkeypatch, stage, step):
    monkeypatch.setattr(doctor, "why_no_stage_graph", lambda device: stage)
    monkeypatch.setattr(doctor, "why_no_step_graph", lambda device: step)
    return doctor._executor(torch.device("cuda", 0))


def test_the_executor_on_a_cpu_needs_no_cure():
    found = diagnose("cpu")
    assert found["executor"]["reason"] == "on a CPU there are no launches to save"
    assert not any("stages run" in advice["what"] for advice in found["advice"])


def test_the_executor_on_a_gpu_where_all_is_there(monkeypatch):
    found = on_a_gpu(monkeypatch, None, None)
    assert found["name"] == "stage_graph" and "counted right" in found["reason"]
    assert found["refused"] == {}


def test_the_executor_on_a_gpu_without_a_loop(monkeypatch):
    missing = "loops need cuda-bindings; `pip install 'ffkernels[cuda]'`"
    found = on_a_gpu(monkeypatch, missing, None)
    assert found["name"] == "step_graph" and missing in found["reason"]
    advice = advice_for(monkeypatch, found)
    assert {
        "what": "stages run step_graph: loops need cuda-bindings",
        "cure": "`pip install 'ffkernels[cuda]'`",
    } in advice


def test_the_executor_on_a_gpu_without_graphs(monkeypatch):
    found = on_a_gpu(monkeypatch, "no Triton; install it", "no Triton; install it")
    assert (found["name"], found["reason"]) == ("eager", "no Triton; install it")
    advice = [a for a in advice_for(monkeypatch, found) if a["what"].startswith("stages run")]
    assert advice == [{"what": "stages run eager: no Triton", "cure": "install it"}]


def advice_for(monkeypatch, executor):
    """The diagnosis of this machine with another one's executor."""
    monkeypatch.setattr(doctor, "_executor", lambda device: executor)
    found = diagnose("cpu")
    assert executor["reason"] in describe(found)
    return found["advice"]
