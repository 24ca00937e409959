"""A Fast Forward stage as a whole: our three executors beside what one would otherwise run.

    python benchmarks/bench_stage.py --out results.json [--seconds 180] [--dry]

Rows are cases (`stage_cases.py`), columns are providers (`stage_providers.py`), all interleaved: a stage of
each in turn, in an order drawn anew, round after round, from the same weights and the same Δ. A stage is
timed from an idle device to an idle device by the host's clock and divided by its evaluations: milliseconds
per Fast Forward step. A stage of two evaluations beside it tells what one more step adds (`step`), and what a
stage costs however long it is (`fixed`). `gap` is what is above the bare captured forward, as a share of it.
Memory is what the allocator holds at most during the first stage, captures included, above what it held
before. Launches and host synchronisations are counted by the profiler in stages of their own.

The JSON is rewritten after every row. On a machine without a GPU, or with --dry, the eager providers run in
small on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from stage_agreement import loss_agreement, tau_agreement  # noqa: E402
from stage_cases import CASES, DRY_CASES, SMOL, TINY, Case, make_model  # noqa: E402
from stage_profile import counts_of_a_child  # noqa: E402
from stage_providers import BARE, SHORT, Bench, makers, timed  # noqa: E402
from timing import summary, write_json  # noqa: E402

from ffkernels.engine import graphs  # noqa: E402

MOST_ROUNDS, LEAST_ROUNDS, MOST_SHARE = 40, 3, 0.3
ROWS_FIRST = 3  # those of SmolLM2; then counts and agreement, then the rest
AGREEMENT_SECONDS, LEAST_AGREEMENT_SECONDS = 30.0, 8.0


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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def first_stage(make: Any, case: Case, device: torch.device) -> tuple[Any, dict]:
    """The provider after its first stage, with what that took and the memory it needed."""
    release(device)
    on_gpu = device.type == "cuda"
    held = (0, 0)
    if on_gpu:
        held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    provider = make()
    try:
        seconds = timed(provider, case.evaluations, device)
    except BaseException:
        provider.close()
        raise
    found: dict[str, Any] = {"first_stage_seconds": seconds}
    captured = getattr(getattr(provider, "executor", None), "capture_seconds", None)
    if captured:
        found["capture_seconds"] = captured
    if on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - held[0]
        torch.cuda.empty_cache()
        found["held_bytes"] = torch.cuda.memory_reserved(device) - held[1]
    return provider, found


def measure(case: Case, model: torch.nn.Module, device: torch.device, deadline: float) -> dict:
    """One row: every provider's first stage, then rounds until the deadline."""
    bench = Bench(case, model, device)
    row: dict[str, Any] = {
        "case": case.name,
        "model": case.model,
        "method": case.method,
        "rank": case.rank,
        "length": case.length,
        "lengths": case.lengths,
        "evaluations": case.evaluations,
        "tokens": bench.real_tokens(),
        "padded_tokens": sum(batch["input_ids"].numel() for batch in bench.batches),
        "path": bench.loss.path,
        "moved_elements": bench.table.numel,
        "loss": {"ours": float(bench.loss.real_loss()), "model's own": bench.model_loss()},
        "providers": {},
        "missing": {},
    }
    providers: dict[str, Any] = {}
    try:
        for name, make in makers(bench).items():
            try:
                providers[name], row["providers"][name] = first_stage(make, case, device)
            except Exception as error:  # one provider must not take the others along
                row["missing"][name] = f"{type(error).__name__}: {str(error)[:500]}"
        samples: dict[str, dict[int, list[float]]] = {
            name: {case.evaluations: [], SHORT: []} for name in providers
        }
        draw, rounds = random.Random(0), 0
        while rounds < LEAST_ROUNDS or (time.perf_counter() < deadline and rounds < MOST_ROUNDS):
            for name in draw.sample(list(providers), len(providers)):
                spent = sum(map(sum, samples[name].values())) / 1000
                if rounds >= LEAST_ROUNDS and spent > MOST_SHARE * case.seconds:
                    continue  # a slow one must not take the time of all
                for evaluations, taken in samples[name].items():
                    taken.append(1000 * timed(providers[name], evaluations, device))
            rounds += 1
        for name, taken in samples.items():
            row["providers"][name] |= milliseconds(taken[case.evaluations], taken[SHORT], case.evaluations)
        if BARE in samples:
            floor = row["providers"][BARE]["ms_per_step"]["median"]
            for found in row["providers"].values():
                if "ms_per_step" in found:
                    found["gap"] = found["ms_per_step"]["median"] / floor - 1
                    found["gap_of_step"] = found["ms_step"] / floor - 1
            bench.prepare()
            providers[BARE].stage(1)
            row["loss"]["captured"] = float(providers[BARE].result)
            row["loss"]["ours"] = float(bench.loss.real_loss())
    finally:
        for provider in reversed(providers.values()):
            provider.close()
    return row


def milliseconds(long: list[float], short: list[float], evaluations: int) -> dict[str, Any]:
    """Per evaluation of the long stage; what one more step adds; what a stage costs beside its steps."""
    step = (statistics.median(long) - statistics.median(short)) / (evaluations - SHORT)
    return {
        "ms_per_step": summary([ms / evaluations for ms in long]),
        "ms_step": step,
        "ms_fixed": statistics.median(short) - SHORT * step,
    }


class Report:
    """The JSON, rewritten in one move whenever there is something new."""

    def __init__(self, path: Path, device: torch.device, dry: bool) -> None:
        self.path, self.begin = path, time.perf_counter()
        self.result: dict[str, Any] = {
            "device": str(device),
            "dry": dry,
            "rows": [],
            "left_out": [],
            "agreement": {},
            "counts": {},
            "errors": [],
        }

    def attempt(self, what: str, work: Any) -> Any:
        """The value of `work`, or None with the error on record: one failure must not end the rest."""
        value = None
        try:
            value = work()
        except Exception as error:
            self.result["errors"].append(f"{what}: {type(error).__name__}: {str(error)[:1000]}")
        print(f"{what}: at {time.perf_counter() - self.begin:.0f} s", flush=True)
        return value

    def write(self) -> None:
        self.result["seconds"] = time.perf_counter() - self.begin
        write_json(self.path, self.result)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every row")
    parser.add_argument("--seconds", type=float, default=180.0, help="time for everything")
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    dry = options.dry or not torch.cuda.is_available()
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    report = Report(options.out, device, dry)
    result, models = report.result, Models(device, torch.float32 if dry else torch.bfloat16)
    cases = DRY_CASES if dry else CASES
    if not dry:
        # On a machine that was not asked before, the answer takes some seconds, which are no row's.
        report.attempt("small loop", lambda: graphs.why_no_stage_graph(device))
    end = report.begin + options.seconds
    for place, case in enumerate(cases):
        if place == (1 if dry else ROWS_FIRST):
            agreement(report, models, device, dry, end)
        if place and end - time.perf_counter() < case.seconds:
            result["left_out"].append(case.name)
            continue

        def row(case: Case = case) -> dict:
            deadline = time.perf_counter() + case.seconds
            model, weights = models.get(case)
            return {"weights": weights, **measure(case, model, device, deadline)}

        found = report.attempt(case.name, row)
        release(device)
        if found is not None:
            result["rows"].append(found)
        report.write()
    models.drop()
    report.write()
    return finish(result)


def agreement(report: Report, models: Models, device: torch.device, dry: bool, end: float) -> None:
    """Launches counted, losses and τ compared, the latter as often as there is time until `end`."""
    if not dry:
        counts = report.attempt("counts", lambda: counts_of_a_child(report.path))
        report.result["counts"] = counts or {}
        report.write()
    models.drop()
    name, length, stages, most = (TINY, 16, 2, 4) if dry else (SMOL, 64, 48, 256)
    losses = report.attempt("loss agreement", lambda: loss_agreement(name, length, device))
    report.result["agreement"]["loss"] = losses
    report.write()
    left = max(LEAST_AGREEMENT_SECONDS, min(AGREEMENT_SECONDS, end - time.perf_counter()))
    taus = report.attempt("τ agreement", lambda: tau_agreement(device, stages, left, most, graphs=not dry))
    report.result["agreement"]["tau"] = taus
    report.write()


def finish(result: dict) -> int:
    failed = list(result["errors"])
    for row in result["rows"]:
        failed += [f"{row['case']}: {name}: {why}" for name, why in row["missing"].items()]
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
