"""What several runs will still take, against a clock of one's own."""

import io

import pytest
from rich.console import Console

from ffkernels.training import progress
from ffkernels.training.config import TrainConfig
from ffkernels.training.progress import TimeLeft


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_first_run_tells_by_its_pace_and_later_ones_by_the_longest():
    clock = Clock()
    left = TimeLeft(3, clock)
    left.begin()
    assert left.seconds(0.0) is None
    clock.now = 4.0  # for the model and the data
    left.prepared()
    clock.now = 6.0
    assert left.seconds(0.25) == 6.0 + 2 * (4.0 + 8.0)
    clock.now = 12.0
    assert left.seconds(1.0) == 2 * 12.0
    left.begin()
    assert left.seconds(0.0) == 2 * 12.0
    left.prepared()
    clock.now = 13.0
    assert left.seconds(0.5) == 1.0 + 12.0  # it is quicker, and the next may be as slow as the first
    clock.now = 13.5
    assert left.seconds(0.05) == pytest.approx(28.5 + 30.0)  # slower than all before, as a stage makes it
    left.begin()
    assert left.seconds(1.0) == 0.0


@pytest.fixture
def told(monkeypatch):
    """``told(terminal)``: printed of two runs of ten steps, a second each, after a second of loading."""

    def tell(terminal):
        clock, text = Clock(), io.StringIO()
        monkeypatch.setattr(progress.Remaining, "max_refresh", None)  # else twice a second
        monkeypatch.setattr(progress, "TimeLeft", lambda runs: TimeLeft(runs, clock))
        console = Console(file=text, force_terminal=terminal, width=100, _environ={"TERM": "xterm"})
        with progress.ProgressBars(console, runs=2) as bars:
            for name in ("adam-s0", "linear-s0"):
                bars.start(TrainConfig(name=name, steps=10))
                clock.now += 1
                bars.event({"event": "run", "config": {"steps": 10}, "remarks": []})
                for step in range(1, 11):
                    clock.now += 1
                    bars.event({"event": "step", "optimizer_step": step})
                    bars._progress.refresh()
                seconds = {"stopped_because": "done", "test_loss": 1.0, "seconds": {"total": 10.0}}
                bars.event({"event": "end", "optimizer_steps": 10, "test_seconds": 0.0, **seconds})
        return text.getvalue()

    return tell


def test_without_a_bar_it_is_a_line(told):
    assert told(False).splitlines() == [
        "adam-s0: 10 steps; run 1 of 2",
        "All 2 runs: about 0:00:20 left",
        "adam-s0: done after 10 steps, test loss 1.0000, 10.0 s",
        "linear-s0: 10 steps; run 2 of 2, about 0:00:11 left",
        "linear-s0: done after 10 steps, test loss 1.0000, 10.0 s",
    ]


def test_a_terminal_has_a_bar_of_all_runs(told):
    shown = told(True)
    # After the first step nine of this run's are left and the second run; at its end the second run.
    assert shown.index("≈ 0:00:20 left") < shown.index("≈ 0:00:11 left") < shown.index("≈ 0:00:00 left")
    assert "0/2" in shown and "1/2" in shown and "2/2" in shown
