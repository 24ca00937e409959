"""How long examples are: counts, lengths, and what the length limit has cut, per split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ffkernels.training.examples import IGNORED


def token_statistics(examples: Sequence[dict[str, list[int]]], limit: int | None = None) -> dict[str, Any]:
    """Plain numbers on one split; ``limit``: measure so many examples at most (the first), None means all.

    ``examples``: how many there are; ``measured``: how many the other numbers are of. ``tokens`` and
    ``labelled_tokens`` are sums, the latter counting what a causal loss can: an example's first token has
    nothing before it. ``share_cut``: the fraction of examples of which something was left out. Lengths are
    in tokens; percentiles are lengths that occur (nearest rank).
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit!r}; it must be at least 1, or None for all examples.")
    measured = examples if limit is None else examples[:limit]
    lengths, labelled, cut = [], 0, 0
    for example in measured:
        lengths.append(len(example["input_ids"]))
        labelled += sum(label != IGNORED for label in example["labels"][1:])
        cut += getattr(example, "cut", False)
    lengths.sort()
    return {
        "examples": len(examples),
        "measured": len(lengths),
        "tokens": sum(lengths),
        "labelled_tokens": labelled,
        "share_cut": cut / len(lengths) if lengths else 0.0,
        "length": {
            "min": _percentile(lengths, 0),
            "median": _percentile(lengths, 50),
            "p95": _percentile(lengths, 95),
            "max": _percentile(lengths, 100),
        },
    }


def _percentile(ascending: Sequence[int], percent: int) -> int:
    """Nearest rank: the least value that at least ``percent`` % of all do not exceed."""
    if not ascending:
        return 0
    return ascending[max(0, -(-percent * len(ascending) // 100) - 1)]
