"""Loops in a process of their own: crashes, hangs and wrong counts stay there, and the verdict is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.engine import ladder
from ffkernels.graphs import core as graphs
from ffkernels.graphs import probe as graph_probe
from ffkernels.graphs import support as graph_support
from ffkernels.graphs import verdicts as graph_verdicts
from ffkernels.graphs.probe import COMMAND, NotTried, Verdict
from ffkernels.ops import condition

CPU = torch.device("cpu")
REAL_VERDICT, REAL_COMMAND = graph_probe.verdict, graph_probe._command
GPU = {"gpu": "Fake 100", "capability": "9.0", "driver": "CUDA 13000", "uuid": "fake-uuid"}

# What processes do, after a line that says which GPU they have.
REACHED = (
    f"import json, os, signal, time; print({graph_probe._REPLY!r} + '{json.dumps({'gpu': GPU})}', flush=True)"
)
HANGS = "time.sleep(60)"


def says(**reply) -> str:
    return f"print({graph_probe._REPLY!r} + json.dumps({reply!r}))"


def dies(name: str) -> str:
    return f"os.kill(os.getpid(), signal.{name})"


WRONG_COUNT = "it counted wrong: it found [] and ended at 1.0, not at 4.0"
RIGHT, WRONG = says(counted=None), says(counted=WRONG_COUNT)


class Processes:
    """Stand-ins for the real process: what it does by way, `started` which there were."""

    def __init__(self) -> None:
        self.inside, self.beside, self.behind, self.reach = RIGHT, RIGHT, RIGHT, REACHED
        self.started: list[str] = []

    def all_do(self, what: str) -> None:
        self.inside = self.beside = self.behind = what

    def command(self, index: int, uuid: str, way: str) -> list[str]:
        self.started.append(way)
        return [sys.executable, "-S", "-c", f"{self.reach}\n{getattr(self, way)}"]


@pytest.fixture
def processes(fake, monkeypatch, tmp_path) -> Processes:
    made = Processes()
    monkeypatch.setattr(graph_probe, "verdict", REAL_VERDICT)
    monkeypatch.setattr(graph_probe, "_command", made.command)
    monkeypatch.setattr(graph_probe, "LIMIT", 20.0)
    monkeypatch.setattr(condition, "_ways", {})
    monkeypatch.setenv("FFKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_INJECTION64_PATH", raising=False)
    return made


def kept(tmp_path) -> list[dict]:
    folder = tmp_path / "cache" / "graph-probe"
    assert all(path.suffix == ".json" for path in folder.glob("*")), "nothing is left over"
    return [json.loads(path.read_text()) for path in folder.glob("*")]


def only_file(tmp_path) -> Path:
    (path,) = (tmp_path / "cache" / "graph-probe").glob("*")
    return path


def test_a_good_verdict_is_kept_and_the_loop_then_runs_here(fake, processes, tmp_path, monkeypatch):
    assert graphs.why_no_stage_graph(CPU) is None
    assert processes.started == ["inside"] and fake.iterations == [5, 5, 0]
    (file,) = kept(tmp_path)
    assert (file["way"], file["problems"]) == ("inside", {})
    assert {"gpu", "capability", "driver", "torch", "triton", "cuda-bindings", "sources"} < set(file["key"])
    assert "uuid" not in file["key"], "GPUs of one kind share it"
    monkeypatch.setattr(graph_support, "_probed", {})
    assert graphs.why_no_stage_graph(CPU) is None
    assert processes.started == ["inside"] and fake.iterations == [5, 5, 0] * 2


@pytest.mark.parametrize(
    ("inside", "beside", "way", "problems"),
    [
        (dies("SIGSEGV"), RIGHT, "beside", {"inside": "it was ended by SIGSEGV"}),
        (WRONG, WRONG, "behind", dict.fromkeys(("inside", "beside"), WRONG_COUNT)),
    ],
)
def test_only_the_first_way_that_counts_right_is_tried_here(
    fake, processes, tmp_path, inside, beside, way, problems
):
    processes.inside, processes.beside = inside, beside
    assert graph_probe.verdict(CPU) == Verdict((way,))
    assert graphs.probe(CPU) is None and condition._ways == {0: way}
    assert fake.iterations == [5, 5, 0] and ("add_kernel" in fake.calls) == (way == condition.BEHIND)
    assert processes.started == [*problems, way]
    (file,) = kept(tmp_path)
    assert (file["way"], file["problems"]) == (way, problems)


@pytest.mark.parametrize(
    ("does", "cause"),
    [
        (dies("SIGSEGV"), "it was ended by SIGSEGV"),
        (dies("SIGABRT"), "it was ended by SIGABRT"),
        (WRONG, WRONG_COUNT),
        (says(faulted="CUDA error: an illegal memory access"), "it lost the GPU: CUDA error: an illegal"),
    ],
)
def test_a_bad_verdict_is_kept_and_nothing_is_tried_here(fake, processes, tmp_path, monkeypatch, does, cause):
    processes.all_do(does)
    reason = graphs.why_no_stage_graph(CPU)
    text, _, cure = reason.rpartition("; ")
    assert all(f"set {way} the decision: {cause}" in text for way in ("inside", "beside", "behind"))
    assert f"`{COMMAND} cpu` tries again" in cure and "newer driver" in cure
    assert graphs.why_no_step_graph(CPU) is None
    monkeypatch.setattr(graph_support, "_probed", {})
    assert graphs.why_no_stage_graph(CPU) == reason
    assert processes.started == ["inside", "beside", "behind"] and "graph_create" not in fake.calls
    assert kept(tmp_path)[0]["way"] is None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for_end(pid: int) -> bool:
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


@linux
def test_what_does_not_end_is_ended_with_all_that_it_started(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_probe, "LIMIT", 3.0)
    pids = tmp_path / "pids"
    processes.all_do(
        "import subprocess; p = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} {{p.pid}} ')\n{HANGS}"
    )
    assert "it did not end within 3 s" in graph_probe.verdict(CPU).problem
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 6 and all(wait_for_end(pid) for pid in found)
    begun = time.monotonic()
    assert "it did not end within 3 s" in graph_probe.verdict(CPU).problem
    assert time.monotonic() - begun < 0.9, "nor is it waited for again"


@linux
def test_ctrl_c_ends_the_process_too(processes, tmp_path, monkeypatch):
    pid, wait, calls = tmp_path / "pid", subprocess.Popen.wait, []
    processes.inside = f"open({str(pid)!r}, 'w').write(str(os.getpid()) + ' ')\n{HANGS}"

    def interrupted(process, timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            while not (pid.exists() and pid.read_text().endswith(" ")):
                time.sleep(0.01)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graph_probe.verdict(CPU)
    assert wait_for_end(int(pid.read_text())) and kept(tmp_path) == []


NOT_KEPT = {
    "the GPU admits one process": (
        says(
            refused="it did not get at the GPU: CUDA error: all CUDA-capable devices are busy or unavailable"
        ),
        "busy or unavailable",
        False,
    ),
    "no package there": ("raise ModuleNotFoundError('no ffkernels')", "no ffkernels", False),
    "ended by somebody": (dies("SIGTERM"), "ended by SIGTERM", True),
    "ended for memory": (dies("SIGKILL"), "ended by SIGKILL", True),
    "ended by itself": ("os._exit(3)", "exit status 3", True),
    "an error with a cure of its own": (says(raised="CUDA error: out of memory"), "out of memory", True),
}


@pytest.mark.parametrize("name", NOT_KEPT)
def test_what_says_nothing_about_loops_is_not_kept_and_nothing_is_tried_here(
    fake, processes, tmp_path, monkeypatch, name
):
    does, cause, reached = NOT_KEPT[name]
    processes.all_do(does)
    if not reached:
        processes.reach = "import json"
    reason = graphs.why_no_stage_graph(CPU)
    assert cause in reason and f"`{COMMAND} cpu`" in reason.rpartition("; ")[2]
    assert "graph_create" not in fake.calls and kept(tmp_path) == []
    processes.inside, processes.reach = RIGHT, REACHED
    monkeypatch.setattr(graph_support, "_probed", {})
    assert graphs.why_no_stage_graph(CPU) is None


def test_a_hang_before_the_loop_is_not_the_loops(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_probe, "LIMIT", 0.3)
    processes.reach, processes.inside = "import time", HANGS
    problem = graph_probe.verdict(CPU).problem
    assert "did not end within 0 s before its loop" in problem and "while the GPU is free" in problem
    assert kept(tmp_path) == []


def test_no_process_can_be_started(processes, monkeypatch, tmp_path):
    missing = str(tmp_path / "no-python")
    for change, why in (
        (lambda p: p.setattr(graph_probe, "_command", lambda *_: [missing]), "no process could be started"),
        (lambda p: p.setattr(sys, "executable", ""), "no Python to start"),
        # Its executable would be the training again.
        (lambda p: p.setattr(sys, "frozen", True, raising=False), "no Python to start"),
        (lambda p: p.setenv(graph_probe._CHILD_MARK, "1"), "asks for it again"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            assert why in graph_probe.verdict(CPU).problem and kept(tmp_path) == []
    assert processes.started == []


def test_a_driver_that_does_not_answer_is_the_verdict(fake, processes):
    fake.fail("gpu")
    assert "CUDA_ERROR_PLANTED" in graph_probe.verdict(CPU).problem and processes.started == []


def test_a_cache_that_cannot_be_written_is_done_without(processes, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FFKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    for times in (1, 2):
        assert graph_probe.verdict(CPU) == Verdict(("inside",))
        assert len(processes.started) == times

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(graph_verdicts, "cache_dir", no_home)
    assert graph_probe.verdict(CPU) == Verdict(("inside",)) and len(processes.started) == 3
    assert graph_probe.try_again(CPU, print) == (Verdict(("inside",)), None)


def changed_source(monkeypatch, tmp_path) -> None:
    for name in graph_verdicts._SOURCES:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((graph_verdicts._PACKAGE / name).read_bytes())
    monkeypatch.setattr(graph_verdicts, "_PACKAGE", tmp_path / "copy")
    graph_probe.verdict(CPU)
    with (tmp_path / "copy" / "ops" / "condition.ll").open("a") as file:
        file.write("; another line\n")


CHANGES = {
    "driver": lambda patch, fake, path: setattr(fake, "driver", 13010),
    "torch": lambda patch, fake, path: patch.setattr(torch, "__version__", "9.9"),
    "triton": lambda patch, fake, path: patch.setattr("triton.__version__", "9.9"),
    "bindings": lambda patch, fake, path: patch.setattr(graph_verdicts, "_version", lambda name: "9.9"),
    "profiler": lambda patch, fake, path: patch.setenv("CUDA_INJECTION64_PATH", "libprofiler.so"),
    "source": lambda patch, fake, path: changed_source(patch, path),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_the_verdict_depends_on_is_a_reason_to_try_anew(
    fake, processes, tmp_path, monkeypatch, name
):
    for _ in range(2):
        graph_probe.verdict(CPU)
    assert len(processes.started) == len(kept(tmp_path)) == 1
    CHANGES[name](monkeypatch, fake, tmp_path)
    for _ in range(2):
        graph_probe.verdict(CPU)
    assert len(processes.started) == len(kept(tmp_path)) == 2


def test_that_nothing_works_is_known_only_where_no_way_was_left_untried(processes, tmp_path):
    """A version that had fewer ways may have kept that none of them works."""
    processes.all_do(WRONG)
    graph_probe.verdict(CPU)
    path = only_file(tmp_path)
    file = json.loads(path.read_text())
    del file["problems"]["behind"]
    path.write_text(json.dumps(file))
    processes.behind = RIGHT
    assert graph_probe.verdict(CPU) == Verdict(("behind",)) and len(processes.started) == 6
    assert kept(tmp_path)[0]["way"] == "behind"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"key": {}}', '{"key": {}, "way": "inside", "problems": {}}', "\xff", None]
)
def test_a_file_that_is_none_of_these_is_replaced(processes, tmp_path, text):
    graph_probe.verdict(CPU)
    path = only_file(tmp_path)
    if text is None:  # a way that nobody knows
        text = json.dumps({**json.loads(path.read_text()), "way": "around"})
    path.write_bytes(text.encode("latin-1"))
    assert graph_probe.verdict(CPU) == Verdict(("inside",)) and len(processes.started) == 2
    assert kept(tmp_path)[0]["way"] == "inside"


def test_several_at_a_time_never_read_half_a_verdict(processes, tmp_path):
    found: list[Verdict] = []
    threads = [Thread(target=lambda: found.append(graph_probe.verdict(CPU))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Verdict(("inside",))] * 4 and len(kept(tmp_path)) == 1


def lines(said: str) -> list[str]:
    """What the command printed, without its seconds."""
    return re.sub(r" \(\d+\.\d s\)$", "", said, flags=re.M).splitlines()


def test_the_command_says_what_each_way_did_and_where_it_is_kept(processes, tmp_path, capsys):
    processes.beside, processes.behind = WRONG, dies("SIGSEGV")
    assert graph_probe._main(["cpu"]) == 0
    said = capsys.readouterr().out
    path = only_file(tmp_path)
    assert lines(said) == [
        "condition set inside the decision: it counted right",
        f"condition set beside the decision: {WRONG_COUNT}",
        "condition set behind the decision: it was ended by SIGSEGV",
        "loops on cpu will have their condition set inside the decision",
        f"kept in {path}",
    ]
    assert len(re.findall(r" \(\d+\.\d s\)$", said, re.M)) == 3
    assert graph_probe.verdict(CPU) == Verdict(("inside",)), "the command's verdict is the training's"
    assert processes.started == ["inside", "beside", "behind"]


def test_the_command_tries_again_whatever_is_kept(processes, capsys):
    processes.all_do(WRONG)
    assert graph_probe._main(["cpu"]) == 1
    assert capsys.readouterr().out.count("not at 4.0") == 2 * 3
    processes.behind = RIGHT
    assert graph_probe._main(["cpu"]) == 0
    assert "will have their condition set behind the decision" in capsys.readouterr().out
    assert graph_probe.verdict(CPU) == Verdict(("behind",)) and len(processes.started) == 6
    processes.all_do("print('Traceback\\n  line 7'); " + says(raised="no compiler"))
    assert graph_probe._main(["cpu"]) == 1
    said = lines(capsys.readouterr().out)
    assert said[:3] == [
        "condition set inside the decision: it raised: no compiler",
        "    Traceback",
        "      line 7",
    ]
    assert said[-1] == "not kept"
    assert graph_probe.verdict(CPU) == Verdict(("behind",)), "and what was known stays known"


def test_the_command_without_an_answer(processes, capsys):
    processes.beside = dies("SIGTERM")
    assert graph_probe._main(["cpu"]) == 0, "what is not known of the second way does not touch the first"
    said = lines(capsys.readouterr().out)
    assert said[1] == "condition set beside the decision: not tried, it was ended by SIGTERM"
    assert said[2] == "condition set behind the decision: it counted right"
    processes.reach, processes.inside = "import json", says(refused="busy")
    assert graph_probe._main(["cpu"]) == 1
    said = lines(capsys.readouterr().out)
    assert said[0] == "condition set inside the decision: not tried, busy"
    assert "(busy)" in said[1] and said[2:] == ["not kept"]


class TestTheProcessItself:
    def replies(self, uuid="fake-uuid", way="inside") -> list[dict]:
        return list(graph_probe._replies(0, uuid, way))

    def test_it_says_which_gpu_it_has_and_what_the_loop_did(self, fake, processes, monkeypatch):
        assert self.replies() == [{"gpu": GPU}, {"counted": None}]
        assert self.replies("", "beside") == [{"gpu": GPU}, {"counted": None}]
        assert condition._ways == {0: "beside"}
        assert "add_kernel" not in fake.calls
        monkeypatch.setattr(condition, "set_beside", lambda handle, go: None)
        assert "not at 4.0" in self.replies()[1]["counted"]
        assert self.replies("", "behind") == [{"gpu": GPU}, {"counted": None}]
        assert fake.calls.count("add_kernel") == 2

    def test_errors_are_told_from_faults(self, fake, processes):
        fake.fail("exec_create")
        assert "CUDA_ERROR_PLANTED" in self.replies()[1]["raised"]
        fake.fail("exec_launch")
        fake.fail("synchronize", times=100)
        assert "CUDA_ERROR_PLANTED" in self.replies()[1]["faulted"]

    def test_without_the_gpu_nothing_is_tried(self, fake, processes, monkeypatch):
        assert "not the one that was meant" in self.replies("another")[0]["refused"]
        fake.fail("gpu")
        assert "CUDA_ERROR_PLANTED" in self.replies()[0]["refused"]
        monkeypatch.setattr(fake, "devices", list)
        assert "sees no GPU" in self.replies("")[0]["refused"]
        assert fake.iterations == []

    def test_a_real_one_runs_from_anywhere(self, processes, tmp_path, monkeypatch):
        """The real command line in another folder, with a stand-in for CUDA in the new process only."""
        folder = Path(__file__).parent
        (tmp_path / "json.py").write_text("raise ImportError('not this one')")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(graph_probe, "_command", REAL_COMMAND)
        monkeypatch.setattr(graph_probe, "LIMIT", 60.0)
        stand_in = (
            f"import pytest; sys.path.append({str(folder)!r}); import fake_cuda; "
            "fake_cuda.FakeCuda.install(pytest.MonkeyPatch()); from ffkernels.graphs"
        )
        assert "from ffkernels.graphs" in graph_probe._CHILD
        child = graph_probe._CHILD.replace("from ffkernels.graphs", stand_in, 1)
        monkeypatch.setattr(graph_probe, "_CHILD", child)
        here = Path(graph_probe.__file__).parents[2]
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p) != here])
        outcome = graph_probe.attempt(CPU, "fake-uuid", "inside")
        assert (outcome.gpu, outcome.problem) == (GPU, None)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_real_one_without_a_gpu(self, processes, monkeypatch):
        monkeypatch.setattr(graph_probe, "_command", REAL_COMMAND)
        monkeypatch.setattr(graph_probe, "LIMIT", 60.0)
        with pytest.raises(NotTried, match="a new process sees no GPU"):
            graph_probe.attempt(CPU, "fake-uuid", "inside")


def test_a_signal_without_a_name_has_a_number():
    assert graph_probe._ended(-signal.SIGRTMIN - 1).startswith("it was ended by ")
    assert graph_probe._ended(-250) == "it was ended by signal 250"


@pytest.fixture
def one_step():
    """The stages of one step of a model whose loss is a function."""

    def train() -> list:
        model = nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        validation = ValidationLoss(model, lambda model: (model.weight - 1).square().sum())
        with FastForward(model, optimizer, validation, FastForwardConfig(interval=1)) as ff:
            (model.weight - 1).square().sum().backward()
            optimizer.step()
            return ff.stages

    return train


def test_the_seconds_of_a_process_are_not_a_stages(processes, monkeypatch, one_step):
    monkeypatch.setattr(ladder.rules, "why_not_captured", lambda *a, **k: None)
    processes.inside = f"time.sleep(3)\n{RIGHT}"
    (stage,) = one_step()
    assert processes.started == ["inside"] and 0 < stage.seconds < 3


def test_a_model_that_cannot_be_captured_needs_no_process(processes, one_step):
    with pytest.warns(UserWarning, match="callable path"):
        one_step()
    assert processes.started == []


def test_the_environment_is_passed_on(processes, tmp_path, monkeypatch):
    file = tmp_path / "seen"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    processes.inside = (
        "seen = os.environ['CUDA_VISIBLE_DEVICES'] + str(os.getsid(0) == os.getpid())\n"
        f"open({str(file)!r}, 'w').write(seen)\n{RIGHT}"
    )
    graph_probe.verdict(CPU)
    assert file.read_text() == "GPU-1234True" and graph_probe._CHILD_MARK not in os.environ
