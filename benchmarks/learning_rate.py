"""From any learning rate: what finding one costs and brings, beside sweeps, rules of thumb, other finders.

    python benchmarks/learning_rate.py --plan fast             a dry run
    python benchmarks/learning_rate.py --plan grid             hours on one core; goes on where it was stopped
    python benchmarks/learning_rate.py --plan grid --list      what is left to run

Each run has the FLOPs of so many Adam steps and spends them on whatever it does: steps, validations,
searches. One line of JSON is written per finished run; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any

import checkout  # noqa: F401  puts it on the path
from learning_rate_plan import PLANS, STEPS, WARMUP, Run
from learning_rate_record import document, write


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", choices=PLANS, default="grid")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="runs with all these words")
    parser.add_argument("--until", help="HH:MM of this machine's clock: begin no run after that")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_rate.jsonl"), help="a line per run")
    parser.add_argument("--list", action="store_true", help="say what is left to run, and end")
    parser.add_argument("--result", type=Path, help="make one result file of the runs, and end")
    return parser.parse_args(argv)


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The runs in a file by their key."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["key"]: line for line in lines}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    done = finished(options.runs)
    if options.result is not None:
        command = "python benchmarks/learning_rate.py"
        command += "" if options.plan == "grid" else f" --plan {options.plan}"
        write(document(list(done.values()), command, options.plan == "fast"), options.result)
        return 0
    planned = {run.key: run for run in PLANS[options.plan]()}
    todo = [
        run
        for key, run in planned.items()
        if key not in done and all(word in key.split() for word in options.only)
    ]
    print(f"{len(todo)} runs to do, {len(planned)} planned", flush=True)
    if options.list:
        print("\n".join(run.key for run in todo))
        return 0
    warnings.simplefilter("ignore")
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    benches: dict[str, Any] = {}
    with options.runs.open("a", encoding="utf-8") as file:
        for number, run in enumerate(todo):
            if options.until and _clock() >= options.until:
                print(f"{len(todo) - number} runs were left out: no time")
                return 0
            line = {"key": run.key, **asdict(run), **measure(run, benches), "at": round(time())}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"[{number + 1}/{len(todo)}] {said(line)}", flush=True)
    return 0


def measure(run: Run, benches: dict[str, Any]) -> dict[str, Any]:
    """Train; what cannot be trained is a result with ``failed``."""
    from learning_rate_runs import CONTENDERS, Bench, peers, train

    config = run.config()
    name = f"{config.task} {config.seed} {run.variant}"
    if name not in benches:
        benches[name] = Bench(config)
    make = {**CONTENDERS, **peers()}[run.contender]
    tests: Sequence[float] = ()  # under a decay they say little before its end
    if run.steps > STEPS:
        tests = [i / 10 for i in range(1, 10)]
    elif run.schedule == "constant" and run.seed == 0:
        tests = (0.5, 0.75)
    try:
        return train(
            benches[name],
            make,
            lr=run.lr,
            schedule=run.schedule,
            steps=run.steps,
            warmup=min(WARMUP, run.steps // 10),
            tests=tests,
        )
    except (ValueError, RuntimeError) as error:
        return {"loss": None, "failed": str(error).splitlines()[0]}


def said(line: dict[str, Any]) -> str:
    if line["loss"] is None:
        return f"{line['key']}: FAILED: {line['failed']}"
    found = f", found {line['found']:.4g}" if line["found"] is not None else ""
    return (
        f"{line['key']}: {line['loss']:.4f} after {line['optimizer_steps']} steps{found}, "
        f"{line['forwards']} forwards, {line['seconds']} s"
    )


def _clock() -> str:
    from datetime import datetime

    return datetime.now().strftime("%H:%M")


if __name__ == "__main__":
    sys.exit(main())
