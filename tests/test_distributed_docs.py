"""docs/distributed.md quotes a committed result: its tables are made here again from that file."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
SAID = " ".join(TEXT.split())
NAME = "ranks_cpu_2026-11-21.json"
RESULTS = ROOT / "benchmarks" / "results"
SEARCHES = json.loads((RESULTS / "search_on_ranks_cpu_2026-11-21.json").read_text(encoding="utf-8"))
REPORT = json.loads((RESULTS / NAME).read_text(encoding="utf-8"))


def measured_rows() -> list[str]:
    rows = []
    for size, found in REPORT["ranks"].items():
        stages = found["stages"]
        cells = [
            size,
            found["slowest_rank"]["tokens"],
            found["slowest_rank"]["forwards"],
            f"{found['slowed_by_the_others']:.2f}",
            f"{found['exchange']['median_ms']:.2f}" if size != "1" else "",
            f"{found['validation']['median_ms']:.0f}",
            f"{found['predicted']['validation_ms']:.0f}",
            f"{sum(stage['milliseconds'] for stage in stages) / 1e3:.2f}",
            f"{sum(found['predicted']['stage_ms']) / 1e3:.2f}",
        ]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def planned_rows() -> list[str]:
    return [
        f"| {row['ranks']:,} | {row['gpu']['tokens']:,} | {row['gpu']['forwards']} "
        f"| {100 * row['gpu']['of_one_rank']:.0f} % |"
        for row in REPORT["plan"]
        if row["ranks"] in (1, 8, 16, 32, 64, 1024)
    ]


def test_the_tables_are_those_of_the_result_file():
    assert NAME in TEXT
    for row in measured_rows() + planned_rows():
        assert row in TEXT, row


def test_the_constants_are_those_of_the_result_file():
    model = REPORT["model"]
    assert f"c = {model['microseconds_per_token']:.0f} µs per token" in SAID
    assert f"f = {model['microseconds_per_forward'] / 1e3:.1f} ms per forward" in SAID


def several_taus_rows() -> list[str]:
    rows = []
    for size in (2, 8, 32):
        of = {row["times_as_long"]: row for row in SEARCHES["arithmetic"] if row["ranks"] == size}
        costs = [of[longer][f"shared_{device}"] for longer in (1, 4, 16) for device in ("cpu", "gpu")]
        rows.append(f"| {size} | {' | '.join(f'{cost:.1f}' for cost in (of[1]['apart'], *costs))} |")
    return rows


def test_what_is_said_about_several_taus_at_once_is_what_was_measured():
    shared, apart = ([stage[way] for stage in SEARCHES["stages"]] for way in ("shared", "apart"))
    seconds = [sum(stage["seconds"] for stage in way) for way in (apart, shared)]
    assert f"six stages took {seconds[0]:.1f} s so and {seconds[1]:.1f} s with shared examples" in SAID
    rounds, evaluations = [s["rounds"] for s in apart], [s["evaluations"] for s in shared]
    assert f"in {min(rounds)} to {max(rounds)} rounds of whole forwards" in SAID
    assert f"in place of {min(evaluations)} to {max(evaluations)} of halves" in SAID
    assert sorted(abs(a["tau"] - s["tau"]) for a, s in zip(apart, shared, strict=True)) == [0] * 5 + [1]
    for row in several_taus_rows():
        assert row in TEXT, row


def test_all_ranks_took_the_same_steps():
    taus = [[stage["tau"] for stage in found["stages"]] for found in REPORT["ranks"].values()]
    assert list(REPORT["ranks"]) == ["1", "2", "4"]
    assert taus[0] == taus[1] == taus[2]


if __name__ == "__main__":  # to paste into the document
    print("\n".join(measured_rows() + planned_rows()))
    print(REPORT["model"]["microseconds_per_token"], REPORT["model"]["microseconds_per_forward"])
