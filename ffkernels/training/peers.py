"""Other people's Fast Forward loops, to be trained and measured as ours is: found in this checkout, by name.

    train(config, attach=load_peer("authors"))

They live in ``benchmarks/peers``, one file each, and are no part of the package: what they do, faults
included, is there to be compared with, not to be used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ffkernels.training.session import Attach

PACKAGE = "ffkernels_peers"
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
NOT_PEERS = {"__init__", "adjusting_rates", "face", "learning_rates", "memory", "race"}


def peer_names() -> list[str]:
    """The peers of this checkout, in alphabetical order; none where there is only the installed package."""
    return sorted(p.stem.replace("_", "-") for p in FOLDER.glob("*.py") if p.stem not in NOT_PEERS)


def load_peer(name: str) -> Attach:
    """The ``attach(session)`` of the peer called ``name``; for ``open_session`` and ``train``.

    It takes the peer's options as keywords, such as ``load_peer("authors")(session, interval=3)``.

    Raises:
        ValueError: when there is no such peer.
        RuntimeError: when the package was installed without its repository, so that there are no peers.
        ImportError: when the peer needs a package that is not installed; the message names it.
    """
    return load_module(name).attach


def load_module(name: str) -> ModuleType:
    """The peer's module."""
    known = peer_names()
    if not known:
        raise RuntimeError(
            f"peer {name!r}: the peers are in benchmarks/peers of the ffkernels repository, which is not "
            "beside this installed package; clone the repository and pip install -e . there"
        )
    if name not in known:
        raise ValueError(f"peer {name!r} does not exist; allowed are {', '.join(known)}")
    if PACKAGE not in sys.modules:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
    return import_module(f"{PACKAGE}.{name.replace('-', '_')}")
