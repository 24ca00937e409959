"""Python's cycle collector, off for a while.

Parsing makes millions of objects without a cycle among them. The collector would walk all of them, and all of
torch, again and again for nothing: half the time of reading ICD-10-CM.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """No collection inside; afterwards as it was before."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
