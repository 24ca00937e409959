"""The clock of a stage against a device that is late."""

import pytest
import torch

from ffkernels.stage import clock as stage_clock
from ffkernels.stage.clock import Lag, StageClock

CPU = torch.device("cpu")


class Times:
    """Host time that a test moves, and a device that has work to do until `busy`."""

    def __init__(self):
        self.now = self.busy = 0.0

    def event(self, device):
        return Event(self)

    def wait(self):
        self.now = max(self.now, self.busy)


class Event:
    """Happens when the device comes to it."""

    def __init__(self, times):
        self.times, self.at = times, max(times.now, times.busy)

    def query(self):
        return self.times.now >= self.at

    def synchronize(self):
        self.times.now = max(self.times.now, self.at)

    def elapsed_time(self, end):
        assert self.times.now >= end.at, "read before it happened"
        return 1000 * (end.at - self.at)


@pytest.fixture
def times(monkeypatch):
    times = Times()
    monkeypatch.setattr(stage_clock, "perf_counter", lambda: times.now)
    return times


@pytest.fixture
def gpu(times, monkeypatch):
    monkeypatch.setattr(stage_clock, "_recorded_event", times.event)
    return times


def test_training_that_is_still_running_is_not_the_stages(gpu):
    gpu.busy = 5.0
    clock = StageClock(CPU)
    gpu.now += 0.5  # the host prepares work of 2 seconds
    gpu.busy += 2.0
    with clock.reading():
        gpu.wait()
    assert gpu.now == 7.0
    assert clock.seconds() == pytest.approx(2.0)
    gpu.now += 1.0
    assert clock.seconds() == pytest.approx(3.0)


def test_a_host_that_is_late_is_the_stages(gpu):
    clock = StageClock(CPU)
    gpu.now = 3.0
    gpu.busy = 4.0
    with clock.reading():
        gpu.wait()
    assert clock.seconds() == pytest.approx(4.0)


def test_only_the_first_read_counts(gpu):
    gpu.busy = 1.0
    clock = StageClock(CPU)
    for _ in range(3):
        gpu.busy = max(gpu.now, gpu.busy) + 1.0
        with clock.reading():
            gpu.wait()
    assert clock.seconds() == pytest.approx(3.0)


def test_without_a_read_it_is_host_time(gpu):
    gpu.busy = 100.0
    clock = StageClock(CPU)
    gpu.now = 0.25
    assert clock.seconds() == 0.25
    with pytest.raises(KeyError), clock.reading():
        raise KeyError
    gpu.now = 0.5
    assert clock.seconds() == 0.5


def test_a_cpu_has_host_time_throughout(times):
    clock = StageClock(CPU)
    times.now = 2.0
    with clock.reading():
        times.now = 3.0
    assert clock.seconds() == 3.0


def test_a_device_is_behind_until_it_is_past_the_last_mark(gpu):
    lag = Lag(CPU)
    assert lag.is_behind() is None, "without a mark nothing tells"
    lag.mark()
    assert lag.is_behind() is False
    gpu.busy = 5.0
    lag.mark()
    assert lag.is_behind() is True and gpu.now == 0.0
    gpu.now = 5.0
    assert lag.is_behind() is False


def test_a_cpu_is_never_behind_itself(times):
    lag = Lag(CPU)
    lag.mark()
    assert lag.is_behind() is None
