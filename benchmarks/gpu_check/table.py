"""The results of a part of the GPU check as tables, and what was promised beside what was measured."""

from __future__ import annotations

from benchmarks.end_to_end.table import end_to_end_targets, render_end_to_end
from benchmarks.learning_rate.check_table import rate_targets, render_rates
from benchmarks.stages.table import render_stages, stage_targets
from benchmarks.tables import aligned, median_of, target

OURS = ("triton", "cuda")
PAIR, COMPILED = "_foreach pair", "compiled flat pair"


def render(result: dict) -> str:
    """What was measured, what had been promised, and what came of each stage."""
    lines: list[str] = []
    for name, (table, _) in TABLES.items():
        if name in result:
            lines += table(result[name])
    if result["targets"]:
        lines.append("-- promised and measured")
        lines += [f"{verdict(one):13}{one['what']}: {one['measured']}" for one in result["targets"]]
    lines += ["", result["command"] + described(result["provenance"])]
    return "\n".join([*lines, *map(stage_line, result["stages"])])


def stage_line(done: dict) -> str:
    return f"{done['stage']:14} {done['status']:8} {done['seconds']:6.1f} s  {done['said']}".rstrip()


def verdict(one: dict) -> str:
    return one.get("verdict") or ("met" if one["met"] else "NOT MET")


def described(provenance: dict | None) -> str:
    if provenance is None:
        return ", on an unknown machine"
    where = provenance["gpu"]["name"] if "gpu" in provenance else provenance["machine"]["cpu"]
    versions = provenance["versions"]
    kernels = [name for name, found in provenance["implementations"].items() if found["ok"]]
    return f", on {where}; torch {versions['torch']}, Triton {versions['triton']}; ops: {', '.join(kernels)}"


def targets_of(name: str, numbers: dict) -> list[dict]:
    """What the benchmark of this name had to show, each with what was measured."""
    return TABLES[name][1](numbers)


def render_steps(benchmark: dict) -> list[str]:
    """A line per set and side, a column per mode."""
    errors = [f"error: {error}" for error in benchmark["errors"]]
    if not benchmark["sets"]:
        return errors
    modes = list(next(iter(benchmark["sets"][0]["sides"].values()))["microseconds"])
    main, copy = modes[0], benchmark["copy_gb_per_s"]
    rows: list[list[str]] = []
    for one in benchmark["sets"]:
        rows.append([f"-- {one['set']}: {one['tensors']} tensors, {one['bytes_of_weights'] / 1e6:.1f} MB"])
        pair = one["sides"].get(PAIR)
        for name, side in one["sides"].items():
            rate = side["gb_per_s"][main]
            rows.append([name, "" if side["launches"] is None else str(side["launches"])])
            rows[-1] += [median_of(side["microseconds"][mode]) for mode in modes]
            rows[-1] += [f"{rate:.0f}", f"{rate / copy['value']:.2f}"]
            rows[-1] += ["" if pair is None else f"{ratio(side, pair, main):.2f}"]
        rows += [[f"{name}: left out: {reason}"] for name, reason in one["missing"].items()]
    for one in benchmark["other_ops"]:
        rows.append([f"-- {one['set']}: every move; its launches, and µs and GB/s in each mode"])
        for name, op in one["ops"].items():
            times = {mode: by["median"] for mode, by in op["microseconds"].items()}
            each = (f"{mode} {us:.1f}, {op['gb_per_s'][mode]:.0f}" for mode, us in times.items())
            rows.append([f"{name}: {op['launches']}; {'; '.join(each)}"])
    head = ["side", "launches", *(f"{mode} µs" for mode in modes), "GB/s", "of copy", "of pair"]
    return [
        "",
        f"step_ with checkpoint: median [20 %, 80 %]; GB/s of the 4N that must move, in '{main}';",
        f"this device copies {copy['bytes'] >> 20} MiB at {copy['value']:.0f} GB/s",
        aligned(head, rows),
        *errors,
    ]


def ratio(side: dict, other: dict, mode: str) -> float:
    return side["microseconds"][mode]["median"] / other["microseconds"][mode]["median"]


def targets(benchmark: dict) -> list[dict]:
    """What the kernels have to reach on a GPU, each with what was measured. Empty for a dry run."""
    found = []
    for one in benchmark["sets"] if not benchmark["dry"] else ():
        for impl in OURS:
            side, label = one["sides"].get(impl), f"{impl}, {one['set']}"
            if side is None:
                found.append(
                    target(f"{impl} runs on {one['set']}", False, one["missing"].get(impl, "absent"))
                )
                continue
            launches = side["launches"]
            said = f"{launches} launches"
            found.append(target(f"{label}: one launch per dtype", launches == one["dtypes"], said))
            for what, value, limit in ratios(one, side, benchmark["copy_gb_per_s"]["value"]):
                met = value >= limit if "at least" in what else value <= limit
                found.append(target(f"{label}: {what} {limit:.2f}", met, f"{value:.3f}"))
    return found


def ratios(one: dict, side: dict, copy: float):
    """(what is promised, the value measured, its limit)"""
    pair, compiled = one["sides"].get(PAIR), one["sides"].get(COMPILED)
    if one["set"] == "Llama-3-8B r=64":
        yield "share of copy bandwidth, cold, at least", side["gb_per_s"]["graph cold"] / copy, 0.90
        if pair:
            yield "time of the pair, cold, at most", ratio(side, pair, "graph cold"), 0.85
    if one["set"] == "Pythia-1.4B r=8" and pair:
        yield "time of the pair, graph replay, at most", ratio(side, pair, "graph warm"), 0.60
    for mode in side["microseconds"] if compiled else ():
        # 3 %: two measurements of the same code differ by as much.
        yield f"time of the compiled flat pair, {mode}, at most", ratio(side, compiled, mode), 1.03


# Of each benchmark the check runs: its table, and its promises.
TABLES = {
    "bench-stage": (render_stages, stage_targets),
    "bench-step": (render_steps, targets),
    "learning-rate": (render_rates, rate_targets),
    "end-to-end": (render_end_to_end, end_to_end_targets),
}
