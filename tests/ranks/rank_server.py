"""Runs functions in several processes that form a gloo group; a child of the tests, which talk to it in JSON.

torch and transformers are imported once, here; ranks are forks of this process, made anew for every request,
so one may raise, hang or die without a trace in the next. A request is one line

    {"scenario": name in distributed_scenarios, "ranks": 2, "seconds": 20, "arguments": {…}}

and its answer one line: for each rank {"value": …} or {"error": type, "message": …} or {"died": exit status},
the last also for a rank that had to be killed when the seconds were over, and "seconds" it took in all.
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

KILLED = -signal.SIGKILL


def child(request: dict, rank: int, folder: Path) -> None:
    """One rank: join the group, run the scenario, leave what came of it in a file."""
    import distributed_scenarios

    report = folder / f"{rank}.json"
    try:
        store = dist.FileStore(str(folder / "store"), request["ranks"])
        # Long against a loaded machine, short against a suite that waits for a hang.
        limit = timedelta(seconds=request["seconds"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=request["ranks"], timeout=limit)
        scenario = getattr(distributed_scenarios, request["scenario"])
        answer = {"value": scenario(rank, request["ranks"], **request.get("arguments", {}))}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    temporary = report.with_suffix(".part")
    temporary.write_text(json.dumps(answer))
    temporary.rename(report)


def run(request: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.monotonic()
        pids = []
        for rank in range(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                try:
                    devnull = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(devnull, 1)  # the answer's stream is not theirs
                    child(request, rank, folder)
                finally:
                    os._exit(0)
            pids.append(pid)
        status: dict[int, int] = {}
        while len(status) < len(pids):
            for rank, pid in enumerate(pids):
                if rank not in status:
                    done, code = os.waitpid(pid, os.WNOHANG)
                    if done:
                        status[rank] = os.waitstatus_to_exitcode(code)
                    elif time.monotonic() - begin > request["seconds"] + 2:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        taken = time.monotonic() - begin
        answers = []
        for rank in range(request["ranks"]):
            report = folder / f"{rank}.json"
            answer = json.loads(report.read_text()) if report.exists() else {"died": status[rank]}
            answers.append({**answer, "seconds": taken})
        return answers


def main() -> None:
    torch.set_num_threads(1)  # forks must not inherit a pool of threads
    import distributed_scenarios  # noqa: F401 - imported once for all forks
    import peft  # noqa: F401
    import transformers.models.gpt_neox.modeling_gpt_neox  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
