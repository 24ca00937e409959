"""The paper's protocol on every task: what Fast Forward saves on the way to Adam's own test loss.

    make bench-e2e                                    the same as the next line
    python -m benchmarks.end_to_end                   about 20 minutes on 2 quiet cores; on a GPU --minutes 25
    python -m benchmarks.end_to_end --list            what would run, and for how long
    python -m benchmarks.end_to_end --fast            one small cell, in seconds; its numbers mean nothing
    python -m benchmarks.end_to_end --cells medical lr=1e-4     only cells whose name has all these words

On a CPU: the embedded model, three tasks, LoRA at 1e-4 and 3e-4, batch 64, 3 seeds. On a GPU: SmolLM2-135M
on a bfloat16 base, three tasks, LoRA and DoRA at 1e-4, 4e-5, 3e-4 and the tuned rate, one seed, the paper's
global batches from 64 up. Each round is one call of ``ffkernels.training.compare``: Adam, Fast Forward with
the bracketing and with the paper's search, and Adam at a tuned learning rate.

Writes one JSON file after every round and goes on from it the next time: what has been measured is not
measured again unless with --fresh, and what --minutes left no time for is listed in it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import TASKS, record
from benchmarks.end_to_end.plan import TUNED, Plan
from benchmarks.end_to_end.record import KIND, load
from benchmarks.end_to_end.rounds import Rounds, clock

INTERRUPTED = 130
ALWAYS: dict[str, Any] = {"tasks": TASKS, "steps": 120, "test_examples": 1000, "tuned_lr": None}
SMALL: dict[str, Any] = {"max_length": 64, "dtype": "float32"}  # the embedded model
CPU = SMALL | {"methods": ["lora"], "lr": [1e-4, 3e-4], "seeds": [0, 1, 2], "batch_sizes": [64]}
CPU |= {"micro_batch_size": None}
GPU = {"methods": ["lora", "dora"], "lr": [1e-4, 4e-5, 3e-4, TUNED], "seeds": [0], "max_length": 256}
# The logits of 64 × 256 tokens over 49,152 words take 3.2 GB in float32, and their gradient as much.
GPU |= {"batch_sizes": [64, 128, 256, 512], "dtype": "bfloat16", "micro_batch_size": 64}
FAST = SMALL | {"tasks": ["instruction"], "lr": [3e-4], "seeds": [0], "methods": ["lora"], "steps": 12}
FAST |= {"batch_sizes": [16], "micro_batch_size": None, "test_examples": 64, "tuned_lr": 1e-2}
FAST_MAX_TAU = 16
OF_RUN = ("steps", "max_length", "test_examples", "micro_batch_size", "dtype")
OF_PLAN = ("tasks", "methods", "batch_sizes", "seeds", "tuned_lr")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = record.parser("end_to_end", __doc__, out="runs/end-to-end/end_to_end.json")
    which = parser.add_argument_group("what is measured; the defaults depend on the device")
    which.add_argument("--model", help="default: tiny on a CPU, smollm2-135m on a GPU where it is at hand")
    which.add_argument("--tasks", nargs="+", choices=TASKS)
    which.add_argument("--method", nargs="+", dest="methods", choices=GPU["methods"])
    which.add_argument("--lr", nargs="+", type=_rate, help=f"learning rates, or {TUNED!r}")
    which.add_argument("--seeds", nargs="+", type=int)
    which.add_argument("--batch-size", nargs="+", type=int, dest="batch_sizes")
    which.add_argument(
        "--cells", nargs="+", default=[], metavar="WORD", help="only cells with all these words"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, help="of the Adam run; default 120")
    how.add_argument("--max-length", type=int, help="tokens per example")
    how.add_argument("--test-examples", type=int, help="default 1000")
    how.add_argument("--micro-batch-size", type=int)
    how.add_argument("--evaluate-every", type=int, default=10, help="Adam: steps between test losses")
    how.add_argument("--check-every", type=int, default=3, help="the other runs: steps between test losses")
    how.add_argument(
        "--tuned-lr", type=float, help="default: from the table, or a sweep in a task's first cell"
    )
    how.add_argument("--device", default="auto")
    how.add_argument("--dtype", help="of the frozen base")
    how.add_argument("--threads", type=int)
    parser.add_argument("--minutes", type=float, help="begin no round that would end later, stop what does")
    parser.add_argument("--fast", action="store_true", help="one small cell")
    parser.add_argument("--fresh", action="store_true", help="measure all of it again")
    parser.add_argument("--list", action="store_true", help="say what would run, and end")
    return parser.parse_args(argv)


def _rate(text: str) -> float | str:
    return TUNED if text == TUNED else float(text)


def make_plan(options: argparse.Namespace) -> tuple[Plan, str | None]:
    """The plan, and why it is not on the model that one would expect, where that is so."""
    from ffkernels.engine.config import FastForwardConfig
    from ffkernels.reporting.machine import choose_device
    from ffkernels.training.config import TrainConfig

    on_gpu = choose_device(options.device).type == "cuda"
    model, reason = options.model, None
    if model is None:
        model = "tiny"
        if on_gpu and not options.fast:
            model, reason = _model_for_gpu()
    defaults = ALWAYS | CPU | (GPU if on_gpu else {}) | (SMALL if model == "tiny" else {})
    defaults |= FAST if options.fast else {}
    given = {name: getattr(options, name) for name in defaults}
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    base = TrainConfig(
        model=model,
        evaluate_every=options.evaluate_every,
        device=options.device,
        threads=options.threads,
        **{name: chosen[name] for name in OF_RUN},
    )
    plan = Plan(
        base,
        # The tuned rate comes last: another cell finds it.
        rates=[lr for lr in chosen["lr"] if lr != TUNED] + [None] * (TUNED in chosen["lr"]),
        check_every=options.check_every,
        only=options.cells,
        fast_forward=FastForwardConfig(max_tau=FAST_MAX_TAU) if options.fast else FastForwardConfig(),
        **{name: chosen[name] for name in OF_PLAN},
    )
    if not list(plan.rounds()):
        raise ValueError(f"--cells {' '.join(options.cells)}: no cell has these words; --list names them")
    return plan, reason


def _model_for_gpu() -> tuple[str, str | None]:
    from ffkernels.training import smollm2

    try:
        smollm2.checkpoint()
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"{smollm2.NAME} is not at hand ({str(error).splitlines()[0]}); measured on tiny instead"
        return "tiny", reason
    return smollm2.NAME, None


def new_document(
    plan: Plan, options: argparse.Namespace, argv: list[str], reason: str | None
) -> dict[str, Any]:
    probe, seed = next(plan.rounds())
    comparison = plan.comparison(probe, seed, plan.tuned_lr or 1e-2, Path("runs"))
    config = comparison.base.to_dict()
    for name in ("name", "out", "task", "method", "lr", "batch_size", "seed", "fast_forward", "target_loss"):
        config.pop(name, None)
    config |= {name: getattr(comparison, name) for name in ("check_every", "tolerance")}
    config |= {"tuned_lr": plan.tuned_lr, "fast_forward": asdict(comparison.fast_forward)}
    del config["fast_forward"]["search"]
    document = record.provenance("end_to_end", argv, kind=KIND, fast=options.fast)
    document |= {"seconds": 0.0, "config": config, "tuned": {}, "cells": [], "left_out": []}
    return document if reason is None else {**document, "note": reason}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        plan, reason = make_plan(options)
        document = new_document(plan, options, argv, reason)
        if not options.fresh:
            document = load(options.out, document)
    except ValueError as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return 2
    if reason is not None:
        print(reason)
    rounds = Rounds(plan, document, options.out, options.minutes)
    todo = rounds.todo()
    done = len(list(plan.rounds())) - len(todo)
    print(f"{plan.base.model}: {len(todo)} rounds to measure, {done} are in {options.out}", flush=True)
    if todo:
        print(f"expected: about {clock(rounds.expected(todo))}", flush=True)
    if options.list:
        print("\n".join(f"{cell.name}, seed {seed}" for cell, seed in todo))
        return 0
    ended = rounds.run()
    left_out = len(document["left_out"])
    print(f"written: {options.out}" + (f"; {left_out} rounds were left out" if left_out else ""))
    if not ended:
        return INTERRUPTED
    return 0 if document["cells"] else 1


if __name__ == "__main__":
    sys.exit(main())
