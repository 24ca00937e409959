"""Whether graphs can work here: what is known without trying, and one small loop that tries it.

Each question is answered with None, or with the cause and the cure in one line.
"""

from __future__ import annotations

import torch

from ffkernels.graphs import driver
from ffkernels.graphs import probe as graph_probe
from ffkernels.graphs.while_graph import small_loop

WHILE_NODES = 12040  # the CUDA version of driver r550
INSTALL = "`pip install 'ffkernels[cuda]'`"

_probed: dict[torch.device, str | None] = {}


def why_no_step_graph(device: torch.device) -> str | None:
    """What stands against replaying a captured step on `device`, as far as one can tell beforehand."""
    cuda = driver.cuda
    if not cuda.is_cuda(device):
        return f"CUDA graphs need weights on a CUDA device, these are on {device.type}; move the model there"
    if cuda.is_rocm():
        return "this torch is built for ROCm, where stages were never captured; executor='eager' runs there"
    if problem := cuda.triton_problem():
        return f"the search on the device needs Triton, which cannot be used ({problem}); {INSTALL}"
    if cuda.allocator() != "native":
        return (
            f"memory comes from {cuda.allocator()}, whose graphs allocate on every launch; "
            "take backend:native in PYTORCH_CUDA_ALLOC_CONF"
        )
    return None


def why_no_stage_graph(device: torch.device) -> str | None:
    """What stands against a stage as one launch: what stands against a step graph, and what a loop needs.

    Asks the device by one small loop when nothing else is found: once per device, and on a machine that has
    not been asked before, first in a process of its own, which takes some seconds (`graphs.probe`).
    """
    if problem := why_no_step_graph(device):
        return problem
    cuda = driver.cuda
    if problem := cuda.bindings_problem():
        return f"loops on the device need cuda-bindings, which cannot be used ({problem}); {INSTALL}"
    try:
        version = cuda.driver_version()
    except Exception as error:
        return f"the CUDA driver does not tell its version ({error}); reinstall cuda-bindings: {INSTALL}"
    if version < WHILE_NODES:
        return (
            f"the driver speaks CUDA {version // 1000}.{version % 1000 // 10}, and loops on the device need"
            " 12.4; update it to r550 or later"
        )
    return probe(device)


def probe(device: torch.device) -> str | None:
    """Run one small WHILE loop with a stage's kernels, once per device; None when it counted right.

    Only what has gone well in a process of its own is tried in this one. Leaves the way to set a loop's
    condition that worked in use, see `ops.condition`. A condition that cannot be set gives a loop that does
    not run: that is found here, and nothing hangs.
    """
    if device not in _probed:
        verdict = graph_probe.verdict(device)
        _probed[device] = verdict.problem or _try(device, verdict.ways)
    return _probed[device]


def _try(device: torch.device, ways: tuple[str, ...]) -> str | None:
    from ffkernels.ops import condition

    problems = []
    for way in ways:
        condition.use(device, way)
        try:
            problem = small_loop(device)
        except Exception as error:
            problem = driver.first_line(error)
        if problem is None:
            return None
        problems.append(f"condition set {way} the decision: {problem}")
    condition.use(device, condition.INSIDE)
    return (
        f"a small loop on {device} did not run as it must ({'; '.join(problems)}); "
        "`ffkernels doctor` says what is installed, a newer driver may cure it"
    )
