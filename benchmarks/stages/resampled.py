"""Validation examples drawn anew before each stage against the same ones in every stage.

    python benchmarks/resampled_validation.py --out benchmarks/results

Of each task 256 examples are held out beside the test set, the same for all runs of a seed, so all train on
the same batches:

    adam          no Fast Forward; its test loss after the last step is the target
    fixed 32      the first 32 of the 256 in every stage
    resampled 32  each stage has 32 others (``ValidationPool``)
    fixed 128     the first 128 in every stage: four times the FLOPs of a validation

At the smaller learning rate a run ends at the target. At the larger it goes on past it to the last step, with
8 examples too, where searching on few examples should show in the test loss if anywhere, and of two tasks to
twice as many steps. The test loss is measured after each stage. The file is written after every run, and a
run that stands in it is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  puts it on the path

from ffkernels import FastForward, FastForwardConfig, ValidationPool
from ffkernels.reporting.machine import machine_info, version_info
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Session
from ffkernels.training.trainer import train

KIND = "resampled-validation"
TASKS = ("instruction", "medical", "chat")
POOL = 256
TO_TARGET, PAST_TARGET = 1e-4, 3e-4
# Examples per validation, and whether they are drawn anew.
ARMS = {
    "adam": (0, False),
    "fixed 32": (32, False),
    "resampled 32": (32, True),
    "fixed 128": (128, False),
    "fixed 8": (8, False),
    "resampled 8": (8, True),
}
FEW = ("fixed 8", "resampled 8")
PLACE = ("arm", "task", "lr", "seed", "steps")


def planned(seeds: int, steps: int) -> list[dict[str, Any]]:
    """Whole rounds, so that a file that ends early still compares like with like."""
    usual = [arm for arm in ARMS if arm not in FEW]
    rounds = []
    for seed in range(seeds):
        rounds += [(seed, lr, usual, TASKS, steps) for lr in (TO_TARGET, PAST_TARGET)]
        rounds.append((seed, PAST_TARGET, FEW, TASKS, steps))
        if seed == 0:
            rounds.append((seed, PAST_TARGET, ("fixed 32", *FEW), ("chat", "instruction"), 2 * steps))
    return [
        {"task": task, "lr": lr, "seed": seed, "arm": arm, "steps": length}
        for seed, lr, arms, tasks, length in rounds
        for task in tasks
        for arm in arms
    ]


def attach(arm: str, config: FastForwardConfig) -> Any:
    examples, resampled = ARMS[arm]

    def make(session: Session) -> FastForward | None:
        if not examples:
            return None
        held_out, seed = session.task.validation, session.config.seed
        if resampled:
            validation = ValidationPool(
                session.model, held_out, size=examples, seed=seed, collator=session.collator
            )
        else:
            validation = session._loss(held_out[:examples])
        _ = validation.flops
        return FastForward(session.model, session.optimizer, validation, config)

    return make


def measure(cell: dict[str, Any], test_examples: int, target: float | None) -> dict[str, Any]:
    tests: list[list[float]] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "test":
            tests.append([event["optimizer_step"], event["flops"]["measured"], event["loss"]])

    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
        config = TrainConfig(
            name="run",
            out=folder,
            task=cell["task"],
            lr=cell["lr"],
            seed=cell["seed"],
            steps=cell["steps"],
            test_examples=test_examples,
            validation_examples=POOL,
            evaluate_every=0,
            target_loss=target,
            threads=1,
            device="cpu",
        )
        stages = FastForwardConfig(patience=None)
        result = train(config, save=False, on_event=note, attach=attach(cell["arm"], stages))
    return {
        **cell,
        "optimizer_steps": result.optimizer_steps,
        "test_loss": result.test_loss,
        "flops": result.flops["measured"],
        "stage_flops": sum(stage.flops for stage in result.stages),
        "curve": tests,
        "stages": [
            {
                "step": stage.optimizer_step,
                "tau": stage.tau,
                "evaluations": stage.evaluations,
                "loss_before": stage.loss_before,
                "loss_after": stage.loss_after,
            }
            for stage in result.stages
        ],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--test-examples", type=int, default=200)
    options = parser.parse_args(argv)
    now = datetime.now(timezone.utc)
    path = options.out / f"resampled_validation_tiny_{now:%Y-%m-%d}.json"
    settings = {"model": "tiny", "steps": options.steps, "batch_size": 64, "interval": 6, "pool": POOL}
    settings |= {"test_examples": options.test_examples, "seeds": options.seeds, "patience": None}
    report: dict[str, Any] = {
        "kind": KIND,
        "measured_at": now.isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/resampled_validation.py", *(argv or sys.argv[1:])]),
        "machine": machine_info(),
        "versions": version_info(),
        "config": settings,
        "runs": [],
    }
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["config"] != settings:
            parser.error(f"{path} was measured with other settings, {report['config']}: move it away")
    done = {tuple(run[name] for name in PLACE): run for run in report["runs"]}
    for cell in planned(options.seeds, options.steps):
        key = tuple(cell[name] for name in PLACE)
        if key in done:
            continue
        target = None
        if cell["lr"] == TO_TARGET and cell["arm"] != "adam":
            target = done[("adam", *key[1:])]["test_loss"] + 1e-4
        done[key] = measure(cell, options.test_examples, target)
        report["runs"].append(done[key])
        options.out.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
        one = done[key]
        print(*key, one["optimizer_steps"], f"{one['test_loss']:.4f}", f"{one['flops'] / 1e12:.3f} TFLOP")
        print("   ", [stage["tau"] for stage in one["stages"]], flush=True)


if __name__ == "__main__":
    main()
