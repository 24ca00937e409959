"""Provenance says what a number depends on, and nothing about whose machine it is."""

import getpass
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ffkernels import __version__
from ffkernels.reporting import machine


def test_what_a_number_depends_on():
    info, versions = machine.machine_info(), machine.version_info()
    assert info["cpu"] and info["os"] and info["arch"] == platform.machine()
    assert 1 <= info["cores"] <= os.cpu_count()
    assert info["threads"] == torch.get_num_threads()
    assert info["ram_gib"] > 0
    assert len(info["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert versions["python"] == platform.python_version()
    assert (versions["torch"], versions["ffkernels"]) == (torch.__version__, __version__)
    assert {"transformers", "peft", "triton", "git_commit"} <= versions.keys()


def test_nobody_is_named():
    text = json.dumps([machine.machine_info(), machine.version_info()])
    assert str(Path.home()) not in text and os.getcwd() not in text
    words = set(re.split(r"\W+", text.lower()))
    assert platform.node().lower() not in words - {"linux", "localhost", "debian"}
    assert getpass.getuser().lower() not in words


def test_tools_that_are_missing_or_fail_give_none():
    assert machine._output("no-such-program-anywhere") is None
    assert machine._output("git", "no-such-command") is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_only_the_own_checkout_has_a_commit(tmp_path, monkeypatch):
    def git(*command):
        named = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", tmp_path, *named, *command], check=True, capture_output=True)

    file = tmp_path / "ffkernels" / "reporting" / "machine.py"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    (tmp_path / "other.txt").write_text("somebody's project\n")
    git("init", "-q")
    git("add", "other.txt")
    git("commit", "-q", "-m", "theirs")
    monkeypatch.setattr(machine, "__file__", str(file))
    assert machine.git_commit() is None  # installed inside another project's repository

    git("add", "ffkernels")
    git("commit", "-q", "-m", "ours")
    commit = machine.git_commit()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    file.write_text("2\n")
    assert machine.git_commit() == f"{commit}+changes"


def test_the_command_in_a_report_names_no_folders():
    given = ["compare", "--data", "/home/me/chat.jsonl", "--out=~/a b/x", "--model", "EleutherAI/pythia"]
    told = machine.command_line(given)
    assert told == "ffkernels compare --data chat.jsonl --out=x --model EleutherAI/pythia"
