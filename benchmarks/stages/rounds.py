"""How often each provider's stage is timed, and what the samples say.

Three kinds. The authors' loop is slow and several times off: one round. What runs eagerly is compared with it
and with the graphs by its median: a few rounds, as long as it takes no more than its share of the row's time.
What is compared to within a percent, the graphs and the bare forward under them: `LEAST_ROUNDS` or more, a
stage of each in turn, in an order drawn anew, so that clocks and temperature drift for all alike.

A round is a long and a short stage. What one more step adds is (long − short) / (more evaluations), of the
medians; its `gap` is that of a provider over that of its bare forward, minus 1. How sure that is, is said by
the bootstrap: rounds are drawn with replacement, the same ones for both, and the gap is taken again, over and
over; 95 % of those gaps lie in [low, high].
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.stages.cases import AUTHORS, BARE, LEAST_ROUNDS, SHORT, STAGE, STEP

MOST_ROUNDS, FEW_ROUNDS, FEW_SHARE = 60, 7, 0.12
RESAMPLES = 1000

Samples = dict[int, list[float]]  # evaluations of a stage → its milliseconds, a number per round


def is_compared(name: str) -> bool:
    """Whether a percent more or less is what this provider is measured for."""
    return name.startswith((BARE, STEP, STAGE))


def take_samples(
    names: Sequence[str],
    evaluations: int,
    sample: Callable[[str, int], float],
    seconds: float,
    left: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Samples], dict[str, Exception]]:
    """Samples of every provider, and of those that failed, which have none, why.

    Args:
        sample: milliseconds of one stage of that provider with so many evaluations.
        seconds: what the row may take from here on; those that are compared have `LEAST_ROUNDS` in any case,
        left: unless so many seconds are over, which end it after the round that runs.
    """
    begin, draw = clock(), random.Random(0)
    taken: dict[str, Samples] = {name: {evaluations: [], SHORT: []} for name in names}
    failed: dict[str, Exception] = {}

    def one_round(group: Sequence[str]) -> None:
        for name in draw.sample(list(group), len(group)):
            try:
                for length in draw.sample([evaluations, SHORT], 2):
                    taken[name][length].append(sample(name, length))
            except Exception as error:  # one provider must not take the others along
                failed[name] = error
                del taken[name]

    def within_its_share(name: str) -> bool:
        """Whether this provider's next round, as long as those before, still is."""
        spent, rounds = sum(map(sum, taken[name].values())) / 1000, len(taken[name][SHORT])
        return spent * (1 + 1 / rounds) <= FEW_SHARE * seconds

    for rounds in range(FEW_ROUNDS):
        few = [name for name in taken if not is_compared(name)]
        one_round([name for name in few if not rounds or (name != AUTHORS and within_its_share(name))])
    for rounds in range(MOST_ROUNDS):
        if rounds and clock() - begin > (left if rounds < LEAST_ROUNDS else min(seconds, left)):
            break
        one_round([name for name in taken if is_compared(name)])
    return taken, failed


def of_a_step(samples: Samples) -> float:
    """Milliseconds that one more evaluation adds to a stage."""
    long = max(samples)
    return (statistics.median(samples[long]) - statistics.median(samples[SHORT])) / (long - SHORT)


def fixed(samples: Samples) -> float:
    """Milliseconds of a stage beside its evaluations."""
    return statistics.median(samples[SHORT]) - SHORT * of_a_step(samples)


def gap_of_step(samples: Samples, floor: Samples) -> dict[str, float | int]:
    """What one more step adds over what it adds to the bare forward, as a share of that.

    `low`, `high` and the number of `rounds` are there where both were measured in the same rounds.
    """
    found: dict[str, float | int] = {"value": of_a_step(samples) / of_a_step(floor) - 1}
    rounds = {len(taken) for side in (samples, floor) for taken in side.values()}
    if rounds == {1} or len(rounds) > 1:
        return found
    draw, count = random.Random(0), rounds.pop()
    drawn = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(range(count), k=count)
        sides = ({n: [taken[i] for i in chosen] for n, taken in side.items()} for side in (samples, floor))
        own, bare = (of_a_step(side) for side in sides)
        drawn.append(own / bare - 1 if bare else float("inf"))
    drawn.sort()
    tail = round(0.025 * RESAMPLES)
    return found | {"low": drawn[tail], "high": drawn[-1 - tail], "rounds": count}
