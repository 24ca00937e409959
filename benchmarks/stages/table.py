"""The results of `stages/bench.py` as a table, and what was promised of captured stages beside it.

A promise is met, not met, or not resolved: where the spread of what was measured reaches over the limit, or
too few rounds were run, the numbers do not say. Imports nothing heavy.
"""

from __future__ import annotations

from benchmarks.stages.cases import (
    AUTHORS,
    CASES,
    CLEAN,
    EAGER,
    LEAST_ROUNDS,
    LLAMA,
    SMOL,
    STAGE,
    STEP,
    Case,
    floor,
    linear,
)
from benchmarks.tables import aligned, median_of, target

GRAPHS = (STAGE, STEP)
MOST_GAP, MOST_MEMORY, MOST_LOSS_DIFFERENCE, LEAST_SAME_TAU, LEAST_STAGES = 0.01, 0.35, 1e-5, 0.95, 40
LEAST_SPEED = {64: 3.0, 1024: 1.3}


def render_stages(result: dict) -> list[str]:
    """A line per case and provider."""
    rows: list[list[str]] = []
    for row in result["rows"]:
        share = row["tokens"] / row["padded_tokens"]
        planned = " + ".join(f"{n}×{length}" for n, length in row["micro_batches"])
        weights = f"{row['weights']} weights"
        weights += f" of {row['gigabytes']:.2f} GB" if "gigabytes" in row else ""
        rows.append(
            [
                f"-- {row['case']}, {row['evaluations']} evaluations per stage, {weights}, {row['tokens']} "
                f"tokens ({share:.0%} of the padded ones), planned as {planned}"
            ]
        )
        rows += [_provider(name, found) for name, found in row["providers"].items()]
        rows += [[f"{name}: left out: {reason}"] for name, reason in row["missing"].items()]
    head = ["provider", "ms per step", "peak GB", "held GB", "gap", "step ms", "gap of a step"]
    lines = [
        "",
        "stages: ms per evaluation, median [20 %, 80 %]; GB at most and held after the first stage; gap over",
        "the captured forward that computes the same; what one more step takes, and its gap [95 %] over so",
        "many rounds; what a stage takes beside its steps; the first stage, captures included",
        aligned([*head, "rounds", "fixed ms", "first s"], rows),
    ]
    if result["left_out"]:
        lines.append(f"-- no time was left for: {'; '.join(result['left_out'])}")
    lines += _render_counts(result["counts"])
    loss, tau = (result["agreement"].get(key) for key in ("loss", "tau"))
    if loss:
        values = ", ".join(f"{key} {value:.9f}" for key, value in loss.items() if isinstance(value, float))
        lines.append(f"-- float32 loss of {loss['model']} ({loss['weights']}): {values}")
    for name in GRAPHS:
        if tau and name in tau:
            cells = ", ".join(f"{key} {value}" for key, value in tau[name].items())
            lines.append(f"-- {name} beside eager on a {tau['dtype']} base: {cells}")
    return [*lines, *(f"error: {error}" for error in result["errors"])]


def _provider(name: str, found: dict) -> list[str]:
    memory, gap = found.get("gigabytes", {}), found.get("gap_of_step")
    cells = [name, median_of(found["ms_per_step"])]
    cells += [f"{memory[key]:.3f}" if key in memory else "" for key in ("peak", "held")]
    cells += [f"{found['gap']:.1%}" if "gap" in found else "", f"{found['ms_step']:.3f}"]
    cells += [_interval(gap) if gap else "", str(found["ms_per_step"]["samples"])]
    return [*cells, f"{found['ms_fixed']:.2f}", f"{found['first_stage_seconds']:.2f}"]


def _interval(gap: dict) -> str:
    spread = f" [{gap['low']:.2%}, {gap['high']:.2%}]" if "low" in gap else ""
    return f"{gap['value']:.2%}{spread}"


def _kinds(kinds: dict, step: dict | None = None) -> str:
    return ", ".join(f"{kind} {n:g}" + (f" (+{step[kind]:g})" if step else "") for kind, n in kinds.items())


def _render_counts(counts: dict) -> list[str]:
    lines = []
    for name, found in counts.get("providers", {}).items():
        profile = found.get("profile", {})
        if not lines:
            lines.append(
                f"-- {counts.get('case')}: at the calls of a stage of {counts.get('evaluations')} evaluations"
                " (and what one more step adds)"
            )
        if "stage" in found:
            lines.append(f"{name:22}{_kinds(found['stage'], found['step'])}")
        lines += [f"{'':4}{what}: {_kinds(kinds)}" for what, kinds in found.get("changed", {}).items()]
        if "stage" in profile:
            evaluations = counts["profiled evaluations"]
            cells = _kinds(profile["stage"], profile["step"])
            lines.append(f"{'':4}by the profiler, {evaluations} evaluations: {cells}")
        elif profile:
            lines.append(f"{'':4}not profiled: {profile['missing']}")
    return lines + ([f"-- profiler: {counts['failure']}"] if "failure" in counts else [])


def stage_targets(result: dict) -> list[dict]:
    """What was promised of captured stages, each with what was measured. Empty for a dry run.

    `verdict` says "met", "not met", "not resolved" or "not measured"; `met` is True for the first alone.
    """
    if result["dry"]:
        return []
    promised = [*_counts(result), *_overhead(result), *_speed(result), *_memory(result), *_agreement(result)]
    return [target(*one) for one in promised]


def judged(gap: dict, limit: float) -> str:
    """Whether a gap is within the limit, as far as its spread lets one say."""
    if gap.get("rounds", 0) < LEAST_ROUNDS or gap["low"] <= limit < gap["high"]:
        return "not resolved"
    return "met" if gap["high"] <= limit else "not met"


def _counts(result: dict):
    """Counted at the calls; launches besides graphs by the profiler too, where it lived through the stage."""
    providers = result["counts"].get("providers", {})
    one, whole = "1 graph launch per Fast Forward step", "1 graph launch and 1 host sync per stage"
    promises = (
        (STEP, "step", f"{one} and nothing else", {"graphs": 1}),
        (STAGE, "stage", f"{whole} like the one before", {"graphs": 1, "waits": 1}),
    )
    for name, per, promise, wanted in promises:
        found, what = providers.get(name, {}), f"{name}: {promise}"
        if per not in found:
            yield what, "not measured", ""
            continue
        kinds, profile = found[per], found.get("profile", {})
        met = kinds["operators"] == 0 and all(kinds.get(kind) == n for kind, n in wanted.items())
        said = [_kinds(kinds)]
        if per == "stage":
            said += [f"{change}: {_kinds(of)}" for change, of in found.get("changed", {}).items()]
        if per in profile:
            met = met and profile[per]["launches"] == 0
            said.append(f"by the profiler: {_kinds(profile[per])}")
        elif profile:
            said.append(f"not profiled: {profile['missing']}")
        yield what, met, "; ".join(said)


def _row(result: dict, case: Case) -> dict | None:
    return next((row for row in result["rows"] if row["case"] == case.name), None)


def _first(model: str, length: int) -> Case:
    return next(case for case in CASES if (case.model, case.length) == (model, length))


def _median(row: dict, name: str) -> float | None:
    found = row["providers"].get(name)
    return None if found is None else found["ms_per_step"]["median"]


def _graph(row: dict | None) -> str:
    """The graph that users of the row's machine get: without loops on the device it is the step graph."""
    found = () if row is None else row["providers"]
    return next((name for name in GRAPHS if name in found), STAGE)


def _overhead(result: dict):
    """Of the default search, and of the linear one, each over the bare forward that computes the same."""
    row = _row(result, _first(SMOL, 256))
    for name in (*GRAPHS, *map(linear, GRAPHS)):
        what = f"{name}, {SMOL} 32×256: a step at most {MOST_GAP:.0%} over the {floor(name)}"
        found = {} if row is None else row["providers"].get(name, {})
        gap = found.get("gap_of_step")
        if gap is None:
            yield what, "not measured", ""
        else:
            beside = f"{found['gap']:.2%} with the stage's fixed {found['ms_fixed']:.2f} ms"
            yield what, judged(gap, MOST_GAP), f"{_interval(gap)} ({beside})"


def _speed(result: dict):
    for row in result["rows"]:
        least = LEAST_SPEED.get(row["length"])
        if least is None or row["lengths"] != "mixed":
            continue
        theirs, ours = _median(row, AUTHORS), _median(row, _graph(row))
        what = f"{row['case']}: at least {least}× as fast as the authors' way"
        if theirs is None or ours is None:
            yield what, "not measured", ""
        else:
            clean = _median(row, CLEAN)
            beside = "" if clean is None else f" (clean eager: {clean / ours:.2f}×)"
            yield what, theirs / ours >= least, f"{theirs / ours:.2f}×{beside}"
    measured = {(row["model"], row["length"]) for row in result["rows"]}
    for length, least in LEAST_SPEED.items():
        if (SMOL, length) not in measured:
            yield f"{SMOL} 32×{length}: at least {least}× as fast as the authors' way", "not measured", ""


def _memory(result: dict):
    what = f"{LLAMA} 32×1024: peak memory of the validation at most {MOST_MEMORY} of clean eager"
    row = _row(result, _first(LLAMA, 1024))
    found = {} if row is None else row["providers"]
    peaks = {name: one.get("gigabytes", {}).get("peak") for name, one in found.items()}
    for name in (EAGER, _graph(row)):
        ours, clean = peaks.get(name), peaks.get(CLEAN)
        if clean is None or ours is None:
            yield f"{what}, {name}", "not measured", ""
        else:
            sizes = f"{ours:.2f} of {clean:.2f} GB"
            yield f"{what}, {name}", ours <= MOST_MEMORY * clean, f"{ours / clean:.3f} ({sizes})"


def _agreement(result: dict):
    what = f"float32 loss equal to the model's own within {MOST_LOSS_DIFFERENCE:g}, captured too"
    loss = result["agreement"].get("loss")
    if not loss or "captured" not in loss:
        yield what, "not measured", ""
    else:
        difference = loss["largest_difference"]
        yield what, difference <= MOST_LOSS_DIFFERENCE, f"{difference:.2e}"
    tau = result["agreement"].get("tau") or {}
    for name in GRAPHS:
        what = f"{name}: τ of eager in {LEAST_SAME_TAU:.0%} of at least {LEAST_STAGES} bf16 stages"
        found = tau.get(name)
        if found is None:
            yield what, "not measured", tau.get("refused", {}).get(name, "")
            continue
        enough = found["stages"] >= LEAST_STAGES
        met = found["same_tau"] >= LEAST_SAME_TAU * found["stages"]
        yield what, met if enough else "not resolved", f"{found['same_tau']} of {found['stages']}"
