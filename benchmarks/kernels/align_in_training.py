"""What alignment costs of a training step: SmolLM2-135M, LoRA r = 8 on attention, batch 8 × 64 tokens, CPU.

    python -m benchmarks.kernels.align_in_training --out benchmarks/results

Steps are trained with ``learning_rate="auto"``, so that at each of them alignment is measured and the rate
moved by it. Everything that FastForward does before and behind `optimizer.step()` is timed, and its median
set against the median of the steps. The first steps, in which tables are made, are not counted. Writes
align_in_training_cpu_<date>.json.
"""

from __future__ import annotations

from statistics import median
from typing import Any, ClassVar

import torch

from benchmarks import record
from benchmarks.timing import seconds_of
from ffkernels import FastForward, FastForwardConfig
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session

TARGET = 0.005  # of a step
FIRST = 3


class Timed(FastForward):
    """A FastForward whose hooks are timed: ``spent`` are seconds by step."""

    spent: ClassVar[list[float]] = [0.0]

    def _before_step(self, *given: Any) -> None:
        self.spent[-1] += seconds_of(lambda: super(Timed, self)._before_step(*given))

    def _after_step(self, *given: Any) -> None:
        self.spent[-1] += seconds_of(lambda: super(Timed, self)._after_step(*given))


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

    def train(batch: Any) -> None:
        session.backward(batch)
        optimizer.step()
        optimizer.zero_grad()

    for step in range(steps):
        batch = session.load(step)
        ff.spent.append(0.0)
        whole.append(seconds_of(lambda batch=batch: train(batch)))
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
    module, name = "kernels.align_in_training", "align_in_training_cpu"
    parser = record.parser(module, __doc__, name=name)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=23)
    options = parser.parse_args()
    found = measure(options.model, options.steps)
    print(
        f"{found['model']}: {found['alignment_seconds'] * 1e3:.2f} ms of a step of "
        f"{found['step_seconds'] * 1e3:.0f} ms, {found['share']:.3%} (at most {TARGET:.1%})"
    )
    if options.out is not None:
        print(record.write({**record.provenance(module), **found}, options.out, name))


if __name__ == "__main__":
    main()
