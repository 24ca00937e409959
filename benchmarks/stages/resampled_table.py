"""The table of `resampled_validation.py`'s result: the same validation examples in every stage, or others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from end_to_end_table import rate
from results_tables import Results, heading, percent, signed, table, where


def resampled_validation(results: Results) -> str:
    """The same validation examples in every stage, or others; the newest measurement.

    Only tasks and seeds count of which every way was measured.
    """
    name = max((n for n, data in results.items() if data.get("kind") == "resampled-validation"), default=None)
    if name is None:
        return "*Not measured yet: `python benchmarks/resampled_validation.py`.*"
    data = results[name]
    config = data["config"]
    runs = {
        (r["lr"], r["arm"], r["task"], r["seed"]): r for r in data["runs"] if r["steps"] == config["steps"]
    }
    longer = [run for run in data["runs"] if run["steps"] > config["steps"]]
    low, high = sorted({lr for lr, *_ in runs})
    usual, few = ("fixed 32", "resampled 32", "fixed 128"), ("fixed 8", "resampled 8")

    def places(lr: float, arms: Sequence[str]) -> list[tuple[str, int]]:
        found = dict.fromkeys((task, seed) for _, _, task, seed in runs)
        return [place for place in found if all((lr, arm, *place) in runs for arm in ("adam", *arms))]

    def saved(lr: float, arm: str, place: tuple[str, int]) -> float | None:
        adam = runs[(lr, "adam", *place)]
        reached = (f for _, f, loss in runs[(lr, arm, *place)]["curve"] if loss <= adam["test_loss"] + 1e-4)
        return next((1 - flops / adam["flops"] for flops in reached), None)

    def spread(shares: Sequence[float | None], form: Callable[[float | None], str]) -> str:
        if None in shares:
            return f"not reached in {shares.count(None)} of {len(shares)}"
        if not shares:
            return "–"
        low_end, high_end = (form(end(shares)).removesuffix(" %") for end in (min, max))
        return f"{form(median(shares))} ({low_end} to {high_end})"

    rows = []
    for arm in (*usual, *few):
        at_high = places(high, usual if arm in usual else (*usual, *few))
        pairs = [(runs[(high, arm, *place)], runs[(high, "fixed 32", *place)]) for place in at_high]
        rows.append(
            [
                of_stage(arm),
                spread([saved(low, arm, place) for place in places(low, usual)], percent)
                if arm in usual
                else "",
                spread([saved(high, arm, place) for place in at_high], percent),
                spread([ours["test_loss"] / same["test_loss"] - 1 for ours, same in pairs], signed),
                f"{median(ours['flops'] / same['flops'] for ours, same in pairs):.2f}" if pairs else "–",
                str(len(at_high)),
            ]
        )
    ended = f"after {config['steps']} steps at {rate(high)}"
    head = ["examples of a stage", f"FLOPs saved at {rate(low)}", f"FLOPs saved at {rate(high)}"]
    head += [f"test loss {ended}, against “the same 32”", "FLOPs until then, against it"]
    head += [f"runs at {rate(high)}"]
    words = (
        f"{heading(config['model'])}, batch {config['batch_size']}, stages every {config['interval']} steps, "
        f"others out of {config['pool']} held out; tasks × seeds: {len(places(low, usual))} at {rate(low)}, "
        f"{len(places(high, usual))} at {rate(high)}. {where(data)} (`{data['command']}`; `{name}`):"
    )
    text = f"{words}\n\n{table(head, rows)}"
    if longer:
        ends: dict[str, list[str]] = {}
        for run in longer:
            ends.setdefault(run["task"], []).append(f"{run['test_loss']:.4f} with {of_stage(run['arm'])}")
        said = "; ".join(f"{task} {', '.join(each)}" for task, each in ends.items())
        text += f"\n\nTest losses after {longer[0]['steps']} steps at {rate(high)}, one seed: {said}."
    return text


def of_stage(arm: str) -> str:
    kind, number = arm.split()
    return f"the same {number}" if kind == "fixed" else f"{number} others"
