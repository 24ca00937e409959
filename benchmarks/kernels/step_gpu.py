"""`step_` with its checkpoint on a GPU, beside what one would otherwise use, in one interleaved run.

    python -m benchmarks.kernels.step_gpu --out results.json [--seconds 180] [--dry]

Every side does best ← W ; W ← W + Δ for a whole set of adapter tensors, and is first checked to do it. The
bytes that must move are 4N: W and Δ read, W and best written. GB/s counts these for everybody, whatever a
side really moves; the pair of `_foreach` calls moves 5N. `copy` is the ceiling: one plain copy of as many
bytes. On a machine without a GPU, or with --dry, the same runs in small on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import record
from benchmarks.kernels.sets import AdapterSet, all_sets, dry_sets
from benchmarks.kernels.step import Compiled, Foreach, Loop, Ours
from benchmarks.timing import copy_bandwidth, count_launches, interleave, summary, timer_for
from ffkernels import ops

LOOP, FOREACH, COMPILED, COPY = "torch loop", "_foreach pair", "compiled flat pair", "copy (ceiling)"
OTHER_OPS_ON = ("Pythia-1.4B r=8", "Llama-3-8B r=64")


def sides(chosen: AdapterSet, device: torch.device, dry: bool) -> tuple[dict[str, Foreach], dict[str, str]]:
    """Who does it, by name, and why some are missing."""
    makers: dict[str, Callable] = {LOOP: Loop, FOREACH: Foreach, COMPILED: Compiled}
    for impl in ("triton", "cuda") if device.type == "cuda" else ("cpp", "triton", "cuda"):
        makers[impl] = partial(Ours, impl=impl)
    missing = {COMPILED: "a dry run does not compile"} if dry else {}
    found = {}
    for name, make in makers.items():
        try:
            if name not in missing:
                found[name] = make(chosen.shapes, device)
        except Exception as error:  # whatever a missing or mismatched compiler may raise
            missing[name] = record.reason(error)
    return found, missing


def is_right(side: Foreach) -> bool:
    """Whether the call does best ← W ; W ← W + Δ, bit for bit."""
    before = [weight.clone() for weight in side.weights]
    for kept in side.best:
        kept.fill_(float("nan"))
    side()
    return all(
        torch.equal(kept, old) and torch.equal(weight, old + change)
        for weight, change, kept, old in zip(side.weights, side.deltas, side.best, before, strict=True)
    )


def timed(calls: dict[str, tuple[Callable, int]], device: torch.device, seconds: float, modes=None) -> dict:
    """Of calls and the bytes that each must move: launches, microseconds and GB/s in every mode."""
    launches = {name: count_launches(call, device) for name, (call, _) in calls.items() if name != COPY}
    plain = {name: call for name, (call, _) in calls.items()}
    taken = interleave(timer_for(device), plain, seconds, modes=modes, launches=launches)
    found = {}
    for name, by in taken.items():
        times = {mode: summary(samples) for mode, samples in by.items()}
        rates = {mode: calls[name][1] / one["median"] / 1000 for mode, one in times.items()}
        found[name] = {"launches": launches.get(name), "microseconds": times, "gb_per_s": rates}
    return found


def measure(chosen: AdapterSet, device: torch.device, seconds: float, dry: bool) -> dict:
    """One set: who is right, how many launches, how long in every mode."""
    every, missing = sides(chosen, device, dry)
    wrong = [name for name, side in every.items() if not is_right(side)]
    missing |= dict.fromkeys(wrong, "gave a wrong result, so it is not timed")
    nbytes = 4 * chosen.numel
    source = torch.ones(2 * chosen.numel, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    calls = {name: (side, 4 * nbytes) for name, side in every.items() if name not in wrong}
    calls[COPY] = (lambda: target.copy_(source), 4 * nbytes)
    return {
        "set": chosen.name,
        "tensors": len(chosen.shapes),
        "elements": chosen.numel,
        "dtypes": 1,
        "bytes_of_weights": nbytes,
        "sides": timed(calls, device, seconds),
        "missing": missing,
        "wrong": wrong,
    }


def measure_other_ops(chosen: AdapterSet, device: torch.device, seconds: float) -> dict:
    """The remaining moves, which have no single peer: against the bytes that each must move."""
    refuse = torch.zeros(1, dtype=torch.int32, device=device)
    zero = torch.zeros(1, dtype=torch.float32, device=device)
    sums = torch.empty(3, dtype=torch.float64, device=device)
    calls: dict[str, tuple[Callable, int]] = {}
    for impl in ("triton", "cuda"):
        try:
            one = Ours(chosen.shapes, device, impl)
        except (RuntimeError, ValueError):
            continue
        grads, nbytes = one.deltas, 4 * chosen.numel
        for name, parts, call in (
            ("step_ accepted", 4, one),
            ("step_ refused", 3, lambda one=one: ops.step_(one.table, refuse, one.k)),
            ("step_ restore", 2, lambda one=one: ops.step_(one.table, refuse, zero)),
            ("delta_", 4, lambda one=one: ops.delta_(one.table)),
            ("checkpoint_", 2, lambda one=one: ops.checkpoint_(one.table)),
            ("align_", 4, lambda one=one, grads=grads: ops.align_(one.table, grads, sums)),
        ):
            calls[f"{impl} {name}"] = call, parts * nbytes
    found = timed(calls, device, seconds, ("graph cold", "graph warm"))
    return {"set": chosen.name, "ops": {n: {**op, "bytes": calls[n][1]} for n, op in found.items()}}


def main() -> int:
    parser = record.parser("kernels.step_gpu", __doc__, out="runs/step_gpu.json")
    report = record.Report(parser, sets=[], other_ops=[])
    result, device, dry = report.result, report.device, report.dry
    size = 1 << (24 if dry else 30)
    result["copy_gb_per_s"] = {"bytes": size, "value": copy_bandwidth(device, size)}
    chosen = dry_sets() if dry else all_sets()
    share = report.seconds / (len(chosen) + (0 if dry else len(OTHER_OPS_ON) / 2))

    def one_set(one: AdapterSet) -> None:
        result["sets"].append(measure(one, device, 0.3 if dry else share * 0.6, dry))
        if one.name in OTHER_OPS_ON and not dry:
            result["other_ops"].append(measure_other_ops(one, device, share * 0.3))

    for one in chosen:
        report.attempt(one.name, partial(one_set, one))
        if not dry:
            torch.cuda.empty_cache()
        report.write()
    return report.end([f"{s['set']}: wrong results from {s['wrong']}" for s in result["sets"] if s["wrong"]])


if __name__ == "__main__":
    sys.exit(main())
