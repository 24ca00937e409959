"""One writer at a time: a lock on a file or folder that ends with its process, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffkernels.ops.notices import announce_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(descriptor: int, path: Path) -> None:
    """Take the lock of an open file or folder until it is closed; ``path`` is its name in messages.

    Where there are no such locks (Windows, some network file systems) that is announced once.

    Raises:
        RuntimeError: when another run has it.
    """
    try:
        if fcntl is None:
            raise OSError("this system has none")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"another run is writing {path} just now; wait for its end, or take another name or folder "
            "(--name, --out)"
        ) from None
    except OSError as error:
        announce_once(
            "no-lock",
            f"{path} cannot be locked ({error}): nothing keeps a second run of the same name from writing "
            "there too; give each run a name of its own",
        )


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing, and goes again where it stayed empty."""
    path = Path(folder)
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    if fcntl is None:  # there a folder cannot be opened
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)
        if made and not any(path.iterdir()):
            path.rmdir()
