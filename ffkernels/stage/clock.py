"""The seconds of a stage, although the GPU may still train when it begins; and who waits for whom in it.

A stage starts while the backward pass and the optimizer's kernels are still queued on the device, and its
first read waits for them too. So on a GPU the time up to the first read is taken between two events, one
recorded where the stage begins and one right before the read, which waits for both. From then on host and
device stand at the same place, and host time goes on from there. On other devices it is host time
throughout.

Who waits for whom does not show in host time: CUDA makes the host wait when about a thousand launches are
pending. An event tells: is the device past a mark that was set shortly before the last launch?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch


def _recorded_event(device: torch.device) -> Any:
    """A timing event on the device's current stream; None where host time is good enough."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event


def read_later(values: torch.Tensor) -> Callable[[], list]:
    """What gives the values as they are now, later; waits for them only where they are not there by then."""
    if values.device.type == "cpu":
        kept = values.tolist()
        return lambda: kept
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(values.device))  # of the copy, whatever device is the current one

    def read() -> list:
        done.synchronize()
        return copy.tolist()

    return read


class StageClock:
    """Runs from its making; ``seconds()`` may be asked at any time and waits for nothing.

    Wrap the first read from the device in ``reading()``. A clock that saw no read yet gives host time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = perf_counter()
        self._start = _recorded_event(device)
        self._before_read = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around a host read that waits for all work on the current stream; only the first one counts."""
        if self._start is None:
            yield
            return
        end = _recorded_event(self._device)
        yield
        if not end.query():  # it has happened, as the read waited for it, unless that was of another stream
            end.synchronize()
        self._before_read, self._start = self._start.elapsed_time(end) / 1000, None
        self._begun = perf_counter()

    def seconds(self) -> float:
        return self._before_read + perf_counter() - self._begun


class Lag:
    """Whether the device is behind: not yet past the last mark, when the host has prepared what comes after.

    A device that waits for the host has run whatever was launched, but for the last few kernels. So a mark
    belongs some twenty launches before the end. With more than a thousand after it the device may be past it
    in any case; with none it never is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = None

    def mark(self) -> None:
        self._event = _recorded_event(self._device)

    def is_behind(self) -> bool | None:
        """Waits for nothing; None without a mark, and where the device is the host."""
        return None if self._event is None else not self._event.query()
