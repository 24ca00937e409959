"""What the GPU check consists of: five parts, each worth a call of its own and over within 590 seconds.

    1   go or no-go, then what has to be right before a stage can be: moves, decisions, graphs, validation
    2   whole stages, also in what users bring; launches; every kernel under compute-sanitizer's memcheck
    3   stages measured beside what one would otherwise run
    4   kernels measured beside torch.compile; compiled training, and stages under a profiler
    5   training with no learning rate given beside Adam's sweep, at batches of 8 to 128

Limits are what is kept for a stage: time that those before it did not need is its own as well. They are
guesses for an H100, with every machine's first imports and compilations in them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

PART_SECONDS = 590
LAST_WORDS_SECONDS = 8  # of a stage whose time is up
# Before the first stage, and after the end of the last one's time.
OVERHEAD_SECONDS = LAST_WORDS_SECONDS + 4
MACHINE = "machine"
# It may take from those after it, which would be lost without it: first imports and nvcc from a cold disk.
MOST_MACHINE_SECONDS = 180
TITLES = {
    1: "go or no-go; moves, decisions, graphs, validation",
    2: "stages, launches, what users bring, several processes; memcheck of every kernel",
    3: "stages beside what one would otherwise run, in milliseconds and gigabytes",
    4: "kernels beside torch.compile; compiled training, stages under a profiler",
    5: "learning rates: none given, beside Adam's sweep",
}
MODULES = {
    "bench-stage": "stages.bench",
    "bench-step": "kernels.step_gpu",
    "learning-rate": "learning_rate",
    "end-to-end": "end_to_end",
}
# The files in tests/gpu of which nothing runs in a dry run.
NEED_A_GPU = ("decide", "graph_core", "launches")
# Enough to see that the tests are right: one of two searches and of two dtypes, and of the situations, all of
# which tests/graphs has over a stand-in for CUDA, those with code of their own.
DRY = {
    "stage": "not linear and not bfloat16",
    "situations": "another_stream or pins_memory or exchanged_examples",
}
# These profile loops on the device, on which profilers have crashed: in a process of their own, last.
PROFILED = "launches_and_waits"
COMPILED = "compiled"
# A sweep for the tuned rate would take the time of another task.
END_TO_END = ["--tuned-lr", "3e-3", "--test-examples", "500", "--evaluate-every", "20", "--fresh"]


@dataclass(frozen=True)
class Stage:
    """One step of a part.

    Attributes:
        what: it shows on a GPU.
        command: None where it is left out, for `reason`.
        limit: seconds that are kept for it.
        measure: of a benchmark, the options that make it measure within so many seconds.
        environment: what is set for it besides.
    """

    name: str
    what: str
    command: list[str] | None
    limit: float
    reason: str = ""
    measure: Callable[[float], list[str]] | None = None
    environment: dict[str, str] = field(default_factory=dict)


def python(*module: str) -> list[str]:
    """The command that runs a module, with its options."""
    return [sys.executable, "-m", *module]


def parts(dry: bool) -> dict[int, list[Stage]]:
    """The stages of each part in the order in which they run, the most valuable first.

    Every part begins with the machine: what it is, and the kernels compiled where they are not yet.
    """
    machine = Stage(
        MACHINE,
        "GPU, tools, versions; kernels of C++ and CUDA compiled where they are not yet; what is available",
        python("benchmarks.gpu_check.machine"),
        60,
    )
    probe = Stage(
        "probe",
        "whether a WHILE node counts right, tried in processes of their own",
        python("ffkernels.graphs.probe"),
        105,  # a loop that never ends is given up after 90
    )
    if dry:
        probe = replace(probe, command=None, reason="dry run: there is no GPU that could loop")
    both = f"not ({PROFILED} or {COMPILED})"
    return {
        1: [
            machine,
            probe,
            tests("moves", 100, dry, "step, delta, checkpoint: the CPU's bits, any alignment, 2^31 elements"),
            tests("decide", 70, dry, "searches and verdicts on the device are those on the host"),
            tests("graph_core", 123, dry, "captures and loops: values, memory, what goes wrong"),
            tests("validation", 120, dry, "captured losses of every family, fused attention, memory"),
        ],
        2: [
            machine,
            tests("stage", 190, dry, "captured stages are the eager one bit for bit", both),
            tests("launches", 60, dry, "one launch per op, no waits, any stream", both),
            tests(
                "situations", 115, dry, "stages in what users bring: autocast, streams, pinning loaders, TF32"
            ),
            tests("distributed", 50, dry, "stages of several processes, over NCCL"),
            memcheck(95, dry),
        ],
        3: [
            machine,
            benchmark(
                "bench-stage",
                515,
                lambda seconds: ["--dry"] if dry else ["--seconds", str(round(seconds - 40))],
                "SmolLM2 and Llama rows: our executors, the authors' way, clean eager, the bare forward",
            ),
        ],
        4: [
            machine,
            benchmark(
                "bench-step",
                220,
                # Each of its sets is compiled by torch and profiled before it is timed.
                lambda seconds: ["--dry"] if dry else ["--seconds", str(round(seconds - 80))],
                "every move, cold and warm, beside _foreach, torch.compile and a plain copy",
            ),
            tests("stage", 130, dry, "stages beside compiled training", COMPILED, "compiled"),
            tests("launches", 90, dry, "moves inside compiled functions", COMPILED, "compiled-moves"),
            tests("stage", 70, dry, "launches and waits, by a profiler", PROFILED, "profiled"),
        ],
        5: [
            machine,
            benchmark(
                "learning-rate",
                515,
                lambda seconds: rates(seconds, dry),
                "SmolLM2-135M with LoRA and VeRA: test losses, milliseconds of a step and gigabytes; random "
                "weights where its own are not in the cache",
            ),
        ],
    }


def rates(seconds: float, dry: bool) -> list[str]:
    """Options of the benchmark of learning rates."""
    plan = ["--plan", "gpu-fast"] if dry else ["--plan", "gpu", "--device", "cuda"]
    return [*plan, "--seconds", str(round(seconds - 40))]


def by_name(dry: bool) -> list[Stage]:
    """Every stage that can be asked for by name: those of the parts, and what is in none."""

    def measure(seconds: float) -> list[str]:
        fast = ["--fast", "--fresh", "--device", "cpu"]
        return fast if dry else [*END_TO_END, "--minutes", f"{(seconds - 30) / 60:.2f}"]

    rest = benchmark("end-to-end", 400, measure, "the paper's protocol, as much of it as time allows")
    found = {stage.name: stage for stages in parts(dry).values() for stage in stages}
    return [*found.values(), rest]


def named(names: list[str], dry: bool, seconds: float) -> list[Stage]:
    """The stages of these names, after the machine; they share the whole time as they share a part's."""
    every = by_name(dry)
    unknown = sorted(set(names) - {stage.name for stage in every})
    if unknown:
        allowed = ", ".join(stage.name for stage in every)
        raise ValueError(f"--only {' '.join(unknown)}: there are {allowed}")
    machine, chosen = every[0], [s for s in every if s.name in names and s.name != MACHINE]
    kept = sum(stage.limit for stage in chosen)
    share = (seconds - OVERHEAD_SECONDS - machine.limit) / kept if kept else 0
    return [machine, *(replace(stage, limit=stage.limit * share) for stage in chosen)]


def tests(file: str, limit: float, dry: bool, what: str, only: str = "", name: str = "") -> Stage:
    """One file of tests/gpu, or what of it `only` selects."""
    if dry and (file in NEED_A_GPU or only in (COMPILED, PROFILED)):
        return Stage(name or file.replace("_", "-"), what, None, limit, "dry run: all of it needs a GPU")
    command = python("pytest", "-m", "gpu", "-q", "--durations=8", "-p", "no:cacheprovider")
    # The project's own options name a plugin that these tests do not need and a GPU machine may lack. What
    # was skipped is said where it should not have been.
    command += ["-o", "addopts=", "--import-mode=importlib", "-rf" if dry else "-rfEs"]
    chosen = " and ".join(filter(None, (only, DRY.get(file) if dry else "")))
    command += ["-k", chosen] if chosen else []
    command.append(f"tests/gpu/test_{file}_on_gpu.py")
    return Stage(name or file.replace("_", "-"), what, command, limit)


def benchmark(name: str, limit: float, measure: Callable[[float], list[str]], what: str) -> Stage:
    """A module that writes a JSON of its own and measures for as long as it is told."""
    return Stage(name, what, python(f"benchmarks.{MODULES[name]}"), limit, measure=measure)


def memcheck(limit: float, dry: bool) -> Stage:
    """No racecheck: it looks at shared memory, of which no kernel uses any."""
    what = "memory accesses of begin, decide, step, delta and checkpoint, CUDA's and Triton's"
    script = python("benchmarks.kernels.sanitize")
    if dry:  # the script itself can be checked: its results are compared with the torch ops'
        return Stage("memcheck", what, script, limit)
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Stage("memcheck", what, None, limit, "compute-sanitizer is not on PATH")
    # Of API errors only ours count, and those raise: torch asks drivers for functions that they lack.
    flags = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    environment = {"CUDA_MODULE_LOADING": "LAZY"}
    return Stage("memcheck", what, [tool, *flags, *script], limit, environment=environment)
