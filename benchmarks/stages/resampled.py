"""Validation examples drawn anew before each stage against the same ones in every stage.

    python -m benchmarks.stages.resampled --out benchmarks/results

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

import json
import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks import RESULTS, TASKS, record, tables
from ffkernels import FastForward, FastForwardConfig, ValidationPool
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Session
from ffkernels.training.trainer import train

KIND = "resampled-validation"
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
OF_STAGE = ("tau", "evaluations", "loss_before", "loss_after")
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
            **{"name": "run", "out": folder, "threads": 1, "device": "cpu", "evaluate_every": 0},
            **{name: cell[name] for name in ("task", "lr", "seed", "steps")},
            test_examples=test_examples,
            validation_examples=POOL,
            target_loss=target,
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
            {"step": stage.optimizer_step, **{name: getattr(stage, name) for name in OF_STAGE}}
            for stage in result.stages
        ],
    }


def table(results: tables.Results) -> str:
    """The same validation examples in every stage, or others; the newest measurement.

    Only tasks and seeds count of which every way was measured.
    """
    if (newest_ := tables.newest(results, KIND)) is None:
        return tables.missing("stages.resampled")
    name, data = newest_
    config = data["config"]
    runs = {
        (r["lr"], r["arm"], r["task"], r["seed"]): r for r in data["runs"] if r["steps"] == config["steps"]
    }
    longer = [run for run in data["runs"] if run["steps"] > config["steps"]]
    low, high = sorted({lr for lr, *_ in runs})
    usual, few = ("fixed 32", "resampled 32", "fixed 128"), ("fixed 8", "resampled 8")

    def places(lr: float, arms: Sequence[str]) -> list[tuple[str, int]]:
        found = dict.fromkeys((task, seed) for _, _, task, seed in runs)
        return [place for place in found if all((lr, arm, *place) in runs for arm in ("adam", *arms))]

    def saved(lr: float, arm: str, place: tuple[str, int]) -> float | None:
        adam = runs[(lr, "adam", *place)]
        reached = (f for _, f, loss in runs[(lr, arm, *place)]["curve"] if loss <= adam["test_loss"] + 1e-4)
        return next((1 - flops / adam["flops"] for flops in reached), None)

    def spread(shares: Sequence[float | None], form: Callable[[float | None], str]) -> str:
        if None in shares:
            return f"not reached in {shares.count(None)} of {len(shares)}"
        if not shares:
            return "–"
        low_end, high_end = (form(end(shares)).removesuffix(" %") for end in (min, max))
        return f"{form(median(shares))} ({low_end} to {high_end})"

    rows = []
    for arm in (*usual, *few):
        at_high = places(high, usual if arm in usual else (*usual, *few))
        pairs = [(runs[(high, arm, *place)], runs[(high, "fixed 32", *place)]) for place in at_high]
        flops = [ours["flops"] / same["flops"] for ours, same in pairs]
        at_low = [saved(low, arm, place) for place in places(low, usual) if arm in usual]
        row = [of_stage(arm), spread(at_low, tables.percent) if arm in usual else ""]
        row.append(spread([saved(high, arm, place) for place in at_high], tables.percent))
        row.append(spread([ours["test_loss"] / same["test_loss"] - 1 for ours, same in pairs], tables.signed))
        rows.append([*row, f"{median(flops):.2f}" if flops else "–", str(len(at_high))])
    slow, fast = map(tables.rate, (low, high))
    head = ["examples of a stage", f"FLOPs saved at {slow}", f"FLOPs saved at {fast}"]
    head += [f"test loss after {config['steps']} steps at {fast}, against “the same 32”"]
    head += ["FLOPs until then, against it", f"runs at {fast}"]
    said = (
        f"batch {config['batch_size']}, stages every {config['interval']} steps, others out of "
        f"{config['pool']} held out; tasks × seeds: {len(places(low, usual))} at {slow}, "
        f"{len(places(high, usual))} at {fast}"
    )
    text = tables.captioned(name, data, said, head, rows)
    if longer:
        ends: dict[str, list[str]] = {}
        for run in longer:
            ends.setdefault(run["task"], []).append(f"{run['test_loss']:.4f} with {of_stage(run['arm'])}")
        said = "; ".join(f"{task} {', '.join(each)}" for task, each in ends.items())
        text += f"\n\nTest losses after {longer[0]['steps']} steps at {fast}, one seed: {said}."
    return text


def of_stage(arm: str) -> str:
    kind, number = arm.split()
    return f"the same {number}" if kind == "fixed" else f"{number} others"


def main(argv: list[str] | None = None) -> None:
    module, name = "stages.resampled", "resampled_validation_tiny"
    parser = record.parser(module, __doc__, out=RESULTS, name=name)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--test-examples", type=int, default=200)
    options = parser.parse_args(argv)
    settings = {"model": "tiny", "steps": options.steps, "batch_size": 64, "interval": 6, "pool": POOL}
    settings |= {"test_examples": options.test_examples, "seeds": options.seeds, "patience": None}
    report = record.provenance(module, argv, kind=KIND)
    report |= {"config": settings, "runs": []}
    path = record.path_of(options.out, name, report["measured_at"])
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
        done[key] = one = measure(cell, options.test_examples, target)
        report["runs"].append(one)
        record.write(report, path)
        print(*key, one["optimizer_steps"], f"{one['test_loss']:.4f}", f"{one['flops'] / 1e12:.3f} TFLOP")
        print("   ", [stage["tau"] for stage in one["stages"]], flush=True)


if __name__ == "__main__":
    main()
