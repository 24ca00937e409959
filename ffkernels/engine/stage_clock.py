"""The seconds of a stage, although the GPU may still be training when the stage begins.

A stage starts while the backward pass and the optimizer's kernels are still queued on the device, and its
first read waits for them too. Host time would book that wait to the stage. So on a GPU the time up to the
first read is taken between two events, one recorded where the stage begins and one right before the read; the
read itself waits for both, so that nothing is waited for in addition. From then on host and device stand at
the same place, and host time goes on from there. On other devices it is host time throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

__all__ = ["StageClock"]


def _recorded_event(device: torch.device) -> Any:
    """A timing event on the device's current stream; None where host time is good enough."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event


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
