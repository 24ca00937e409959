"""The first loop on a machine runs in a process of its own: a training must not be what finds out.

Where a driver cannot do what a WHILE node asks of it, that may end in a fault that takes the CUDA context
of its process along, or in a kernel that never ends. So a small loop is tried apart, under a limit of time,
in each way to set its condition (`ops.condition`) until one counts right, and what it did is kept
(`graphs.verdicts`): counted right or wrong, took its process or the GPU's context with it, did not end. Not
kept is what says nothing about loops, as where the GPU admits one process only.

    python -m ffkernels.graphs.probe [cuda:N]     try every way again, whatever is kept, and say in a line
                                                  what each did; CUDA is left to other processes, so that
                                                  this works in exclusive mode too
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import indent
from time import perf_counter
from typing import Any

import torch

from ffkernels.graphs import driver, verdicts
from ffkernels.graphs.while_graph import small_loop
from ffkernels.ops import condition
from ffkernels.ops.condition import WAYS

# Seconds for one process, which imports torch, compiles half a dozen small kernels and loops.
LIMIT = 90.0
COMMAND = "python -m ffkernels.graphs.probe"

# Nothing but sys is imported before the path is that of the process that asks.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    "from ffkernels.graphs.probe import answer; answer(*sys.argv[1:4])"
)
_CHILD_MARK = "FFKERNELS_GRAPH_PROBE"
_REPLY = "ffkernels-graph-probe: "
# By its own doing; by any other signal somebody else has ended it.
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP}


class NotTried(RuntimeError):
    """The process did not come to its loop, which says nothing about loops."""


@dataclass(frozen=True)
class Outcome:
    """What a loop did in a process of its own.

    Attributes:
        gpu: on which GPU, as `graphs.driver.Cuda.gpu` describes it.
        problem: None when it counted right.
        lasting: whether it would do so again; an error that was raised may have a cure of its own.
        said: what else its process printed, as a traceback.
    """

    gpu: dict[str, str]
    problem: str | None = None
    lasting: bool = True
    said: str = ""


@dataclass(frozen=True)
class Verdict:
    """The ways to set a condition that may be tried in this process, or "cause; cure" where none may."""

    ways: tuple[str, ...] = ()
    problem: str | None = None


def verdict(device: torch.device) -> Verdict:
    """What is kept about loops on `device`; where nothing is, some seconds in which they are tried.

    Raises nothing: where it cannot be found out, that is the verdict, for this time.
    """
    try:
        gpu = driver.cuda.gpu(device)
        key = verdicts.key(gpu)
        kept = verdicts.read(key)
        return _judge(kept or _find_out(device, gpu["uuid"], key)[1], device)
    except NotTried as reason:
        return _unknown(str(reason), device)
    except Exception as error:
        return _unknown(driver.first_line(error), device)


def try_again(device: torch.device, tell: Callable[[str], None]) -> tuple[Verdict, Path | None]:
    """Try every way on `device`, whatever is kept.

    As each ends, `tell` gets a line of what it did, and where it did not count right what it printed.
    Returns the verdict, and the file that now has it, if any.
    """
    try:
        key, found = _find_out(device, "", tell=tell)
    except NotTried as reason:
        return _unknown(str(reason), device), None
    return _judge(found, device), verdicts.path(key) if verdicts.read(key) == found else None


def attempt(device: torch.device, uuid: str, way: str) -> Outcome:
    """Try a loop whose condition is set in one `way`, in a process that may crash or hang.

    Args:
        device: by its number among those that CUDA_VISIBLE_DEVICES leaves.
        uuid: of the GPU that is meant, whatever its number is there; "" for whichever has the number.

    Raises:
        NotTried: when the process did not come to its loop.
    """
    if os.environ.get(_CHILD_MARK):
        raise NotTried("a process that was started to find it out asks for it again")
    if not sys.executable or getattr(sys, "frozen", False):
        raise NotTried("there is no Python to start, the program was frozen or has embedded it")
    try:
        status, said = _run(_command(device.index or 0, uuid, way))
    except OSError as error:
        raise NotTried(f"no process could be started: {error}") from error
    reply: dict[str, Any] = {}
    for line in said.splitlines():
        if line.startswith(_REPLY):
            with suppress(ValueError):
                reply |= json.loads(line.removeprefix(_REPLY))
    if "gpu" not in reply:
        raise NotTried(reply.get("refused") or f"{_ended(status)} before its loop{_last(said)}")
    outcome = partial(Outcome, reply["gpu"], said="\n".join(_lines(said)))
    if "counted" in reply:
        return outcome(reply["counted"])
    if "faulted" in reply:
        return outcome(f"it lost the GPU: {reply['faulted']}")
    if "raised" in reply:
        return outcome(f"it raised: {reply['raised']}", lasting=False)
    if status is None or (status < 0 and -status in _CRASHES):
        return outcome(_ended(status))
    raise NotTried(f"{_ended(status)}{_last(said)}")


# ---- in the process that asks ----


def _find_out(
    device: torch.device,
    uuid: str,
    key: dict[str, Any] | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The key of what was found, and what was found; kept where it can be.

    Without a `key` it is made of what the process says about its GPU, so that CUDA is not asked in this one.
    Ways are tried until one counts right; where there is somebody to `tell`, all.
    """
    problems: dict[str, str] = {}
    good, lasting = None, False
    for way in WAYS:
        begun, refused = perf_counter(), None
        try:
            outcome = attempt(device, uuid, way)
        except NotTried as reason:
            refused = reason
        if tell is not None:
            did = f"not tried, {refused}" if refused else outcome.problem or "it counted right"
            tell(f"condition set {way} the decision: {did} ({perf_counter() - begun:.1f} s)")
            if not refused and outcome.problem and outcome.said:
                tell(indent(outcome.said, "    "))
        if refused is not None:
            if good is None:
                raise refused
        elif outcome.problem is None:
            good = good or way
            if tell is None:
                break
        else:
            problems[way] = outcome.problem
            lasting |= outcome.lasting
    key, found = key or verdicts.key(outcome.gpu), {"way": good, "problems": problems}
    if good or lasting:
        verdicts.keep(key, found)
    return key, found


def _judge(found: dict[str, Any], device: torch.device) -> Verdict:
    if found["way"] is not None:
        return Verdict((found["way"],))
    problems = "; ".join(f"condition set {way} the decision: {why}" for way, why in found["problems"].items())
    return Verdict(
        problem=f"a small loop did not run as it must in a process of its own ({problems}); a newer driver "
        f"may cure it, and `{COMMAND} {device}` tries again"
    )


def _unknown(reason: str, device: torch.device) -> Verdict:
    return Verdict(
        problem=f"whether loops work on the device could not be found out in a process of its own ({reason});"
        f" run `{COMMAND} {device}` once while the GPU is free"
    )


def _command(index: int, uuid: str, way: str) -> list[str]:
    paths = [path for path in sys.path if isinstance(path, str)]
    # Last, where it shadows nothing: needed when the path was changed after this package was found.
    return [sys.executable, "-c", _CHILD, str(index), uuid, way, *paths, str(Path(__file__).parents[2])]


def _run(command: list[str]) -> tuple[int | None, str]:
    """The exit status, None at the limit, and what was printed. When this returns the process has ended."""
    environment = {**os.environ, _CHILD_MARK: "1"}
    with tempfile.TemporaryFile() as said:  # not a pipe, which a process of its own could keep open
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the training, which ends this one
        )
        status = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(LIMIT)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                # A driver may hold on to it; then it is not waited for.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        said.seek(0)
        return status, said.read().decode(errors="replace")


def _ended(status: int | None) -> str:
    if status is None:
        return f"it did not end within {LIMIT:.0f} s"
    if status >= 0:
        return f"it ended with exit status {status}"
    try:
        return f"it was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"it was ended by signal {-status}"


def _lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.strip() and not line.startswith(_REPLY)]


def _last(said: str) -> str:
    lines = _lines(said)
    return f": {lines[-1].strip()[:300]}" if lines else ""


# ---- in the process that is asked ----


def answer(index: str, uuid: str, way: str) -> None:
    """Try one loop and print what came of it. Does not return: what ends with a process is not asked for."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(LIMIT) + 30)  # in case nobody is left to end it
    for reply in _replies(int(index), uuid, way):
        print(f"\n{_REPLY}{json.dumps(reply)}", flush=True)
    os._exit(0)


def _replies(index: int, uuid: str, way: str) -> Iterator[dict[str, Any]]:
    try:
        device = _reach(index, uuid)
        gpu = driver.cuda.gpu(device)
        import_module("ffkernels.ops.decide")
    except Exception as error:
        yield {"refused": f"it did not get at the GPU: {driver.first_line(error)}"}
        return
    yield {"gpu": gpu}
    try:
        condition.use(device, way)
        problem = small_loop(device)
        driver.cuda.synchronize(device)
    except Exception as error:
        traceback.print_exc()
        try:
            driver.cuda.synchronize(device)
        except Exception:  # the context is lost, not just a call refused
            yield {"faulted": driver.first_line(error)}
        else:
            yield {"raised": driver.first_line(error)}
    else:
        yield {"counted": problem}


def _reach(index: int, uuid: str) -> torch.device:
    """The device with that uuid, else with that number; something has run on it."""
    cuda = driver.cuda
    devices = cuda.devices()
    for device in devices:
        if cuda.gpu(device)["uuid"] == uuid if uuid else (device.index or 0) == index:
            torch.zeros(1, device=device).item()
            return device
    if not devices:
        raise RuntimeError("a new process sees no GPU")
    raise RuntimeError(
        f"a new process sees {len(devices)} GPUs and not the one that was meant, as where the program itself "
        "has changed CUDA_VISIBLE_DEVICES"
    )


def _main(arguments: list[str]) -> int:
    device = torch.device(arguments[0] if arguments else "cuda:0")
    found, path = try_again(device, lambda line: print(line, flush=True))
    print(found.problem or f"loops on {device} will have their condition set {found.ways[0]} the decision")
    print(f"kept in {path}" if path else "not kept")
    return int(found.problem is not None)


if __name__ == "__main__":
    from ffkernels.graphs import probe as graph_probe

    sys.exit(graph_probe._main(sys.argv[1:]))
