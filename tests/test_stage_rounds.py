"""How often the stage benchmark measures whom, on machines of known times, and what it makes of them."""

import random

import pytest


class Machine:
    """Providers whose stages take known times, on a clock of their own."""

    def __init__(self, step_ms, fixed_ms=1.0, noise=0.0, drift=0.0):
        self.step_ms, self.fixed_ms, self.noise, self.drift = step_ms, fixed_ms, noise, drift
        self.now, self.seen, self.draw = 0.0, [], random.Random(1)

    def clock(self):
        return self.now

    def sample(self, name, evaluations):
        ms = evaluations * self.step_ms[name] + self.fixed_ms
        ms *= 1 + self.drift * len(self.seen) + self.draw.gauss(0, self.noise)
        self.seen.append((name, evaluations))
        self.now += ms / 1000
        return ms

    def run(self, rounds, seconds, left=1e9, evaluations=10):
        names = list(self.step_ms)
        times = {"seconds": seconds, "left": left, "clock": self.clock}
        taken, self.failed = rounds.take_samples(names, evaluations, self.sample, **times)
        return taken


STEPS = {"authors": 300.0, "clean eager": 20.0, "bare forward": 10.0, "stage graph": 10.1, "step graph": 10.2}


def numbers(taken):
    return {name: {len(of) for of in samples.values()} for name, samples in taken.items()}


def test_the_slow_get_one_round_and_the_graphs_at_least_fifteen(benchmarks):
    rounds = benchmarks("stages.rounds")
    machine = Machine(STEPS)
    found = numbers(machine.run(rounds, seconds=0.0))  # the row's time was spent before
    assert found["authors"] == {1} and found["clean eager"] == {1}
    assert found["bare forward"] == found["stage graph"] == found["step graph"] == {15}
    # Of 20 s: 3.6 for the authors' round; 0.24 a round of the eager one, whose share is 2.4; and 0.37 a round
    # of the others.
    machine = Machine(STEPS)
    found = numbers(machine.run(rounds, seconds=20.0))
    assert found["authors"] == {1} and found["clean eager"] == {7}
    assert found["bare forward"] == found["stage graph"] and min(found["bare forward"]) in range(38, 42)
    assert 20.0 < machine.now < 20.5


def test_the_share_of_the_slow_is_limited_from_the_first_round_on(benchmarks):
    rounds = benchmarks("stages.rounds")
    found = numbers(Machine({"clean eager": 100.0, "ours eager": 10.0}).run(rounds, seconds=20.0))
    assert found == {"clean eager": {1}, "ours eager": {7}}, "1.2 s a round: two are the whole share of 2.4"
    machine = Machine({"clean eager": 99.0})
    assert numbers(machine.run(rounds, seconds=20.0)) == {"clean eager": {2}}


def test_the_end_of_the_run_cuts_rounds_too(benchmarks):
    rounds = benchmarks("stages.rounds")
    machine = Machine(STEPS)
    found = numbers(machine.run(rounds, seconds=100.0, left=6.0))
    assert found["stage graph"] == found["bare forward"] == {2}, "5.3 s of the others, then 0.37 a round"
    assert 6.0 < machine.now < 6.5
    assert numbers(Machine(STEPS).run(rounds, seconds=1.0, left=0.0))["stage graph"] == {1}


def test_the_graphs_are_interleaved_in_an_order_drawn_anew(benchmarks):
    rounds = benchmarks("stages.rounds")
    machine = Machine(STEPS)
    machine.run(rounds, seconds=0.0)
    compared = [one for one in machine.seen if rounds.is_compared(one[0])]
    assert compared == machine.seen[-90:], "nothing else between them"
    each = {(name, n) for name in STEPS if rounds.is_compared(name) for n in (2, 10)}
    orders = {tuple(compared[i : i + 6]) for i in range(0, 90, 6)}
    assert all(set(order) == each for order in orders) and len(orders) > 8


def test_who_fails_takes_nobody_along(benchmarks):
    rounds = benchmarks("stages.rounds")

    class Failing(Machine):
        def sample(self, name, evaluations):
            if name == "authors" or (name == "stage graph" and self.seen.count((name, 2)) == 4):
                raise RuntimeError(f"{name} failed")
            return super().sample(name, evaluations)

    machine = Failing(STEPS)
    found = numbers(machine.run(rounds, seconds=0.0))
    assert found == {"clean eager": {1}, "bare forward": {15}, "step graph": {15}}
    assert {name: str(error) for name, error in machine.failed.items()} == {
        "authors": "authors failed",
        "stage graph": "stage graph failed",
    }


def test_a_gap_is_what_one_more_step_adds(benchmarks):
    rounds = benchmarks("stages.rounds")
    machine = Machine(STEPS, fixed_ms=40.0)
    taken = machine.run(rounds, seconds=0.0)
    assert rounds.of_a_step(taken["stage graph"]) == pytest.approx(10.1)
    assert rounds.fixed(taken["stage graph"]) == pytest.approx(40.0)
    gap = rounds.gap_of_step(taken["stage graph"], taken["bare forward"])
    assert gap == {key: pytest.approx(0.01) for key in ("value", "low", "high")} | {"rounds": 15}
    eager = rounds.gap_of_step(taken["clean eager"], taken["bare forward"])
    assert eager == {"value": pytest.approx(1.0)}, "other rounds say nothing of the spread"


def test_the_interval_covers_the_gap_and_drift_cancels(benchmarks):
    rounds = benchmarks("stages.rounds")
    covered, widths = 0, []
    for seed in range(40):
        machine = Machine(STEPS, noise=0.002)
        machine.draw.seed(seed)
        taken = machine.run(rounds, seconds=0.0)
        gap = rounds.gap_of_step(taken["stage graph"], taken["bare forward"])
        covered += gap["low"] <= 0.01 <= gap["high"]
        widths.append(gap["high"] - gap["low"])
    assert covered >= 35
    # Medians of 15, σ 0.2 %: 0.07 % each on the long and, a fifth as large, on the short; 95 % are 4 σ.
    assert 0.002 < sorted(widths)[20] < 0.006
    machine = Machine(STEPS, drift=2e-4)  # 2 % slower at the end than at the beginning
    taken = machine.run(rounds, seconds=0.0)
    assert rounds.gap_of_step(taken["stage graph"], taken["bare forward"])["value"] == pytest.approx(
        0.01, abs=2e-3
    )
