"""The GPU check: what its parts consist of, that each ends in time, and what it says and leaves behind."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks.gpu_check.parts import Stage

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ROOT / "tests" / "gpu"


@pytest.fixture()
def parts(benchmarks):
    return benchmarks("gpu_check.parts")


@pytest.fixture()
def check(benchmarks):
    return benchmarks("gpu_check.__main__")


def python(code: str, name: str = "one", limit: float = 20, **more):
    """A stage of some lines of Python."""
    return Stage(name, "", [sys.executable, "-c", code], limit, **more)


def machine(gpu: bool):
    found = {"machine": {"cpu": "c"}, "versions": {"torch": "2", "triton": None}, "implementations": {}}
    found |= {"gpu": {"name": "H100"}} if gpu else {}
    return python(f"print('a warning'); print({json.dumps(found)!r})", "machine")


# ---- what is in a part ----


@pytest.mark.parametrize("dry", [False, True])
def test_every_part_ends_within_its_call(parts, dry):
    found = parts.parts(dry)
    assert list(found) == [1, 2, 3, 4, 5] == list(parts.TITLES) and parts.PART_SECONDS == 590
    for stages in found.values():
        assert sum(stage.limit for stage in stages) + parts.OVERHEAD_SECONDS <= 590
        assert parts.OVERHEAD_SECONDS > parts.LAST_WORDS_SECONDS
        assert stages[0].name == "machine", "no part needs another"
        names = [stage.name for stage in stages]
        assert len(set(names)) == len(names)


def test_a_part_holds_what_it_promises(parts):
    names = {part: [stage.name for stage in stages[1:]] for part, stages in parts.parts(False).items()}
    assert names == {
        1: ["probe", "moves", "decide", "graph-core", "validation"],
        2: ["stage", "launches", "situations", "distributed", "memcheck"],
        3: ["bench-stage"],
        4: ["bench-step", "compiled", "compiled-moves", "profiled"],
        5: ["learning-rate"],
    }
    assert names[4][-1] == "profiled", "what may end its process has one of its own, after what counts"
    dry = {part: [stage.name for stage in stages[1:]] for part, stages in parts.parts(True).items()}
    assert dry == names, "a dry run names all of them"
    assert not any("racecheck" in str(stage) for stages in parts.parts(False).values() for stage in stages)


def test_every_gpu_test_is_in_a_part(parts):
    """Of each file all, by options that leave out in one part what they choose in another."""
    chosen: dict[str, list[str]] = {}
    for stage in (stage for stages in parts.parts(False).values() for stage in stages):
        if stage.command and "pytest" in stage.command:
            only = stage.command[stage.command.index("-k") + 1] if "-k" in stage.command else ""
            chosen.setdefault(Path(stage.command[-1]).name, []).append(only)
    assert set(chosen) == {path.name for path in GPU_TESTS.glob("test_*.py")}
    apart = {word for only in chosen.values() for word in only if word and not word.startswith("not")}
    assert apart == {"compiled", "launches_and_waits"}
    for name, only in chosen.items():
        tree = ast.parse((GPU_TESTS / name).read_text(encoding="utf-8"))
        tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        tests = [test for test in tests if test.startswith("test_")]
        for word in set(only) & apart:
            assert any(word in test for test in tests), f"-k {word} selects nothing in {name}"
        if not any(word in test for test in tests for word in apart):
            assert only in ([""], ["not (launches_and_waits or compiled)"])
        else:
            rest = [one for one in only if one not in apart]
            assert rest == ["not (launches_and_waits or compiled)"], name


def test_memcheck_where_there_is_the_tool(parts, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    stage = parts.parts(False)[2][-1]
    assert stage.command[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]
    assert stage.command[-2:] == ["-m", "benchmarks.kernels.sanitize"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    stage = parts.parts(False)[2][-1]
    assert stage.command is None and stage.reason == "compute-sanitizer is not on PATH"


def test_what_is_given_to_the_compute_sanitizer(benchmarks, monkeypatch):
    """All moves, with tensors at odd addresses; decisions with no, one and more than a warp of rows."""
    import torch

    from ffkernels import ops

    script, seen = benchmarks("kernels.sanitize"), []
    for name in ("step_", "delta_", "checkpoint_"):
        real = getattr(ops, name)

        def spy(table, *arguments, real=real, name=name):
            seen.append((name, {weight.data_ptr() % 16 for weight in table.weights}, table.impl))
            return real(table, *arguments)

        monkeypatch.setattr(ops, name, spy)
    assert script.moves_are_right("torch", torch.device("cpu"))
    assert {name for name, *_ in seen} == {"step_", "delta_", "checkpoint_"}
    assert {0, 2, 4} <= seen[0][1]
    assert script.ROWS == (0, 1, 33)
    calls = []
    monkeypatch.setattr(script, "decisions_are_right", lambda *case: not calls.append(case))
    monkeypatch.setattr(script, "moves_are_right", lambda impl, device: True)
    assert script.main() == 0
    assert [case[:2] for case in calls] == [*(("parabolic", rows) for rows in script.ROWS), ("linear", 0)]


def test_the_machine_is_described_whatever_is_missing(benchmarks, monkeypatch, capsys):
    """A kernel that cannot be compiled, and no GPU, are problems; what is there is said all the same."""
    import torch

    from ffkernels import ops
    from ffkernels.ops.build import BuildError

    def broken():
        raise BuildError("no nvcc on PATH")

    script, built = benchmarks("gpu_check.machine"), []
    monkeypatch.delenv("FFK_DRY", raising=False)
    monkeypatch.setattr(ops, "build_native", lambda: built.append("cpp"))
    monkeypatch.setattr(ops, "build_cuda", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main() == 1 and built == ["cpp"]
    *problems, line = capsys.readouterr().out.splitlines()
    assert problems == ["cuda: no nvcc on PATH", "this torch sees no GPU; FFK_DRY=1 checks on the CPU"]
    found = json.loads(line)
    assert list(found["build_seconds"]) == ["cpp"] and "gpu" not in found
    assert found["versions"]["torch"] == str(torch.__version__) and found["tools"].keys() >= {"nvcc", "make"}
    monkeypatch.setenv("FFK_DRY", "1")
    assert script.main() == 0, "what a dry run does not need is not missing"


# ---- choosing ----


def test_single_stages_share_the_time_of_a_part(parts):
    def limits(*names):
        return {stage.name: stage.limit for stage in parts.named(list(names), False, 590)}

    alone = limits("bench-stage")
    assert list(alone) == ["machine", "bench-stage"] and sum(alone.values()) == pytest.approx(578)
    shared = limits("memcheck", "bench-step")
    assert sum(shared.values()) == pytest.approx(578) and shared["machine"] == alone["machine"]
    assert shared["bench-step"] / shared["memcheck"] == pytest.approx(220 / 95)
    assert list(limits("machine")) == ["machine"]
    with pytest.raises(ValueError, match=r"--only nothing: there are machine, probe, moves, .*, end-to-end"):
        parts.named(["nothing"], True, 590)


def test_benchmarks_are_told_how_long_to_measure(parts):
    def told_by(name, dry):
        return parts.named([name], dry, 590)[1].measure(500.0)

    options = {"bench-stage": "--seconds", "bench-step": "--seconds", "end-to-end": "--minutes"}
    options["learning-rate"] = "--seconds"
    for name, option in options.items():
        told = told_by(name, False)
        seconds = float(told[told.index(option) + 1]) * (60 if option == "--minutes" else 1)
        assert 400 < seconds <= 470, "what is left is for starting up and for the last words"
    assert told_by("learning-rate", False)[:4] == ["--plan", "gpu", "--device", "cuda"]
    assert told_by("learning-rate", True) == ["--plan", "gpu-fast", "--seconds", "460"]
    assert told_by("bench-stage", True) == ["--dry"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "6"], r"--part: invalid choice: 6 \(choose from '?1'?, '?2'?, '?3'?, '?4'?, '?5'?\)"),
        (["--part", "two"], r"--part: invalid int value: 'two'"),
        (["--only", "moves", "nothing"], r"--only nothing: there are machine, probe, moves"),
        (["--part", "1", "--only", "moves"], r"not allowed with argument"),
    ],
)
def test_a_wrong_choice_says_what_is_allowed(check, arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["PART=3"], "--out x --part 3"),
        (["ONLY=moves decide"], "--out x --only moves decide"),
        ([], "--out x"),
    ],
)
def test_make_passes_it_on(given, passed, monkeypatch):
    command = ["make", "--no-print-directory", "-n", "gpu-check", "OUT=x", *given]
    for name in ("PART", "ONLY", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = " ".join(done.stdout.replace("\\\n", " ").split())
    assert line.endswith(f"-m benchmarks.gpu_check {passed}")


# ---- running ----


def test_what_a_part_says_and_leaves(check, parts, tmp_path, monkeypatch, capsys):
    """A benchmark that was stopped and a test that failed: the rest runs, and two files have it all."""
    monkeypatch.delenv("FFK_DRY", raising=False)
    write = f"""
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text('{{"dry": true, "sets": [], "errors": ["late"]}}')
out.with_suffix(".part").write_text("")
print("measures for", sys.argv[-1], "in", {str(ROOT)!r})
"""
    bench = python(write, "bench-step", 30, measure=lambda seconds: ["--seconds", str(round(seconds - 10))])
    broken = python("print('1 failed'); raise SystemExit(1)", "moves", 5)
    absent = parts.Stage("memcheck", "", None, 100, "no tool")
    fine = python("import os; print(os.environ['HF_HUB_OFFLINE'], os.environ['PYTHONPATH'])", "decide", 5)
    found = check.Check(tmp_path, "part4", "make gpu-check PART=4", False)
    result = found.run([machine(True), bench, broken, absent, fine])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check_part4.json", "gpu_check_part4.log"]
    assert json.loads((tmp_path / "gpu_check_part4.json").read_text()) == result
    assert result["command"] == "make gpu-check PART=4" and result["provenance"]["gpu"] == {"name": "H100"}
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert {name: stage["status"] for name, stage in stages.items()} == {
        **{"machine": "passed", "bench-step": "passed", "moves": "failed"},
        **{"memcheck": "left out", "decide": "passed"},
    }
    assert stages["moves"]["said"] == "exit status 1; 1 failed" and stages["memcheck"]["said"] == "no tool"
    # Of 578 seconds 10 are kept for the two after it, none for what is left out; 10 it needs itself.
    assert re.fullmatch(r"measures for 55[0-8] in \.", stages["bench-step"]["said"])
    assert stages["machine"]["output"] == "a warning"
    assert stages["decide"]["said"].startswith("1 .")
    assert result["bench-step"]["errors"] == ["late"]
    said = capsys.readouterr().out.splitlines()
    assert "error: late" in said
    assert said[-6] == "make gpu-check PART=4, on H100; torch 2, Triton None; ops: "
    assert [line.split()[0] for line in said[-5:]] == ["machine", "bench-step", "moves", "memcheck", "decide"]


def test_without_a_gpu_nothing_passes_for_a_check_of_one(check, parts, tmp_path, monkeypatch):
    monkeypatch.delenv("FFK_DRY", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    ran = tmp_path / "ran"
    stage = python(f"open({str(ran)!r}, 'w')", "moves")
    failing = python(f"{machine(False).command[-1]}; raise SystemExit(1)", "machine")
    monkeypatch.setattr(check, "parts", lambda dry: {1: [failing, stage], 2: [failing, stage]})
    assert check.main() == 1 and not ran.exists()
    for part in (1, 2):
        stages = json.loads((tmp_path / f"gpu_check_part{part}.json").read_text())["stages"]
        assert [stage["status"] for stage in stages] == ["failed", "left out"]
        assert stages[1]["said"] == "there is no GPU to check"
    monkeypatch.setenv("FFK_DRY", "1")
    monkeypatch.setattr(check, "parts", lambda dry: {1: [machine(False), stage], 2: [machine(False), stage]})
    assert check.main() == 0 and ran.exists()


def test_all_parts_look_at_the_machine_once(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FFK_DRY", "1")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    looks = tmp_path / "looks"
    looking = python(f"open({str(looks)!r}, 'a').write('x'); {machine(False).command[-1]}", "machine")
    what = {part: python("print('1 passed')", f"stage{part}") for part in (1, 2, 3, 4, 5)}
    monkeypatch.setattr(check, "parts", lambda dry: {part: [looking, stage] for part, stage in what.items()})
    assert check.main() == 0 and looks.read_text() == "x"
    files = sorted(path.name for path in tmp_path.iterdir() if path != looks)
    assert files == [f"gpu_check_part{part}.{kind}" for part in (1, 2, 3, 4, 5) for kind in ("json", "log")]
    said = capsys.readouterr().out
    for part in (1, 2, 3, 4, 5):
        assert f"-- part {part}: {check.TITLES[part]}" in said
        assert json.loads((tmp_path / f"gpu_check_part{part}.json").read_text())["provenance"]["versions"]
    assert said.count("on a GPU: ") == 6, "each stage says what it is for"


def test_what_took_too_long_leaves_the_rest_its_time(check, tmp_path, monkeypatch):
    monkeypatch.setenv("FFK_DRY", "1")
    monkeypatch.setattr(check, "LEAST_SECONDS", 1)
    found = check.Check(tmp_path, "part1", "", True, seconds=check.OVERHEAD_SECONDS + 12)
    slow = python("import time; time.sleep(60)", "slow", 2)
    result = found.run([slow, python("print('done')", "last", 10)])
    assert [stage["status"] for stage in result["stages"]] == ["failed", "passed"]
    assert result["stages"][0]["said"].startswith("stopped after 2 s")
    late = check.Check(tmp_path, "part1", "", True, seconds=check.OVERHEAD_SECONDS + 0.9)
    assert late.run([python("")])["stages"][0]["said"] == "no time was left"


@pytest.mark.slow
def test_a_slow_machine_takes_time_from_the_others_and_no_part_is_lost_with_it(check, tmp_path, monkeypatch):
    monkeypatch.delenv("FFK_DRY", raising=False)
    monkeypatch.setattr(check, "LEAST_SECONDS", 1)
    slow = python(f"import time; time.sleep(3); {machine(True).command[-1]}", "machine", 1)
    fine = python("print('1 passed')", "moves", 30)
    cold = check.Check(tmp_path, "part1", "", False, seconds=check.OVERHEAD_SECONDS + 31)
    assert [stage["status"] for stage in cold.run([slow, fine])["stages"]] == ["passed", "passed"]
    # One that never ends leaves them something, and what cannot be described may be tested nevertheless.
    monkeypatch.setattr(check, "MOST_MACHINE_SECONDS", 2)
    hangs = python("import time; time.sleep(60)", "machine", 1)
    found = check.Check(tmp_path, "part1", "", False, seconds=check.OVERHEAD_SECONDS + 31).run([hangs, fine])
    assert [stage["status"] for stage in found["stages"]] == ["failed", "passed"]
    assert found["stages"][0]["said"].startswith("stopped after 2 s")
    again = check.Check(tmp_path, "part2", "", False).run([machine(True), fine], found)
    assert again["provenance"]["gpu"] == {"name": "H100"}, "the next part looks again"


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
def test_a_stage_whose_time_is_up_says_what_it_found(check, parts, tmp_path, monkeypatch, handler):
    monkeypatch.setattr(check, "LAST_WORDS_SECONDS", 3)
    stage = python(STUBBORN.format(handler=handler), "slow")
    done = check.run(stage, stage.command, 4, tmp_path / "log")
    assert done["status"] == "failed" and done["said"].startswith("stopped after 4 s; ")
    assert "begun" in done["output"] and done["seconds"] < 20
    assert ("what was found so far" in done["output"]) == (handler == "signal.default_int_handler")


def test_stages_hear_the_request_to_end_also_in_the_background(check, tmp_path, monkeypatch):
    """A shell starts what runs in its background with SIGINT ignored, which processes inherit."""
    monkeypatch.setenv("FFK_DRY", "1")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--part", "1", "--out", str(tmp_path)])
    heard = python("import signal; print(signal.getsignal(signal.SIGINT).__name__)", "heard")
    monkeypatch.setattr(check, "parts", lambda dry: {1: [heard]})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # `main` sets what tests have
    check.main()
    (stage,) = json.loads((tmp_path / "gpu_check_part1.json").read_text())["stages"]
    assert stage["status"] == "passed" and stage["said"] == "default_int_handler"


def test_whoever_ends_the_check_ends_its_stages(tmp_path):
    """Under `timeout`, which sends SIGTERM: nothing goes on holding the GPU."""
    code = f"""
import sys
from benchmarks.gpu_check import __main__ as gpu_check, parts
sys.argv = ["gpu_check.py", "--out", {str(tmp_path / "out")!r}]
child = f"import os, time; open({str(tmp_path / "pid")!r}, 'w').write(str(os.getpid())); time.sleep(60)"
stage = parts.Stage("one", "", [sys.executable, "-c", child], 60)
gpu_check.parts = lambda dry: {{1: [stage]}}
gpu_check.main()
"""
    environment = {**os.environ, "FFK_DRY": "1"}
    outer = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    pid = tmp_path / "pid"
    try:
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        outer.send_signal(signal.SIGTERM)
        assert outer.wait(10) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    finally:
        outer.kill()


def test_a_promise_has_a_verdict(benchmarks):
    table = benchmarks("gpu_check.table")
    result = {
        "command": "make gpu-check PART=3",
        "provenance": None,
        "stages": [],
        "targets": [
            {"what": "a", "met": True, "measured": "1"},
            {"what": "b", "met": False, "measured": "2"},
            {"what": "c", "met": False, "verdict": "not resolved", "measured": "3"},
        ],
    }
    lines = [" ".join(line.split()) for line in table.render(result).splitlines()]
    assert lines[1:4] == ["met a: 1", "NOT MET b: 2", "not resolved c: 3"]
    assert set(table.TABLES) == set(benchmarks("gpu_check.parts").MODULES)
