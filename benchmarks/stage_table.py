"""The results of `bench_stage.py` as a table, and what was promised of captured stages beside it."""

from __future__ import annotations

from stage_cases import CASES, LLAMA, SMOL, Case
from stage_providers import AUTHORS, CLEAN, EAGER, STAGE, STEP

GRAPHS = (STAGE, STEP)
MOST_GAP, MOST_MEMORY, MOST_LOSS_DIFFERENCE, LEAST_SAME_TAU, LEAST_STAGES = 0.01, 0.35, 1e-5, 0.95, 40
LEAST_SPEED = {64: 3.0, 1024: 1.3}


def render_stages(result: dict) -> list[str]:
    """A line per case and provider."""
    lines = [
        "",
        "stages: ms per evaluation, median [20 %, 80 %], and its gap above the captured forward; what one",
        "more step takes, and its gap; what a stage takes beside its steps; memory at most and after it;",
        "first stage, captures included",
        f"{'provider':20}{'ms per step':>28}{'gap':>9}{'step ms':>10}{'gap':>9}{'fixed ms':>10}"
        f"{'peak MiB':>10}{'held MiB':>10}{'first s':>9}",
    ]
    for row in result["rows"]:
        share = row["tokens"] / row["padded_tokens"]
        lines.append(
            f"-- {row['case']}, {row['evaluations']} evaluations per stage, {row['weights']} weights, "
            f"{row['tokens']} tokens ({share:.0%} of the padded ones)"
        )
        for name, found in row["providers"].items():
            taken = found["ms_per_step"]
            cells = f"{taken['median']:.3f} [{taken['p20']:.3f}, {taken['p80']:.3f}]"
            line = f"{name:20}{cells:>28}"
            line += f"{found['gap']:9.1%}" if "gap" in found else f"{'':9}"
            line += f"{found['ms_step']:10.3f}"
            line += f"{found['gap_of_step']:9.1%}" if "gap" in found else f"{'':9}"
            line += f"{found['ms_fixed']:10.2f}"
            for key in ("peak_bytes", "held_bytes"):
                line += f"{found[key] / 2**20:10.0f}" if key in found else f"{'':10}"
            lines.append(line + f"{found['first_stage_seconds']:9.2f}")
        lines += [f"{name:20}left out: {reason}" for name, reason in row["missing"].items()]
    if result["left_out"]:
        lines.append(f"-- no time was left for: {'; '.join(result['left_out'])}")
    lines += _render_counts(result["counts"])
    loss, tau = (result["agreement"].get(key) for key in ("loss", "tau"))
    if loss:
        values = ", ".join(f"{key} {value:.9f}" for key, value in loss.items() if isinstance(value, float))
        lines.append(f"-- float32 loss of {loss['model']} ({loss['weights']}): {values}")
    if tau:
        for name in GRAPHS:
            if name in tau:
                cells = ", ".join(f"{key} {value}" for key, value in tau[name].items())
                lines.append(f"-- {name} beside eager on a {tau['dtype']} base: {cells}")
    return [*lines, *(f"error: {error}" for error in result["errors"])]


def _render_counts(counts: dict) -> list[str]:
    if not counts.get("providers"):
        return [f"-- nothing was counted: {counts['failure']}"] if "failure" in counts else []
    stage = f"a stage of {counts['evaluations']} evaluations"
    lines = [f"-- {counts['case']}: in {stage} (and what one more step adds)"]
    for name, found in counts["providers"].items():
        cells = [
            f"{kind} {value} (+{found['step'][kind]:g})" for kind, value in found.get("stage", {}).items()
        ]
        cells += [f"not profiled: {found['missing']}"] if "missing" in found else []
        lines.append(f"{name:20}{', '.join(cells)}")
    return lines


def stage_targets(result: dict) -> list[dict]:
    """What was promised of captured stages, each with what was measured. Empty for a dry run."""
    if result["dry"]:
        return []
    found = [*_counts(result), *_overhead(result), *_speed(result), *_memory(result), *_agreement(result)]
    return [{"what": what, "met": bool(met), "measured": measured} for what, met, measured in found]


def _counts(result: dict):
    """Graphs by our own count; launches besides them by the profiler, where it lived through the stage."""
    providers = result["counts"].get("providers", {})
    promises = (
        (STEP, "step", "1 launch per Fast Forward step", ("graphs",)),
        (STAGE, "stage", "1 launch and 1 host sync per stage", ("graphs", "waits")),
    )
    for name, per, promise, ones in promises:
        found = providers.get(name, {})
        if per not in found:
            yield f"{name}: {promise}", False, found.get("missing", "not measured")
            continue
        kinds = found[per]
        met = all(kinds[kind] == 1 for kind in ones) and kinds.get("launches", 0) == 0
        measured = ", ".join(f"{kind} {value:g}" for kind, value in kinds.items())
        yield f"{name}: {promise}", met, measured + (f" ({found['missing']})" if "missing" in found else "")


def _row(result: dict, case: Case) -> dict | None:
    return next((row for row in result["rows"] if row["case"] == case.name), None)


def _first(model: str, length: int) -> Case:
    return next(case for case in CASES if (case.model, case.length) == (model, length))


def _median(row: dict, name: str) -> float | None:
    found = row["providers"].get(name)
    return None if found is None else found["ms_per_step"]["median"]


def _overhead(result: dict):
    row = _row(result, _first(SMOL, 256))
    for name in GRAPHS:
        what = f"{name}, {SMOL} 32×256: a step at most {MOST_GAP:.0%} over the bare captured forward"
        found = {} if row is None else row["providers"].get(name, {})
        gap = found.get("gap_of_step")
        if gap is None:
            yield what, False, "not measured"
        else:
            beside = f"{found['gap']:.2%} with the stage's fixed {found['ms_fixed']:.2f} ms"
            yield what, gap <= MOST_GAP, f"{gap:.2%} ({beside})"


def _speed(result: dict):
    """Of the stage graph; of the step graph where there is none."""
    for row in result["rows"]:
        least = LEAST_SPEED.get(row["length"])
        if least is None or row["lengths"] != "mixed":
            continue
        theirs = _median(row, AUTHORS)
        ours = next((value for name in GRAPHS if (value := _median(row, name)) is not None), None)
        what = f"{row['case']}: at least {least}× as fast as the authors' way"
        if theirs is None or ours is None:
            yield what, False, "not measured"
        else:
            clean = _median(row, CLEAN)
            beside = "" if clean is None else f" (clean eager: {clean / ours:.2f}×)"
            yield what, theirs / ours >= least, f"{theirs / ours:.2f}×{beside}"
    measured = {(row["model"], row["length"]) for row in result["rows"]}
    for length, least in LEAST_SPEED.items():
        if (SMOL, length) not in measured:
            yield f"{SMOL} 32×{length}: at least {least}× as fast as the authors' way", False, "not measured"


def _memory(result: dict):
    what = f"{LLAMA} 32×1024: peak memory of the validation at most {MOST_MEMORY} of clean eager"
    row = _row(result, _first(LLAMA, 1024))
    clean = None if row is None else row["providers"].get(CLEAN, {}).get("peak_bytes")
    for name in (EAGER, STAGE):
        ours = None if row is None else row["providers"].get(name, {}).get("peak_bytes")
        if clean is None or ours is None:
            yield f"{what}, {name}", False, "not measured"
        else:
            sizes = f"{ours / 2**20:.0f} of {clean / 2**20:.0f} MiB"
            yield f"{what}, {name}", ours <= MOST_MEMORY * clean, f"{ours / clean:.3f} ({sizes})"


def _agreement(result: dict):
    what = f"float32 loss equal to the model's own within {MOST_LOSS_DIFFERENCE:g}, captured too"
    loss = result["agreement"].get("loss")
    met = bool(loss) and "captured" in loss and loss["largest_difference"] <= MOST_LOSS_DIFFERENCE
    yield what, met, f"{loss['largest_difference']:.2e}" if loss else "not measured"
    tau = result["agreement"].get("tau") or {}
    for name in GRAPHS:
        what = f"{name}: τ of eager in {LEAST_SAME_TAU:.0%} of at least {LEAST_STAGES} bf16 stages"
        found = tau.get(name)
        if found is None:
            yield what, False, tau.get("refused", {}).get(name, "not measured")
        else:
            met = found["stages"] >= LEAST_STAGES and found["same_tau"] >= LEAST_SAME_TAU * found["stages"]
            yield what, met, f"{found['same_tau']} of {found['stages']}"
