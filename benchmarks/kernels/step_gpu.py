"""`step_` with its checkpoint on a GPU, beside what one would otherwise use, in one interleaved run.

    python benchmarks/bench_step_gpu.py --out results.json [--seconds 180] [--dry]

Every side does best ← W ; W ← W + Δ for a whole set of adapter tensors, and is first checked to do it. The
bytes that must move are 4N: W and Δ read, W and best written. GB/s counts these for everybody, whatever a
side really moves; the pair of `_foreach` calls moves 5N. `copy` is the ceiling: one plain copy of as many
bytes. On a machine without a GPU, or with --dry, the same runs in small on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401  puts it on the path
import torch
from adapter_sets import AdapterSet, all_sets, dry_sets
from timing import GpuTimer, HostTimer, copy_bandwidth, count_launches, interleave, write_json

from ffkernels import ops

LOOP, FOREACH, COMPILED, COPY = "torch loop", "_foreach pair", "compiled flat pair", "copy (ceiling)"
OTHER_OPS_ON = ("Pythia-1.4B r=8", "Llama-3-8B r=64")


class Workload:
    """One set of weights, and everything the sides need to move it."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
        self.device = device
        torch.manual_seed(0)
        self.weights = [torch.randn(shape, device=device) for shape in shapes]
        # Small, so that thousands of steps stay finite.
        self.changes = [torch.randn(shape, device=device) * 1e-3 for shape in shapes]
        self.accept = torch.ones(1, dtype=torch.int32, device=device)
        self.refuse = torch.zeros(1, dtype=torch.int32, device=device)
        self.one = torch.ones(1, dtype=torch.float32, device=device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)
        self.nbytes = sum(weight.nbytes for weight in self.weights)

    def sides(self, dry: bool) -> tuple[dict[str, Callable], dict[str, Callable[[], bool]], dict[str, str]]:
        """Calls by name, a check for each that compares what it does, and why some are missing."""
        calls: dict[str, Callable] = {}
        checks: dict[str, Callable[[], bool]] = {}
        missing: dict[str, str] = {}

        best = [torch.empty_like(weight) for weight in self.weights]

        def loop() -> None:
            for weight, change, kept in zip(self.weights, self.changes, best, strict=True):
                kept.copy_(weight)
                weight.add_(change)

        def foreach() -> None:
            torch._foreach_copy_(best, self.weights)
            torch._foreach_add_(self.weights, self.changes)

        for name, call in ((LOOP, loop), (FOREACH, foreach)):
            calls[name] = call
            checks[name] = lambda call=call: moved(call, self.weights, self.changes, best)

        if dry:
            missing[COMPILED] = "a dry run does not compile"
        else:
            self._compiled(calls, checks, missing)
        for impl in ("triton", "cuda") if self.device.type == "cuda" else ("cpp", "triton", "cuda"):
            try:
                table = ops.TensorTable(self.weights, impl=impl)
            except (RuntimeError, ValueError) as error:
                missing[impl] = str(error)
                continue
            for delta, change in zip(table.deltas, self.changes, strict=True):
                delta.copy_(change)
            calls[impl] = lambda table=table: ops.step_(table, self.accept, self.one)
            checks[impl] = lambda call=calls[impl], table=table: moved(
                call, table.weights, table.deltas, table.best
            )
        return calls, checks, missing

    def _compiled(self, calls, checks, missing) -> None:
        flat = torch.cat([weight.reshape(-1) for weight in self.weights])
        change = torch.cat([delta.reshape(-1) for delta in self.changes])
        kept = torch.empty_like(flat)

        def pair(weight, change, kept) -> None:
            kept.copy_(weight)
            weight.add_(change)

        torch._dynamo.reset()
        compiled = torch.compile(pair, fullgraph=True, dynamic=False)
        try:
            compiled(flat, change, kept)
        except Exception as error:  # whatever a missing or mismatched compiler may raise
            missing[COMPILED] = f"{type(error).__name__}: {str(error)[:300]}"
            return
        calls[COMPILED] = lambda: compiled(flat, change, kept)
        checks[COMPILED] = lambda: moved(calls[COMPILED], [flat], [change], [kept])

    def ceiling(self) -> Callable:
        """A copy that reads and writes as many bytes as a step must: 4N in all."""
        source = torch.ones(2 * self.nbytes // 4, dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def other_ops(self, impl: str) -> dict[str, tuple[Callable, int]]:
        """Every move and the bytes it must move, in units of N."""
        table = ops.TensorTable(self.weights, impl=impl)
        sums = torch.empty(3, dtype=torch.float64, device=self.device)
        return {
            f"{impl} step_ accepted": (lambda: ops.step_(table, self.accept, self.one), 4),
            f"{impl} step_ refused": (lambda: ops.step_(table, self.refuse, self.one), 3),
            f"{impl} step_ restore": (lambda: ops.step_(table, self.refuse, self.zero), 2),
            f"{impl} delta_": (lambda: ops.delta_(table), 4),
            f"{impl} checkpoint_": (lambda: ops.checkpoint_(table), 2),
            f"{impl} align_": (lambda: ops.align_(table, self.changes, sums), 4),
        }


def moved(call: Callable, weights, changes, best) -> bool:
    """Whether the call does best ← W ; W ← W + Δ, bit for bit."""
    before = [weight.clone() for weight in weights]
    for kept in best:
        kept.fill_(float("nan"))
    call()
    return all(
        torch.equal(kept, old) and torch.equal(weight, old + change)
        for weight, change, kept, old in zip(weights, changes, best, before, strict=True)
    )


def measure(chosen: AdapterSet, device: torch.device, seconds: float, dry: bool) -> dict:
    """One set: who is right, how many launches, how long in every mode."""
    timer = GpuTimer(device) if device.type == "cuda" else HostTimer()
    work = Workload(chosen.shapes, device)
    calls, checks, missing = work.sides(dry)
    wrong = [name for name, check in checks.items() if not check()]
    for name in wrong:
        missing[name] = "gave a wrong result, so it is not timed"
        del calls[name]
    launches = {name: count_launches(call, device) for name, call in calls.items()}
    calls[COPY], launches[COPY] = work.ceiling(), None
    for name, call in calls.items():
        timer.prepare(name, call, launches[name])
    results = interleave(timer, calls, timer.modes, seconds)
    timer.forget()
    sides = {}
    for name, modes in results.items():
        sides[name] = {"launches": launches[name], "microseconds": modes}
        for mode, taken in modes.items():
            sides[name].setdefault("gb_per_s", {})[mode] = 4 * work.nbytes / taken["median"] / 1000
    return {
        "set": chosen.name,
        "tensors": len(chosen.shapes),
        "elements": chosen.numel,
        "dtypes": 1,
        "bytes_of_weights": work.nbytes,
        "sides": sides,
        "missing": missing,
        "wrong": wrong,
    }


def measure_other_ops(chosen: AdapterSet, device: torch.device, seconds: float) -> dict:
    """The remaining moves, which have no single peer: against the bytes that each must move."""
    timer = GpuTimer(device)
    work = Workload(chosen.shapes, device)
    found: dict[str, tuple[Callable, int]] = {}
    for impl in ("triton", "cuda"):
        try:
            found.update(work.other_ops(impl))
        except (RuntimeError, ValueError):
            continue
    launches = {name: count_launches(call, device) for name, (call, _) in found.items()}
    calls = {name: call for name, (call, _) in found.items()}
    for name, call in calls.items():
        timer.prepare(name, call, launches[name])
    modes = ("graph cold", "graph warm")
    results = interleave(timer, calls, modes, seconds)
    return {
        "set": chosen.name,
        "ops": {
            name: {
                "launches": launches[name],
                "bytes": found[name][1] * work.nbytes,
                "microseconds": taken,
                "gb_per_s": {
                    mode: found[name][1] * work.nbytes / taken[mode]["median"] / 1000 for mode in modes
                },
            }
            for name, taken in results.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every set")
    parser.add_argument("--seconds", type=float, default=150.0, help="time for the measurements in all")
    parser.add_argument("--dry", action="store_true", help="small sets on the CPU")
    options = parser.parse_args()
    dry = options.dry or not torch.cuda.is_available()
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    begin = time.perf_counter()
    result: dict = {"device": str(device), "dry": dry, "sets": [], "other_ops": [], "errors": []}
    size = 1 << (24 if dry else 30)
    result["copy_gb_per_s"] = {"bytes": size, "value": copy_bandwidth(device, size)}
    chosen = dry_sets() if dry else all_sets()
    share = options.seconds / (len(chosen) + (0 if dry else len(OTHER_OPS_ON) / 2))
    for one in chosen:
        try:
            result["sets"].append(measure(one, device, 0.3 if dry else share * 0.6, dry))
            if one.name in OTHER_OPS_ON and not dry:
                result["other_ops"].append(measure_other_ops(one, device, share * 0.3))
        except Exception as error:  # one set must not take the others along
            result["errors"].append(f"{one.name}: {type(error).__name__}: {error}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result["seconds"] = time.perf_counter() - begin
        write_json(options.out, result)
        print(f"{one.name}: {result['seconds']:.0f} s", flush=True)
    failed = result["errors"] + [
        f"{s['set']}: wrong results from {s['wrong']}" for s in result["sets"] if s["wrong"]
    ]
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
