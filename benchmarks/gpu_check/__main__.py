"""One command for a GPU machine, in five parts: is it right, does it hold, how fast are stages and kernels.

    make gpu-check PART=1                            or, without make, in any checkout:
    python -m benchmarks.gpu_check --part 1 --out runs/gpu-check

A part (`parts.py` says what is in each) needs no other, ends within 590 seconds, and leaves two files,
gpu_check_partN.json and .log; its table comes last. Without a part all four run, one after the other.

Nothing is installed or fetched: the package runs from the checkout and its kernels are compiled in place,
once. A failing stage does not stop the rest, and the JSON is rewritten after each, so that whatever was found
survives. The exit status says whether all of them passed. FFK_DRY=1 does the same in small on the CPU, and
says what each stage is for on a GPU.

--only runs single stages for longer: they share the time of a part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu_check.parts import (
    LAST_WORDS_SECONDS,
    MACHINE,
    MOST_MACHINE_SECONDS,
    OVERHEAD_SECONDS,
    PART_SECONDS,
    TITLES,
    Stage,
    named,
    parts,
)
from benchmarks.gpu_check.table import render, stage_line, targets_of
from benchmarks.record import write

LEAST_SECONDS = 5  # in which a stage is worth starting
# Nothing may wait for a network that is not there.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PIP_NO_INDEX": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0]
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--part", type=int, choices=list(TITLES), help="; ".join(map(title, TITLES)))
    which.add_argument("--only", nargs="+", metavar="NAME", help="single stages; a wrong name lists them all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="folder of the results")
    options = parser.parse_args()
    # Whoever ends this process ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A job in a shell's background begins with SIGINT ignored, and so would stages, which it asks to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where the toolkit is installed by default: its tools are not always on PATH.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    dry = os.environ.get("FFK_DRY") == "1"
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.only:
        try:
            stages = named(options.only, dry, PART_SECONDS)
        except ValueError as error:
            parser.error(str(error))
        found = [Check(out, "only", f"make gpu-check ONLY='{' '.join(options.only)}'", dry).run(stages)]
    else:
        found, machine = [], None
        for part, stages in parts(dry).items():
            if options.part in (None, part):
                print(f"-- {title(part)}: within {PART_SECONDS} s on a GPU", flush=True)
                check = Check(out, f"part{part}", f"make gpu-check PART={part}", dry)
                found.append(machine := check.run(stages, machine))
    failed = [stage["stage"] for result in found for stage in result["stages"] if stage["status"] == "failed"]
    print(f"{'failed: ' + ', '.join(failed) if failed else 'all stages passed'}; written to {options.out}")
    return 1 if failed else 0


def title(part: int) -> str:
    return f"part {part}: {TITLES[part]}"


class Check:
    """The stages of one part, what came of them, and the two files that say so."""

    def __init__(self, out: Path, name: str, command: str, dry: bool, seconds: float = PART_SECONDS) -> None:
        self.end = time.perf_counter() + seconds - OVERHEAD_SECONDS
        self.dry = dry
        self.json, self.log = (out / f"gpu_check_{name}.{kind}" for kind in ("json", "log"))
        self.measured = out / f"gpu_check_{name}.measured"  # what a benchmark writes until it ends
        self.result: dict = {"kind": "gpu-check", "command": command, "dry": dry, "provenance": None}
        self.result |= {"stages": [], "targets": []}

    def run(self, stages: list[Stage], before: dict | None = None) -> dict:
        """All of them, and the table. A machine that a part `before` has looked at is not looked at again."""
        begin = time.perf_counter()
        for old in (self.json, self.log):
            old.unlink(missing_ok=True)
        for place, stage in enumerate(stages):
            if stage.name == MACHINE and before is not None and before["provenance"] is not None:
                self.result["provenance"] = before["provenance"]
                self.result["stages"].append(before["stages"][0])
                continue
            kept = sum(later.limit for later in stages[place + 1 :] if later.command is not None)
            left = self.end - time.perf_counter()
            most = min(left, MOST_MACHINE_SECONDS) if stage.name == MACHINE else 0
            done = self.one(stage, max(left - kept, most))
            self.result["stages"].append(done)
            self.say(stage, done)
            self.result["seconds"] = round(time.perf_counter() - begin, 1)
            write(self.result, self.json)
        print(render(self.result), flush=True)
        return self.result

    def one(self, stage: Stage, limit: float) -> dict:
        """What came of one stage; a benchmark's numbers and a machine's description go into the result."""
        if stage.command is None:
            return outcome(stage, "left out", stage.reason)
        # Where the machine could not be described the rest is tried all the same.
        if stage.name != MACHINE and not self.dry and "gpu" not in (self.result["provenance"] or ("gpu",)):
            return outcome(stage, "left out", "there is no GPU to check")
        if limit < LEAST_SECONDS:
            return outcome(stage, "failed", "no time was left")
        shutil.rmtree(self.measured, ignore_errors=True)
        command = list(stage.command)
        if stage.measure is not None:
            self.measured.mkdir()
            command += ["--out", str(self.measured / "result.json"), *stage.measure(limit)]
        done = run(stage, command, limit, self.log)
        numbers = self.measured / "result.json"
        if numbers.is_file():
            self.result[stage.name] = json.loads(numbers.read_text(encoding="utf-8"))
            self.result["targets"] += targets_of(stage.name, self.result[stage.name])
        shutil.rmtree(self.measured, ignore_errors=True)
        if stage.name == MACHINE:
            # Warnings may have been printed beside it.
            lines = [line for line in done["output"].splitlines() if line.startswith("{")]
            self.result["provenance"] = json.loads(lines[-1]) if lines else None
            done["output"] = "\n".join(line for line in done["output"].splitlines() if line not in lines)
        return done

    def say(self, stage: Stage, done: dict) -> None:
        print(stage_line(done), flush=True)
        if self.dry:
            print(f"{'':15}on a GPU: {stage.what}; {stage.limit:.0f} s are kept for it", flush=True)
        if done["status"] == "failed":
            print("    " + done["output"][-2500:].replace("\n", "\n    "), flush=True)


def outcome(stage: Stage, status: str, said: str, seconds: float = 0.0, output: str = "") -> dict:
    found = {"stage": stage.name, "status": status, "said": said, "seconds": round(seconds, 1)}
    return {**found, "output": output}


def run(stage: Stage, command: list[str], limit: float, log: Path) -> dict:
    """Run one stage in its own process group, so that nothing of it outlives its limit or this process."""
    begin = time.perf_counter()
    with log.open("ab") as stream:
        stream.write(f"\n=== {stage.name}\n".encode())
        stream.flush()
        start = stream.tell()
        process = subprocess.Popen(
            command,
            env={**environment(), **stage.environment},
            **{"cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream},
            start_new_session=True,
        )
        late = ""
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            late = f"stopped after {limit:.0f} s"
            # Whoever is asked to end says what it has found.
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    printed = log.read_bytes()[start:].decode(errors="replace").strip().replace(str(ROOT), ".")
    said = late or (f"exit status {code}" if code else "")
    last = printed.rpartition("\n")[2].strip("= ")[:100]
    said = "; ".join(filter(None, (said, "" if last.startswith("{") else last)))
    passed = code == 0 and not late
    seconds = time.perf_counter() - begin
    return outcome(stage, "passed" if passed else "failed", said, seconds, printed[-6000:])


def environment() -> dict[str, str]:
    """Of a stage: the package from this checkout, its kernels kept there, nothing from a network."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    found = {**OFFLINE, **os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    if os.environ.get("FFK_DRY") == "1":  # small work, which several threads only slow down on a busy machine
        found.setdefault("OMP_NUM_THREADS", "1")
    if os.access(ROOT, os.W_OK):
        found.setdefault("FFKERNELS_CACHE", str(ROOT / "build" / "gpu-check"))
    return found


if __name__ == "__main__":
    sys.exit(main())
