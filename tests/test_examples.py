"""The examples run as they stand, without a network, and Fast Forward helps in each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STAGE = re.compile(r"after step (\d+): the update repeated (\d+) times, validation loss ([\d.]+) → ([\d.]+)")
NEEDS = {"hf_trainer.py": "transformers", "trl_sft.py": "trl", "pytorch_loop.py": "peft"}
STEPS = {"your_own_ff_loop.py": [6, 12, 18, 24, 30]}


SLOW = ["hf_trainer.py", "trl_sft.py"]


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
        "pytorch_loop.py",
        "your_own_ff_loop.py",
    ],
)
def test_example(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    stages = STAGE.findall(run.stdout)
    assert [int(step) for step, *_ in stages] == STEPS.get(name, [6, 12, 18])
    assert int(stages[0][1]) > 5, run.stdout
    assert all(float(after) <= float(before) for _, _, before, after in stages)
    tested = [float(value) for value in re.findall(r"^test loss ([\d.]+)$", run.stdout, re.MULTILINE)]
    assert not tested or tested[1] < tested[0] - 0.2


def test_the_own_loop_uses_the_kernels_alone():
    text = (EXAMPLES / "your_own_ff_loop.py").read_text(encoding="utf-8")
    assert re.findall(r"^(?:from|import) .*", text, re.MULTILINE) == [
        "import torch",
        "from ffkernels import ops",
    ]
