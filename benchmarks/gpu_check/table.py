"""The results of a part of the GPU check as tables, and what was promised beside what was measured."""

from __future__ import annotations

from end_to_end_table import end_to_end_targets, render_end_to_end
from stage_table import render_stages, stage_targets

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
        for one in result["targets"]:
            lines.append(f"{verdict(one):13}{one['what']}: {one['measured']}")
    lines += ["", result["command"] + described(result["provenance"])]
    return "\n".join([*lines, *map(stage_line, result["stages"])])


def stage_line(done: dict) -> str:
    return f"{done['stage']:14} {done['status']:8} {done['seconds']:6.1f} s  {done['said']}".rstrip()


def verdict(target: dict) -> str:
    return target.get("verdict") or ("met" if target["met"] else "NOT MET")


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
    if not benchmark["sets"]:
        return [f"error: {error}" for error in benchmark["errors"]]
    modes = list(next(iter(benchmark["sets"][0]["sides"].values()))["microseconds"])
    copy = benchmark["copy_gb_per_s"]
    main = modes[0]
    head = f"{'side':20}{'launches':>9}" + "".join(f"{mode + ' µs':>26}" for mode in modes)
    lines = [
        "",
        f"step_ with checkpoint: median [20 %, 80 %]; GB/s of the 4N that must move, in '{main}';",
        f"this device copies {copy['bytes'] >> 20} MiB at {copy['value']:.0f} GB/s",
        head + f"{'GB/s':>8}{'of copy':>9}{'of pair':>9}",
    ]
    for one in benchmark["sets"]:
        lines.append(f"-- {one['set']}: {one['tensors']} tensors, {one['bytes_of_weights'] / 1e6:.1f} MB")
        pair = one["sides"].get(PAIR)
        for name, side in one["sides"].items():
            cells = f"{name:20}{'' if side['launches'] is None else side['launches']:>9}"
            for mode in modes:
                taken = side["microseconds"][mode]
                cells += f"{taken['median']:11.1f} [{taken['p20']:.1f}, {taken['p80']:.1f}]".rjust(26)
            rate = side["gb_per_s"][main]
            cells += f"{rate:8.0f}{rate / copy['value']:9.2f}"
            if pair is not None:
                cells += f"{ratio(side, pair, main):9.2f}"
            lines.append(cells)
        lines += [f"{name:20}left out: {reason}" for name, reason in one["missing"].items()]
    for one in benchmark["other_ops"]:
        lines.append(f"-- {one['set']}: every move")
        for name, op in one["ops"].items():
            cells = f"{name:28}{op['launches']:>3}"
            for mode, taken in op["microseconds"].items():
                cells += f"   {mode} {taken['median']:9.1f} µs {op['gb_per_s'][mode]:6.0f} GB/s"
            lines.append(cells)
    return [*lines, *(f"error: {error}" for error in benchmark["errors"])]


def ratio(side: dict, other: dict, mode: str) -> float:
    return side["microseconds"][mode]["median"] / other["microseconds"][mode]["median"]


def targets(benchmark: dict) -> list[dict]:
    """What the kernels have to reach on a GPU, each with what was measured. Empty for a dry run."""
    if benchmark["dry"]:
        return []
    found = []
    for one in benchmark["sets"]:
        for impl in OURS:
            side = one["sides"].get(impl)
            if side is None:
                found.append(
                    target(f"{impl} runs on {one['set']}", False, one["missing"].get(impl, "absent"))
                )
                continue
            found.append(
                target(
                    f"{impl}, {one['set']}: one launch per dtype",
                    side["launches"] == one["dtypes"],
                    f"{side['launches']} launches",
                )
            )
            found += [
                target(what, value <= most if most else value >= least, f"{value:.3f}")
                for what, value, least, most in ratios(one, impl, side, benchmark["copy_gb_per_s"]["value"])
            ]
    return found


def ratios(one: dict, impl: str, side: dict, copy: float):
    """(what, measured, at least, at most)"""
    label, pair = f"{impl}, {one['set']}", one["sides"].get(PAIR)
    if one["set"] == "Llama-3-8B r=64":
        rate = side["gb_per_s"]["graph cold"] / copy
        yield f"{label}: share of copy bandwidth, cold, at least 0.90", rate, 0.90, None
        if pair:
            yield (
                f"{label}: time of the pair, cold, at most 0.85",
                ratio(side, pair, "graph cold"),
                None,
                0.85,
            )
    if one["set"] == "Pythia-1.4B r=8" and pair:
        yield (
            f"{label}: time of the pair, graph replay, at most 0.60",
            ratio(side, pair, "graph warm"),
            None,
            0.6,
        )
    if one["sides"].get(COMPILED):
        for mode in ("graph cold", "graph warm", "eager cold", "eager warm"):
            # 3 %: two measurements of the same code differ by as much.
            value = ratio(side, one["sides"][COMPILED], mode)
            yield f"{label}: time of the compiled flat pair, {mode}, at most 1.03", value, None, 1.03


def target(what: str, met: bool, measured: str) -> dict:
    return {"what": what, "met": bool(met), "measured": measured}


# Of each benchmark the check runs: its table, and its promises.
TABLES = {
    "bench-stage": (render_stages, stage_targets),
    "bench-step": (render_steps, targets),
    "end-to-end": (render_end_to_end, end_to_end_targets),
}
