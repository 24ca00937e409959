"""CUDA graphs as a stage uses them.

    Capture       what a function does on the GPU, as one graph          warm_up → capture → replay
    WhileGraph    prologue, then a body as long as a condition is set    build → launch
    why_no_…      what stands against either on a device, with its cure; probe tries one small loop

A stage as a `WhileGraph` is one launch: [prologue: Δ, max |Δ|, begin] → WHILE [validate, decide, step].
"""

from __future__ import annotations

from ffkernels.graphs.capture import Capture, CaptureFailed
from ffkernels.graphs.support import probe, why_no_stage_graph, why_no_step_graph
from ffkernels.graphs.while_graph import WhileGraph, audit

__all__ = [
    "Capture",
    "CaptureFailed",
    "WhileGraph",
    "audit",
    "probe",
    "why_no_stage_graph",
    "why_no_step_graph",
]
