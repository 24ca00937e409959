"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkout  # noqa: F401  puts it on the path

import learning_rate
from learning_rate.plan import PLANS, Run
from learning_rate.record import document, write
from learning_rate.table import all_tables


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning_rate",
        description=learning_rate.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", choices=PLANS, default="alignment")
    parser.add_argument("--only", default="", metavar="TEXT", help="workloads whose name has this")
    parser.add_argument("--until", help="HH:MM of this machine's clock: begin no run after that")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_rate.jsonl"), help="a line per run")
    parser.add_argument("--list", action="store_true", help="say what has not run yet, and end")
    parser.add_argument("--result", type=Path, help="write the runs as one result, print its tables, and end")
    return parser.parse_args(argv)


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The runs in a file by their key; a last line that was cut off is none."""
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            run = json.loads(line)
        except ValueError:
            continue
        done[run["key"]] = run
    return done


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    done = finished(options.runs)
    if options.result is not None:
        write(document(done.values(), options.plan), options.result)
        print(all_tables(json.loads(options.result.read_text(encoding="utf-8"))))
        return 0
    items = [item for item in PLANS[options.plan]() if options.only in item.workload.name]
    if options.list:
        print("\n".join(dict.fromkeys(run.key for item in items if (run := item.next(done)) is not None)))
        return 0
    from ffkernels.reporting.machine import git_commit

    warnings.simplefilter("ignore")
    commit = git_commit()
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    benches: dict[Any, Any] = {}
    with options.runs.open("a", encoding="utf-8") as file:
        if file.tell():
            file.write("\n")  # the last line may have been cut off
        for item in items:
            while (run := item.next(done)) is not None:
                if options.until and f"{datetime.now():%H:%M}" >= options.until:
                    return 0
                done[run.key] = line = {**measure(run, benches), "commit": commit}
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(said(line), flush=True)
    return 0


def measure(run: Run, benches: dict[Any, Any]) -> dict[str, Any]:
    """Train; what cannot be trained is a result with ``failed``. The last bench is kept."""
    from learning_rate.bench import Bench, train
    from learning_rate.contenders import CONTENDERS, Work, peers

    workload, which = run.workload, (run.workload.bench, run.seed)
    if which not in benches:
        benches.clear()
        benches[which] = Bench(workload, run.seed)
    head = {
        "key": run.key,
        "workload": workload.name,
        "group": workload.group,
        **asdict(workload),
        "seed": run.seed,
        "contender": run.contender,
        "lr": run.lr,
    }
    work = Work(benches[which], workload.steps, workload.schedule, run.lr)
    make = CONTENDERS.get(run.contender) or peers()[run.contender]
    try:
        return {**head, **train(make, work)}
    except (ValueError, RuntimeError) as error:
        return {**head, "loss": None, "failed": str(error).splitlines()[0]}


def said(line: dict[str, Any]) -> str:
    if line["loss"] is None:
        return f"{line['key']}: {line.get('failed', 'not finite')}"
    rise = f", rise {line['rise']}, peak {line['peak']:.3g}, {line['undos']} undone" if "rise" in line else ""
    rate = "" if line["rate"] is None else f" at {line['rate']:.3g}"
    return f"{line['key']}: {line['loss']:.4f}{rate}{rise}, {line['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
