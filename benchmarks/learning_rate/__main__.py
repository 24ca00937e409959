"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks import learning_rate, record
from benchmarks.learning_rate import peft_table, shares, table
from benchmarks.learning_rate.bench import Bench
from benchmarks.learning_rate.contenders import CONTENDERS, Contender, Work
from benchmarks.learning_rate.plan import PLANS, Item, Run
from benchmarks.learning_rate.record import SHARES, document, resumed
from benchmarks.learning_rate.workloads import Workload
from ffkernels.reporting.machine import choose_device, git_commit, machine_info

# Training losses in a row that are not finite, after which nothing more will come.
HOPELESS = 5


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = record.parser("learning_rate", learning_rate.__doc__)
    parser.add_argument("--plan", choices=PLANS, default="alignment")
    parser.add_argument("--only", default="", metavar="TEXT", help="workloads whose name has this")
    parser.add_argument("--share", default="1/1", metavar="K/N", help="every Nth workload, from the Kth on")
    parser.add_argument("--until", help="HH:MM of this machine's clock: begin no run after that")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RESULT.json",
        help="where there is no file --runs yet, begin it with the runs of this result",
    )
    parser.add_argument("--again", metavar="CONTENDER", help="with --resume: all but its runs, which are due")
    parser.add_argument(
        "--seconds",
        type=float,
        help="begin no run that would end later, by the longest of its workload so far; then write --out",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--runs",
        type=Path,
        help="a line per run; default: runs/learning_rate.jsonl (of a GPU runs/learning_rate_cuda.jsonl), "
        "with --seconds and --out the .jsonl beside its file",
    )
    parser.add_argument("--list", action="store_true", help="say what has not run yet, and end")
    options = parser.parse_args(argv)
    try:
        kind = choose_device(options.device).type
    except ValueError as error:
        parser.error(str(error))
    if options.runs is None:
        beside = options.out is not None and options.seconds is not None
        name = f"learning_rate{'' if kind == 'cpu' else f'_{kind}'}.jsonl"
        options.runs = options.out.with_suffix(".jsonl") if beside else Path("runs", name)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.resume is not None and not options.runs.exists():
        for line in resumed(json.loads(options.resume.read_text(encoding="utf-8")), options.again):
            record.add_line(line, options.runs)
    done = record.lines_of(options.runs, "key")
    if options.out is not None and options.seconds is None:
        result = document(done.values(), options.plan)
        record.write(result, options.out)
        shown = {SHARES: shares, peft_table.KIND: peft_table}.get(result["kind"], table)
        print(shown.all_tables(result))
        return 0
    items = [item for item in PLANS[options.plan]() if options.only in item.workload.name]
    first, of = map(int, options.share.split("/"))
    mine = list(dict.fromkeys(item.workload for item in items))[first - 1 :: of]
    items = [item for item in items if item.workload in mine]
    if options.list:
        print("\n".join(dict.fromkeys(run.key for item in items if (run := item.next(done)) is not None)))
        return 0
    try:
        run_all(items, done, options)
    finally:  # also when it is asked to end
        if options.out is not None and done:
            record.write(document(done.values(), options.plan), options.out)
    failed = [line for line in done.values() if "failed" in line]
    return 1 if failed and options.seconds is not None else 0


def run_all(items: Iterable[Item], done: dict[str, Any], options: argparse.Namespace) -> None:
    """What has not run yet, until the time is up; each line into ``done`` and the file as its run ends."""
    warnings.simplefilter("ignore")
    made, begin = {"commit": git_commit(), "cpu": machine_info()["cpu"]}, perf_counter()
    benches: dict[Any, Any] = {}
    longest: dict[Workload, float] = {}  # seconds of a run, with what was made before its first step
    for item in items:
        while (run := item.next(done)) is not None:
            now = perf_counter()
            if options.until and f"{datetime.now():%H:%M}" >= options.until:
                return
            # Of a new workload no run is known: all others stand for it.
            needed = longest.get(run.workload, max(longest.values(), default=0.0))
            if options.seconds is not None and now + needed > begin + options.seconds:
                print(f"no time is left for {run.key}", flush=True)
                return
            done[run.key] = line = {**measure(run, benches, options.device), **made}
            longest[run.workload] = max(perf_counter() - now, longest.get(run.workload, 0.0))
            record.add_line(line, options.runs)
            print(said(line), flush=True)
            if options.seconds is not None and "failed" in line:
                break  # a sweep without a loss would go on for ever


def peers() -> dict[str, Callable[[Work], Contender]]:
    """Other people's, as far as their packages are installed."""
    from benchmarks.peers.learning_rates import PEERS

    return PEERS


def measure(run: Run, benches: dict[Any, Any], device: str = "cpu") -> dict[str, Any]:
    """Train; what cannot be trained is a result with ``failed``. The last bench is kept."""
    workload, which = run.workload, (run.workload.bench, run.seed)
    head = {"key": run.key, "workload": workload.name, "group": workload.group, **asdict(workload)}
    head |= {"weights": workload.weights, "seed": run.seed, "contender": run.contender, "lr": run.lr}
    if device != "cpu":
        head["device"] = device
    make = CONTENDERS.get(run.contender) or peers()[run.contender]
    # In a GPU's few minutes a method that cannot even be made does not take the others along.
    caught = (ValueError, RuntimeError) if device == "cpu" else Exception
    try:
        if which not in benches:
            benches.clear()
            benches[which] = Bench(workload, run.seed, device=device)
        work = Work(benches[which], workload.steps, workload.schedule, run.lr)
        return {**head, **train(make, work, run.curve)}
    except caught as error:
        if device == "cpu" and which not in benches:
            raise
        return {**head, "loss": None, "failed": (str(error) or type(error).__name__).splitlines()[0]}


def train(make: Callable[[Work], Contender], work: Work, curved: bool = True) -> dict[str, Any]:
    """Train until the budget is spent.

    Returns:
        Plain values: ``loss`` on the test examples at the end (None where it is not finite), ``start``,
        ``rate`` at the end, ``taken`` steps, ``own`` (share of the budget that went to anything but steps),
        ``worst`` training loss as a multiple of ``start`` (None where one was not finite), the step
        ``worst_at`` which it came, ``seconds``, ``curve``, and what the contender reports. A point of the
        curve is [share of the budget, seconds, loss on a quarter of the test examples], one after each tenth
        of the budget; searching counts, testing does not. Without ``curved`` there is none, and FLOPs are not
        counted. On a GPU also what ``Meter`` reports.
    """
    bench, curve, tested = work.bench, [], 0.0
    # Counted off the clock, by a forward and a backward of each shape.
    budget = work.budget if curved else None
    meter = Meter(bench.device)
    begin = perf_counter()
    bench.reset()
    contender = make(work)
    worst, worst_at, broken, step = 0.0, 0, 0, 0
    try:
        while step < work.total and broken < HOPELESS:
            loss = bench.model(**bench.batch(step)).loss
            loss.backward()
            value = loss.item()
            meter.step()
            broken = 0 if math.isfinite(value) else broken + 1
            if (part := math.inf if broken else value / bench.start) > worst:
                worst, worst_at = part, step + 1
            contender.step(step, value)
            step += 1
            if curved and (spent := work.spent(step)) >= 0.1 * (
                1 + (int(10 * curve[-1][0] + 1e-9) if curve else 0)
            ):
                bench.wait()
                now = perf_counter()
                with contender.evaluating():
                    few = bench.test_loss(few=True)
                curve.append([round(spent, 4), round(now - begin - tested, 2), finite(few)])
                tested += perf_counter() - now
        bench.wait()
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
        "own": work.charged / (budget or work.budget) if work.charged else 0.0,
        "worst": worst if math.isfinite(worst) else None,
        "worst_at": worst_at,
        "seconds": round(seconds, 1),
        "curve": curve,
        **meter.report(),
        **report,
    }


class Meter:
    """What a run needs of a GPU; on a CPU nothing is reported."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._at = device, []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def step(self) -> None:
        """Called in each step after the training loss has been read, which the device was waited for."""
        self._at.append(perf_counter())

    def report(self) -> dict[str, float]:
        """``seconds_per_step``, median from one read of the training loss to the next, which is forward,
        backward, update and what the contender does; ``peak_gigabytes`` allocated, test losses included."""
        if self.device.type != "cuda":
            return {}
        found = {"peak_gigabytes": torch.cuda.max_memory_allocated(self.device) / 1e9}
        each = [after - before for before, after in pairwise(self._at)]
        return {"seconds_per_step": median(each), **found} if each else found


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
