"""What each Fast Forward loop holds on to, stage after stage: bytes of all live tensors, and resident memory.

Every method trains for a few stages in a process of its own. Live are all tensors that Python's garbage
collector knows and all that an autograd graph has saved, each storage once; on a GPU what its allocator has
given out. They do not depend on how busy the machine is. Numbers are those beyond the same run without Fast
Forward.
"""

from __future__ import annotations

import gc
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

PLAIN = "adam"
INTERVAL = 6


def live_bytes(device: torch.device) -> int:
    """Bytes of the storages that some tensor, or some autograd graph that a tensor hangs on, keeps alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    found: dict[int, int] = {}
    nodes: list[Any] = []
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):  # not isinstance: it wakes lazy objects
            _count(thing, found)
            if thing.grad_fn is not None:
                nodes.append(thing.grad_fn)
    seen = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions if following is not None]
        for name in dir(node):
            if name.startswith("_saved_"):
                try:
                    saved = getattr(node, name)
                except RuntimeError:  # a backward pass has freed it
                    continue
                for value in saved if isinstance(saved, (list, tuple)) else [saved]:
                    if isinstance(value, torch.Tensor):
                        _count(value, found)
    return sum(found.values())


def _count(tensor: torch.Tensor, found: dict[int, int]) -> None:
    try:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    except (NotImplementedError, RuntimeError):  # a tensor without a storage of its own
        pass


def resident_bytes() -> int | None:
    """This process's resident memory; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def held(config: Any, peer: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Train to the run's end; what is alive after every sixth step, after its stage if there are stages."""
    from ffkernels.training.session import open_session

    live, resident = [], []
    with open_session(config, attach=attach_of(peer, options)) as session:
        for step in range(config.steps):
            session.step(step)
            if (step + 1) % INTERVAL == 0:
                live.append(live_bytes(session.device))
                resident.append(resident_bytes())
        return {
            "live": live,
            "resident": resident,
            "model_bytes": sum(p.nbytes for p in session.model.parameters()),
            "adapter_bytes": sum(p.nbytes for p in session.trainable),
            "evaluations": [stage.evaluations for stage in session.ff.stages] if session.ff else [],
        }


def measure(methods: dict[str, tuple[Any, str | None, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per method ``name: (TrainConfig, peer or None, the peer's options)``; ``adam`` among them."""
    rows = []
    for name, method in methods.items():
        print(f"  memory: {name}", flush=True)
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as apart:
            rows.append({"name": name, **apart.submit(held, *method).result()})
    return compare_rows(rows)


def compare_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds what each holds beyond Adam, and by how much that grows from the second stage to the last.

    ``growth`` is in bytes, ``adapters_per_stage`` says the same of one stage in adapters. From the second:
    the first makes buffers that may stay, and the authors' leak begins with the second.
    """
    plain = next(row for row in rows if row["name"] == PLAIN)
    for row in rows:
        row["beyond_adam"] = [a - b for a, b in zip(row["live"], plain["live"], strict=True)]
        row["growth"] = row["beyond_adam"][-1] - row["beyond_adam"][1]
        row["adapters_per_stage"] = row["growth"] / row["adapter_bytes"] / (len(row["live"]) - 2)
    return rows


def attach_of(peer: str | None, options: dict[str, Any]) -> Any:
    """The ``attach`` of a peer with its options; None for ours and for Adam."""
    if peer is None:
        return None
    from ffkernels.training.peers import load_peer

    return partial(load_peer(peer), **options)
