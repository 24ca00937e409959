"""A Fast Forward stage as a whole: our three executors beside what one would otherwise run.

    python -m benchmarks.stages.bench --out results.json [--seconds 470] [--dry]

Rows are cases, columns are providers (`cases.py`, `providers.py`); all run from the same weights
and the same Δ, how often is said in `rounds.py`. A stage is timed from an idle device to an idle device
by the host's clock and divided by its evaluations: milliseconds per Fast Forward step. A stage of two
evaluations beside it tells what one more step adds (`ms_step`), and what a stage costs however long it is
(`ms_fixed`). `gap` is what is above the bare captured forward that computes the same, as a share of it,
`gap_of_step` the same of one more step, with the spread of it.
Memory, in GB: at most during the first stage, captures included, above what was held before; and what is held
after it. Launches and waits of all providers are counted at the calls in the first row, before anything else;
what the profiler sees of them comes late, in a process of its own.

The JSON is rewritten after every row. On a machine without a GPU, or with --dry, the eager providers run in
small on the CPU.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import record, timing
from benchmarks.record import Report
from benchmarks.stages import cases as c
from benchmarks.stages import profile as profiling
from benchmarks.stages.agreement import loss_agreement, tau_agreement
from benchmarks.stages.cases import BARE, SHORT, Case
from benchmarks.stages.models import make_model
from benchmarks.stages.profile import count_both, count_calls, count_changes
from benchmarks.stages.providers import Bench, makers, timed
from benchmarks.stages.rounds import Samples, fixed, gap_of_step, of_a_step, take_samples
from ffkernels.graphs import core as graphs

OF_CASE = ("model", "method", "rank", "length", "lengths", "evaluations")
AGREEMENT_SECONDS, LEAST_AGREEMENT_SECONDS, LEAST_PROFILE_SECONDS = 30.0, 8.0, 25.0


class Models:
    """The model of the last row, kept while rows ask for the same one."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._key: tuple = ()
        self._made: tuple[Any, str] = (None, "")

    def get(self, case: Case) -> tuple[torch.nn.Module, str]:
        key = (case.model, case.method, case.rank)
        if key != self._key:
            self.drop()
            self._made, self._key = make_model(*key[:1], self.device, self.dtype, *key[1:]), key
        return self._made

    def drop(self) -> None:
        self._made, self._key = (None, ""), ()
        release(self.device)


def release(device: torch.device) -> None:
    gc.collect()
    timing.wait(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_stage(make: Callable[[], Any], device: torch.device) -> tuple[Any, dict]:
    """The provider after its first stage, a short one, with what that took and the memory it needed."""
    release(device)
    on_gpu = device.type == "cuda"
    held = (0, 0)
    if on_gpu:
        held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    provider = make()
    try:
        seconds = timed(provider, SHORT, device)
    except BaseException:
        provider.close()
        raise
    found: dict[str, Any] = {"first_stage_seconds": seconds}
    captured = getattr(getattr(provider, "executor", None), "capture_seconds", None)
    if captured:
        found["capture_seconds"] = captured
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device) - held[0]
        torch.cuda.empty_cache()
        held_now = torch.cuda.memory_reserved(device) - held[1]
        found["gigabytes"] = {"peak": peak / 1e9, "held": held_now / 1e9}
    return provider, found


def measure(
    case: Case,
    model: torch.nn.Module,
    device: torch.device,
    deadline: float,
    end: float,
    count: Callable[[Case, dict[str, Any]], None] | None = None,
) -> dict:
    """One row: every provider's first stage, what `count` does with them, then rounds.

    Args:
        deadline, end: when, by the clock, the row and the benchmark should be over.
    """
    bench = Bench(case, model, device)
    row: dict[str, Any] = {
        "case": case.name,
        **{name: getattr(case, name) for name in OF_CASE},
        "tokens": bench.real_tokens(),
        "padded_tokens": sum(batch["input_ids"].numel() for batch in bench.batches),
        "micro_batches": [tuple(batch.input_ids.shape) for batch in bench.loss.forward.micro_batches],
        "moved_elements": bench.table.numel,
        "loss": {"ours": float(bench.loss.real_loss()), "model's own": bench.model_loss()},
        "providers": {},
        "missing": {"fast path": f"users do not get it: {bench.loss.refused}"} if bench.loss.refused else {},
    }
    if device.type == "cuda":
        row["gigabytes"] = torch.cuda.memory_allocated(device) / 1e9
    providers: dict[str, Any] = {}
    try:
        for name, make in makers(bench).items():
            try:
                providers[name], row["providers"][name] = first_stage(make, device)
            except Exception as error:  # one provider must not take the others along
                row["missing"][name] = record.reason(error)
        if count is not None:
            count(case, providers)
        now = time.perf_counter()
        samples, failed = take_samples(
            list(providers),
            case.evaluations,
            lambda name, evaluations: 1000 * timed(providers[name], evaluations, device),
            seconds=deadline - now,
            left=end - now,
        )
        for name, error in failed.items():
            row["missing"][name] = record.reason(error)
            del row["providers"][name]
        for name, taken in samples.items():
            below = None if c.floor(name) == name else samples.get(c.floor(name))
            row["providers"][name] |= milliseconds(taken, below)
        if BARE in samples:
            bench.prepare()
            providers[BARE].stage(1)
            row["loss"]["captured"] = float(providers[BARE].result)
            row["loss"]["ours"] = float(bench.loss.real_loss())
    finally:
        for provider in reversed(providers.values()):
            provider.close()
    return row


def milliseconds(taken: Samples, bare: Samples | None) -> dict[str, Any]:
    """Per evaluation of the long stage; of one more step; of a stage beside its steps; gaps over `bare`."""
    evaluations = max(taken)
    found: dict[str, Any] = {
        "ms_per_step": timing.summary([ms / evaluations for ms in taken[evaluations]]),
        "ms_step": of_a_step(taken),
        "ms_fixed": fixed(taken),
    }
    if bare is not None:
        found["gap"] = statistics.median(taken[evaluations]) / statistics.median(bare[evaluations]) - 1
        found["gap_of_step"] = gap_of_step(taken, bare)
    return found


def count_all(case: Case, providers: dict[str, Any], report: Report) -> None:
    """What each provider asks of the driver, at the calls: the graphs first, what is promised of them."""
    counts = report.result["counts"]
    counts |= {"case": case.name, "evaluations": case.evaluations, "providers": {}}
    first = [name for name in (c.STAGE, c.STEP) if name in providers]
    for name in (*first, *(name for name in providers if name not in first and not name.startswith(BARE))):
        counts["providers"][name] = {}

        def both(name: str = name) -> None:
            found, provider = counts["providers"][name], providers[name]
            found |= count_both(count_calls, provider, case.evaluations, report.device)
            if name in first:
                found["changed"] = count_changes(provider, case.evaluations, report.device)

        report.attempt(f"count of {name}", both)
        report.write()


def main() -> int:
    parser = record.parser("stages.bench", __doc__, out="runs/stages.json")
    report = record.Report(parser, rows=[], left_out=[], agreement={}, counts={})
    result, device, dry = report.result, report.device, report.dry
    models = Models(device, torch.float32 if dry else torch.bfloat16)
    cases = c.DRY_CASES if dry else c.CASES
    if dry:
        torch.set_num_threads(1)  # small work, which several threads only slow down on a busy machine
    else:
        # On a machine that was not asked before, the answer takes some seconds, which are no row's.
        report.attempt("small loop", lambda: graphs.why_no_stage_graph(device))
    end = report.begin + report.seconds
    for place, case in enumerate(cases):
        if place == (1 if dry else c.ROWS_BEFORE_AGREEMENT):
            models.drop()
            agreement(report, end)
        if place == c.ROWS_BEFORE_PROFILE and not dry:
            profile(report, end)
        if place and end - time.perf_counter() < case.seconds:
            result["left_out"].append(case.name)
            continue

        def row(case: Case = case, first: bool = not place) -> dict:
            deadline = time.perf_counter() + case.seconds
            model, weights = models.get(case)
            count = (lambda case, providers: count_all(case, providers, report)) if first else None
            return {"weights": weights, **measure(case, model, device, deadline, end, count)}

        found = report.attempt(case.name, row)
        release(device)
        if found is not None:
            result["rows"].append(found)
        report.write()
    models.drop()
    report.write()
    missing = [(row["case"], name, why) for row in result["rows"] for name, why in row["missing"].items()]
    return report.end([": ".join(one) for one in missing])


def profile(report: Report, end: float) -> None:
    """What the profiler sees, where there is time until `end`."""
    seconds = min(profiling.PROFILE_SECONDS, end - time.perf_counter())
    if seconds < LEAST_PROFILE_SECONDS:
        report.result["counts"]["failure"] = "no time was left for the profiler"
        return
    found = report.attempt("profile", lambda: profiling.profile_in_a_child(report.path, seconds))
    if found is not None:
        profiling.add_profile(report.result["counts"], *found)
    report.write()


def agreement(report: Report, end: float) -> None:
    """Losses and τ compared, the latter as often as there is time until `end`."""
    device, found = report.device, report.result["agreement"]
    name, length, stages, most = (c.TINY, 16, 2, 4) if report.dry else (c.SMOL, 64, 48, 256)
    found["loss"] = report.attempt("loss agreement", lambda: loss_agreement(name, length, device))
    report.write()
    left = max(LEAST_AGREEMENT_SECONDS, min(AGREEMENT_SECONDS, end - time.perf_counter()))
    taus = partial(tau_agreement, device, stages, left, most, graphs=not report.dry)
    found["tau"] = report.attempt("τ agreement", taus)
    report.write()


if __name__ == "__main__":
    sys.exit(main())
