"""examples/accelerate_ddp.py runs as it stands: alone, under torchrun and under accelerate's launcher."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "accelerate_ddp.py"
LAUNCHERS = {
    "python": (1, []),
    "torchrun": (2, ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    "accelerate launch": (
        2,
        "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--main_process_port 0".split(),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_accelerate_example(launcher, tmp_path):
    pytest.importorskip("accelerate")
    ranks, command = LAUNCHERS[launcher]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two ranks would want two GPUs
    # In a session of its own: a launcher that had to be killed would leave its ranks behind.
    process = subprocess.Popen(
        [sys.executable, *(["-m", *command] if command else []), str(EXAMPLE)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors[-2000:]
    assert f"ranks: {ranks}, test loss 3.631" in printed
    stages = re.findall(r"after step (\d+): .* repeated (\d+) times, .* loss ([\d.]+) → ([\d.]+)", printed)
    assert [int(step) for step, *_ in stages] == [6, 12, 18], printed
    assert int(stages[0][1]) > 5
    assert all(float(after) <= float(before) for _, _, before, after in stages)
    assert float(re.search(r"^test loss ([\d.]+)$", printed, re.MULTILINE)[1]) < 3.631 - 0.2
