"""What alignment costs of a training step: SmolLM2-135M, LoRA r = 8 on attention, batch 8 × 64 tokens, CPU.

    python benchmarks/align_in_training.py --out benchmarks/results

Steps are trained with ``learning_rate="auto"``, so that at each of them alignment is measured and the rate
moved by it. Everything that FastForward does before and behind `optimizer.step()` is timed, and its median
set against the median of the steps. The first steps, in which tables are made, are not counted. Writes
align_in_training_cpu_<date>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

import checkout  # noqa: F401  puts it on the path
import torch
from adapter_rounds import provenance

from ffkernels import FastForward, FastForwardConfig
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session

TARGET = 0.005  # of a step
FIRST = 3


class Timed(FastForward):
    """A FastForward whose hooks are timed: ``spent`` are seconds by step."""

    spent: ClassVar[list[float]] = [0.0]

    def _before_step(self, *given: Any) -> None:
        began = perf_counter()
        super()._before_step(*given)
        self.spent[-1] += perf_counter() - began

    def _after_step(self, *given: Any) -> None:
        began = perf_counter()
        super()._after_step(*given)
        self.spent[-1] += perf_counter() - began


def measure(model: str, steps: int) -> dict[str, Any]:
    config = TrainConfig(
        model=model, task="instruction", batch_size=8, max_length=64, dtype="bfloat16", threads=1, steps=steps
    )
    torch.set_num_threads(1)
    session = open_session(config)
    optimizer = torch.optim.AdamW(session.trainable, lr=1e-3, weight_decay=0.0)
    settings = FastForwardConfig(interval=None, learning_rate="auto")
    ff = Timed(session.model, optimizer, session.validation, settings)
    whole = []
    for step in range(steps):
        batch = session.load(step)
        ff.spent.append(0.0)
        began = perf_counter()
        session.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        whole.append(perf_counter() - began)
    ff.detach()
    whole, hooks = whole[FIRST:], ff.spent[1 + FIRST :]
    return {
        "model": model,
        "trainable": sum(p.numel() for p in session.trainable),
        "tensors": len(session.trainable),
        "steps": len(whole),
        "step_seconds": median(whole),
        "alignment_seconds": median(hooks),
        "share": median(hooks) / median(whole),
        "target": TARGET,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--out", type=Path, help="folder for the JSON; without it, only what is printed")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.steps)
    print(
        f"{found['model']}: {found['alignment_seconds'] * 1e3:.2f} ms of a step of "
        f"{found['step_seconds'] * 1e3:.0f} ms, {found['share']:.3%} (at most {TARGET:.1%})"
    )
    if arguments.out is not None:
        report = {"provenance": provenance(), **found}
        path = arguments.out / f"align_in_training_cpu_{report['provenance']['date'][:10]}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
