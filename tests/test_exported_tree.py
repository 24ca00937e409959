"""Benchmarks start where nothing is installed: in an exported tree, by a Python that has torch alone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[1]
# torch once, then a process for each module, which finds nothing that another has put on the path.
IN_EACH = """
import importlib, json, os, sys, traceback
from importlib.util import find_spec
import torch, pytest
tree, modules = sys.argv[1], sys.argv[2:]
assert find_spec("ffkernels") is None, find_spec("ffkernels")
found = {}
for module in modules:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            sys.path.insert(0, tree)  # as `python -m` does in it
            importlib.import_module(module)
            said = find_spec("ffkernels").origin
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    found[module] = os.fdopen(read)
print(json.dumps({module: said.read() for module, said in found.items()}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_command_finds_the_package_in_its_own_tree(tmp_path):
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    elsewhere.mkdir()
    absent = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("ffkernels", "benchmarks", "tests/ops"):
        shutil.copytree(ROOT / name, tree / name, ignore=absent)
    modules = [
        ".".join(path.relative_to(tree).with_suffix("").parts)
        for path in sorted((tree / "benchmarks").rglob("*.py"))
        if path.stem == "__main__" or '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    wanted = ("gpu_check.__main__", "kernels.step", "stages.search_noise", "end_to_end.sft", "peers.race")
    assert {f"benchmarks.{name}" for name in (*wanted, "learning_rate.__main__")} <= set(modules)
    # -S: no .pth file is read, which is where an editable installation would be found.
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(installed), "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-S", "-c", IN_EACH, str(tree), *modules]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if any(f"{folder}/ffkernels/__init__.py" in done.stderr for folder in installed):
        pytest.skip("ffkernels is installed among the packages, and not as an editable installation")
    assert done.returncode == 0, done.stderr
    expected = str(tree / "ffkernels" / "__init__.py")
    assert json.loads(done.stdout) == dict.fromkeys(modules, expected)
