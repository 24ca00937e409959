"""What is written comes back, after any kind of end."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from ffkernels.engine.fast_forward import Stage
from ffkernels.reporting.exclusive import alone_in
from ffkernels.reporting.recorder import Recorder, read_run

RUN = {"name": "adam-s0", "config": {"lr": 1e-4}, "machine": {"cpu": "toy"}, "versions": {"torch": "2"}}


def steps(log):
    return [event["optimizer_step"] for event in log.steps]


def test_a_run_comes_back(tmp_path):
    stage = Stage(2, tau=3, losses=[(0, 2.5), (3, math.inf)], seconds=0.1, flops=7, stopped_because="nan")
    with Recorder(tmp_path / "deep" / "adam-s0.jsonl") as recorder:
        recorder.write("run", **RUN)
        recorder.write(
            "step", optimizer_step=1, train_loss=math.nan, lr=torch.tensor(0.5), flops={"paper": 3}
        )
        recorder.write("stage", **stage.to_dict(), run_flops={"paper": 10})
        recorder.write("test", optimizer_step=2, loss=2.25)
        recorder.write("end", optimizer_steps=2, test_loss=-math.inf)
    log = read_run(tmp_path / "deep" / "adam-s0.jsonl")
    assert (log.name, log.config, log.machine, log.versions) == tuple(RUN.values())
    assert math.isnan(log.steps[0]["train_loss"]) and log.steps[0]["lr"] == 0.5
    assert log.steps[0]["flops"] == {"paper": 3} and log.steps[0]["time"] > 1.7e9
    assert log.stages[0]["losses"] == [[0, 2.5], [3, math.inf]]
    assert log.stages[0]["stopped_because"] == "nan"  # a text stays one
    assert log.tests[0]["loss"] == 2.25
    assert log.end["test_loss"] == -math.inf
    assert (log.resumes, log.truncated) == (0, False)


def test_every_line_is_plain_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with Recorder(tmp_path / "x.jsonl") as recorder:
        recorder.write("test", loss=[math.nan, math.inf, -math.inf, 1e-300])
    line = (tmp_path / "x.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["loss"] == ["nan", "inf", "-inf", 1e-300]


def test_lines_are_there_before_the_run_ends(tmp_path):
    recorder = Recorder(tmp_path / "x.jsonl")
    recorder.write("run", **RUN)
    recorder.write("step", optimizer_step=1)
    assert steps(read_run(tmp_path / "x.jsonl")) == [1]
    recorder.close()
    recorder.close()


@pytest.fixture
def cut_log(tmp_path):
    """A log whose last line was cut after ``keep`` of its bytes."""

    def cut(keep):
        path = tmp_path / f"cut{keep}.jsonl"
        with Recorder(path) as recorder:
            recorder.write("run", **RUN)
            recorder.write("step", optimizer_step=1)
        size = path.stat().st_size
        with Recorder(path, append=True) as recorder:
            recorder.write("step", optimizer_step=2, text="τ*")
        line = path.stat().st_size - size
        with open(path, "r+b") as file:
            file.truncate(size + (keep if keep >= 0 else line + keep))
        return path

    return cut


@pytest.mark.parametrize(
    ("keep", "truncated", "found"),
    [(0, False, [1]), (1, True, [1]), (10, True, [1]), (-4, True, [1]), (-2, True, [1]), (-1, False, [1, 2])],
)
def test_a_last_line_that_was_cut_is_left_out_and_mended_unless_only_its_newline_is_lost(
    cut_log, keep, truncated, found
):
    path = cut_log(keep)
    log = read_run(path)
    assert log.truncated == truncated and steps(log) == found and log.end is None
    with Recorder(path, append=True) as recorder:
        recorder.write("step", optimizer_step=3)
    assert steps(read_run(path)) == [*found, 3]


def test_not_appending_begins_anew(tmp_path):
    for step in (1, 2):
        with Recorder(tmp_path / "x.jsonl") as recorder:
            recorder.write("run", **RUN)
            recorder.write("step", optimizer_step=step)
    assert steps(read_run(tmp_path / "x.jsonl")) == [2]


def test_a_resumed_run_replaces_what_it_took_back(tmp_path):
    path = tmp_path / "x.jsonl"
    with Recorder(path) as recorder:
        recorder.write("run", **RUN)
        recorder.write("test", optimizer_step=0, loss=9.0)
        for step in range(1, 7):
            recorder.write("step", optimizer_step=step, train_loss=1.0)
            if step in (3, 6):
                recorder.write("stage", optimizer_step=step, tau=step, losses=[])
                recorder.write("test", optimizer_step=step, loss=float(step))
        recorder.write("end", optimizer_steps=6, test_loss=6.0)
    with Recorder(path, append=True) as recorder:
        recorder.write("run", **{**RUN, "config": {"lr": 2.0}}, resumed_from=4)
        recorder.write("step", optimizer_step=5, train_loss=2.0)
    log = read_run(path)
    assert steps(log) == [1, 2, 3, 4, 5]
    assert [e["train_loss"] for e in log.steps] == [1, 1, 1, 1, 2]
    assert [e["optimizer_step"] for e in log.stages] == [3]
    assert [e["optimizer_step"] for e in log.tests] == [0, 3]
    assert log.end is None and log.resumes == 1 and log.config == {"lr": 2.0}


def test_a_resume_that_logged_nothing_yet_keeps_what_led_to_it(tmp_path):
    with Recorder(tmp_path / "x.jsonl") as recorder:
        recorder.write("run", **RUN)
        for step in (1, 2, 3):
            recorder.write("step", optimizer_step=step)
        recorder.write("run", **RUN, resumed_from=2)
    assert steps(read_run(tmp_path / "x.jsonl")) == [1, 2]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        *((content, r"x\.jsonl holds no complete line") for content in ("", "\n\n", '{"event":"ru')),
        ('{"event":"run"}\n{"event":"st\n{"event":"end"}\n', r"x\.jsonl, line 2"),
        ('{"event":"step","optimizer_step":1}\n', "begins with a 'step' event"),
    ],
)
def test_a_log_that_is_none_is_told(tmp_path, content, told):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_run(tmp_path / "x.jsonl")


def test_events_and_values_of_other_kinds_are_refused(tmp_path):
    with Recorder(tmp_path / "x.jsonl") as recorder:
        with pytest.raises(ValueError, match="'epoch'"):
            recorder.write("epoch")
        with pytest.raises(TypeError, match="object"):
            recorder.write("test", loss=object())
        recorder.write("run", **RUN)
    assert read_run(tmp_path / "x.jsonl").name == "adam-s0"  # a refused event leaves no part of a line


def test_a_log_has_one_writer(tmp_path):
    path = tmp_path / "x.jsonl"
    with Recorder(path) as recorder:
        recorder.write("run", **RUN)
        for append in (False, True):
            with pytest.raises(RuntimeError, match=r"another run is writing .*x\.jsonl just now; .*--name"):
                Recorder(path, append=append)
        recorder.write("step", optimizer_step=1)
    assert steps(read_run(path)) == [1]
    with Recorder(path, append=True) as recorder:
        recorder.write("step", optimizer_step=2)
    assert steps(read_run(path)) == [1, 2]


def test_the_lock_ends_with_its_process(tmp_path):
    code = "import sys, os; from ffkernels.reporting.recorder import Recorder\n"
    code += "recorder = Recorder(sys.argv[1]); recorder.write('run', name='x'); os._exit(1)"
    path = tmp_path / "x.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 1
    with Recorder(path, append=True) as recorder:
        recorder.write("step", optimizer_step=1)
    assert steps(read_run(path)) == [1]


def test_a_recorder_that_writes_nothing_changes_nothing(tmp_path):
    (tmp_path / "old.jsonl").write_text("kept\n")
    for name in ("old.jsonl", "new.jsonl"):
        with Recorder(tmp_path / name):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]
    assert (tmp_path / "old.jsonl").read_text() == "kept\n"


def test_a_folder_has_one_writer_and_stays_only_when_filled(tmp_path):
    with alone_in(tmp_path / "runs"):
        with pytest.raises(RuntimeError, match="another run is writing"), alone_in(tmp_path / "runs"):
            pass
    assert not (tmp_path / "runs").exists()
    with alone_in(tmp_path / "runs"):
        (tmp_path / "runs" / "log").touch()
    with alone_in(tmp_path / "runs"):
        pass
    assert (tmp_path / "runs" / "log").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told_with_the_log(tmp_path):
    (tmp_path / "x.jsonl").symlink_to("/dev/full")
    with Recorder(tmp_path / "x.jsonl") as recorder, pytest.raises(OSError) as error:
        recorder.write("run", **RUN)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "x.jsonl")
