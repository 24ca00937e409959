"""Ways to do one thing to a whole adapter set on the CPU, measured in turn: for `step` and `align`.

Every way is made from the shapes of a set, owns its tensors and is called without arguments. Float32, one
thread; warm and cold as ``timing`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import record, tables, timing
from benchmarks.kernels.sets import LLAMA, PYTHIA, Shapes, all_sets
from ffkernels.ops import native

Way = Callable[[], object]
Ways = dict[str, Callable[[Shapes], Way]]  # "ours" and its peers

ADAPTERS: dict[str, Shapes] = {one.name: one.shapes for one in all_sets() if one.name in (PYTHIA, LLAMA)}
KEYS = ("median", "p20", "p80")
# Other programs share the last-level cache, so a miss of a target is measured again.
TRIES = 3
ROUNDS = {PYTHIA: 31, LLAMA: 15}
# Before and during a warm timing the same way runs again and again; a large set is as cold either way.
CALLS = {PYTHIA: 10, LLAMA: 1}


def run_all(ways: dict[str, Way], check: Callable[[dict[str, Way]], None]) -> None:
    """Each once; ``check`` raises where they do not agree."""
    for way in ways.values():
        way()
    check(ways)


def measure(adapter: str, makers: Ways, check: Callable) -> dict[str, Any]:
    """Medians with the 20th and 80th percentiles in microseconds, and ours over each alternative."""
    ways = {name: make(ADAPTERS[adapter]) for name, make in makers.items()}
    run_all(ways, check)
    timer = timing.HostTimer(CALLS[adapter])
    samples = timing.interleave(timer, ways, 0.0, ROUNDS[adapter])
    elements = sum(weight.numel() for weight in ways["ours"].weights)
    result: dict = {"tensors": len(ADAPTERS[adapter]), "megabytes": elements * 4 / 1e6, "modes": {}}
    for mode in timer.modes:
        rows = {name: timing.summary(by[mode], unit="_us") for name, by in samples.items()}
        ours = rows["ours"]["median_us"]
        for row in rows.values():
            row |= {"ours_over_this": ours / row["median_us"], "rounds": row.pop("samples")}
        rows["ours"]["gigabytes_per_second"] = elements * 16 / ours / 1e3
        result["modes"][mode] = rows
    return result


def main(
    module: str,
    doc: str,
    makers: Ways,
    check: Callable,
    targets: dict[str, float],
    more: Callable[[Shapes], dict] = lambda shapes: {},
) -> int:
    """Print the table, and write the JSON where --out says so; ``more`` adds to a set's entry.

    Returns:
        1 where ours takes more of foreach's time, warm, than its target, in each of ``TRIES`` measurements.
    """
    name = f"{module.rpartition('.')[2]}_cpu"
    options = record.parser(module, doc, name=name).parse_args()
    torch.set_num_threads(1)
    head = record.provenance(module, instruction_set=native.isa(), targets=targets)
    found, missed = {}, []
    for adapter, shapes in ADAPTERS.items():
        ratios: list[float] = []
        while len(ratios) < TRIES and (not ratios or ratios[-1] > targets[adapter]):
            found[adapter] = measure(adapter, makers, check)
            ratios.append(found[adapter]["modes"]["warm"]["foreach"]["ours_over_this"])
        found[adapter] |= {"ratios": ratios, **more(shapes)}
        if ratios[-1] > targets[adapter]:
            missed.append(f"{adapter}: ours takes {ratios} of foreach's time, at most {targets[adapter]}")
    rows = [
        [adapter, mode, way, *(f"{row[f'{key}_us']:.1f}" for key in KEYS), f"×{row['ours_over_this']:.2f}"]
        for adapter, one in found.items()
        for mode, ways in one["modes"].items()
        for way, row in ways.items()
    ]
    print(tables.aligned(["set", "mode", "way", "median µs", "20 %", "80 %", "ours over it"], rows, 3))
    if options.out is not None:
        print(record.write({**head, "adapters": found}, options.out, name))
    print("\n".join(missed))
    return 1 if missed else 0


def shares_of_time(results: Mapping[str, Any], stem: str, head: list[str], others: list[str]) -> str:
    """Our time divided by that of each other way, warm and cold, from the newest result of this stem."""
    data = results[max(name for name in results if name.startswith(stem))]  # the names end with the date
    rows = [
        [
            name,
            *(f"{result['modes'][m][way]['ours_over_this']:.2f}" for m in ("warm", "cold") for way in others),
        ]
        for name, result in data["adapters"].items()
    ]
    return tables.markdown(head, rows)
