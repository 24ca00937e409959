"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import learning_rate, record
from benchmarks.learning_rate import peft_table
from benchmarks.learning_rate.bench import Bench
from benchmarks.learning_rate.contenders import CONTENDERS, Contender, Work
from benchmarks.learning_rate.plan import PLANS, Run
from benchmarks.learning_rate.record import document
from benchmarks.learning_rate.table import all_tables

# Training losses in a row that are not finite, after which nothing more will come.
HOPELESS = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = record.parser("learning_rate", learning_rate.__doc__)
    parser.add_argument("--plan", choices=PLANS, default="alignment")
    parser.add_argument("--only", default="", metavar="TEXT", help="workloads whose name has this")
    parser.add_argument("--until", help="HH:MM of this machine's clock: begin no run after that")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_rate.jsonl"), help="a line per run")
    parser.add_argument("--list", action="store_true", help="say what has not run yet, and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    done = record.lines_of(options.runs, "key")
    if options.out is not None:
        result = document(done.values(), options.plan)
        record.write(result, options.out)
        print(peft_table.peft_methods({"": result}) if options.plan == "peft" else all_tables(result))
        return 0
    items = [item for item in PLANS[options.plan]() if options.only in item.workload.name]
    if options.list:
        print("\n".join(dict.fromkeys(run.key for item in items if (run := item.next(done)) is not None)))
        return 0
    from ffkernels.reporting.machine import git_commit

    warnings.simplefilter("ignore")
    commit = git_commit()
    benches: dict[Any, Any] = {}
    for item in items:
        while (run := item.next(done)) is not None:
            if options.until and f"{datetime.now():%H:%M}" >= options.until:
                return 0
            done[run.key] = line = {**measure(run, benches), "commit": commit}
            record.add_line(line, options.runs)
            print(said(line), flush=True)
    return 0


def peers() -> dict[str, Callable[[Work], Contender]]:
    """Other people's, as far as their packages are installed."""
    from benchmarks.peers.learning_rates import PEERS

    return PEERS


def measure(run: Run, benches: dict[Any, Any]) -> dict[str, Any]:
    """Train; what cannot be trained is a result with ``failed``. The last bench is kept."""
    workload, which = run.workload, (run.workload.bench, run.seed)
    if which not in benches:
        benches.clear()
        benches[which] = Bench(workload, run.seed)
    head = {"key": run.key, "workload": workload.name, "group": workload.group, **asdict(workload)}
    head |= {"seed": run.seed, "contender": run.contender, "lr": run.lr}
    work = Work(benches[which], workload.steps, workload.schedule, run.lr)
    make = CONTENDERS.get(run.contender) or peers()[run.contender]
    try:
        return {**head, **train(make, work, run.curve)}
    except (ValueError, RuntimeError) as error:
        return {**head, "loss": None, "failed": str(error).splitlines()[0]}


def train(make: Callable[[Work], Contender], work: Work, curved: bool = True) -> dict[str, Any]:
    """Train until the budget is spent.

    Returns:
        Plain values: ``loss`` on the test examples at the end (None where it is not finite), ``start``,
        ``rate`` at the end, ``taken`` steps, ``own`` (share of the budget that went to anything but steps),
        ``worst`` training loss as a multiple of ``start`` (None where one was not finite), the step
        ``worst_at`` which it came, ``seconds``, ``curve``, and what the contender reports. A point of the
        curve is [share of the budget, seconds, loss on a quarter of the test examples], one after each tenth
        of the budget; searching counts, testing does not. Without ``curved`` it is empty.
    """
    begin, bench, curve, tested = perf_counter(), work.bench, [], 0.0
    bench.reset()
    contender = make(work)
    worst, worst_at, broken, step = 0.0, 0, 0, 0
    try:
        while step < work.total and broken < HOPELESS:
            loss = bench.model(**bench.batch(step)).loss
            loss.backward()
            value = loss.item()
            broken = 0 if math.isfinite(value) else broken + 1
            if (part := math.inf if broken else value / bench.start) > worst:
                worst, worst_at = part, step + 1
            if contender.before_step is not None:
                contender.before_step(step, value)
            contender.optimizer.step()
            contender.optimizer.zero_grad(set_to_none=True)
            if contender.scheduler is not None:
                contender.scheduler.step()
            step += 1
            if contender.after_step is not None:
                contender.after_step(step - 1, value)
            if curved and (spent := work.spent(step)) >= 0.1 * (
                1 + (int(10 * curve[-1][0] + 1e-9) if curve else 0)
            ):
                now = perf_counter()
                with contender.evaluating():
                    few = bench.test_loss(few=True)
                curve.append([round(spent, 4), round(now - begin - tested, 2), finite(few)])
                tested += perf_counter() - now
        seconds = perf_counter() - begin - tested
        with contender.evaluating():
            end = bench.test_loss()
        report = {"rate": contender.rate(), **contender.report()}
    finally:
        contender.close()
    return {
        "loss": finite(end),
        "start": round(bench.start, 5),
        "taken": step,
        "own": work.charged / work.budget if work.charged else 0.0,
        "worst": worst if math.isfinite(worst) else None,
        "worst_at": worst_at,
        "seconds": round(seconds, 1),
        "curve": curve,
        **report,
    }


def finite(loss: float) -> float | None:
    return round(loss, 5) if math.isfinite(loss) else None


def said(line: dict[str, Any]) -> str:
    if line["loss"] is None:
        return f"{line['key']}: {line.get('failed', 'not finite')}"
    rise = f", rise {line['rise']}, peak {line['peak']:.3g}, {line['undos']} undone" if "rise" in line else ""
    rate = "" if line["rate"] is None else f" at {line['rate']:.3g}"
    return f"{line['key']}: {line['loss']:.4f}{rate}{rise}, {line['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
