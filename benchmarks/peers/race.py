"""Our Fast Forward beside the authors' loop and PEFT's prototype on the same work: forwards, time, memory.

    python benchmarks/bench_peers.py             the embedded model at one learning rate, two seeds: about ten
                                                 minutes on two quiet cores
    python benchmarks/bench_peers.py --fast      the same in small: about two minutes; the numbers mean little

For every learning rate and seed, with the same model, data order, adapter initialisation and batch:

    adam            N steps; its final test loss is L*
    linear          ours with the paper's search, until test loss ≤ L* + 1e-4, N steps at most
    parabolic       ours with the bracketing search
    authors         the authors' loop: 2 examples per validation forward, as there
    authors-32      the same with all validation examples in one forward, the best that can be done for it
    peft-prototype  PEFT's prototype: 10 examples, train mode
    adam-tuned      no Fast Forward, a tuned learning rate; what a user would try first

and before that, at another rank, a few stages of each for the memory that it holds (peers_memory.py). A
"forward" is one pass over the validation examples, in however many batches. Seconds of a stage are all that
belongs to Fast Forward, the prototype's clones in other steps too. Test losses are charged to nobody. Writes
one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from checkout import ROOT
from peers_memory import INTERVAL, PLAIN, attach_of, measure

RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = 1e-4
SEARCHES = ("linear", "parabolic")
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "authors": ("authors", {}),
    "authors-32": ("authors", {"eval_batch_size": 32}),
    "peft-prototype": ("peft-prototype", {}),
    "salsa": ("salsa", {}),
}
USUAL = ["authors", "authors-32", "peft-prototype"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="instruction")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=USUAL)
    parser.add_argument("--steps", type=int, default=120, help="of the Adam run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--test-examples", type=int, default=1000)
    parser.add_argument("--tuned-lr", type=float, default=1e-2)
    parser.add_argument("--memory-stages", type=int, default=4)
    parser.add_argument("--memory-rank", type=int, default=64, help="the authors' default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fast", action="store_true", help="small and quick; the numbers mean little")
    parser.add_argument("--out", type=Path, help="the JSON file; default benchmarks/results/, --fast: runs/")
    options = parser.parse_args(argv)
    if options.fast:
        options.lr, options.seeds, options.steps, options.batch_size = [3e-3], [0], 12, 8
        options.max_length, options.test_examples, options.memory_stages = 24, 48, 3
    if options.memory_stages < 3:
        parser.error(f"--memory-stages {options.memory_stages}: growth needs at least 3")
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    import torch

    from ffkernels.reporting.machine import machine_info, version_info
    from ffkernels.training.compare import warm_up

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    began = datetime.now(timezone.utc)
    folder = Path("runs") if options.fast else RESULTS
    out = options.out or folder / f"peers_{Path(options.model).name}_{began:%Y-%m-%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "kind": "peers",
        "measured_at": began.isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/bench_peers.py", *(sys.argv[1:] if argv is None else argv)]),
        "config": {k: v for k, v in vars(options).items() if k != "out"},
        "machine": {**machine_info(), "load": os.getloadavg() if hasattr(os, "getloadavg") else None},
        "versions": version_info(),
        "memory": memory(options),
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as logs:
        warm_up(comparison(options, options.lr[0], options.seeds[0], logs))
        for lr in options.lr:
            for seed in options.seeds:
                document["runs"] += race(options, lr, seed, logs)
                document["summary"] = summary(document["runs"])
                document["promises"] = promises(document)
                # After every race: a long run that is stopped keeps what it has.
                out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(["", *table(document), "", f"written: {out}"]))
    return document


def comparison(options: argparse.Namespace, lr: float, seed: int, out: str, **changes: Any) -> Any:
    """The paper's protocol for one learning rate and seed."""
    from ffkernels.training.compare import Comparison
    from ffkernels.training.config import TrainConfig

    names = (
        "model",
        "task",
        "batch_size",
        "max_length",
        "rank",
        "test_examples",
        "device",
        "threads",
        "steps",
    )
    given = {name: getattr(options, name) for name in names}
    # LoRA's factor alpha / rank stays 2, as in the other measurements here.
    base = TrainConfig(**{**given, "alpha": 2 * options.rank, "lr": lr, "out": out, **changes})
    peers = dict.fromkeys(PEERS[name][0] for name in options.peers)  # for the warm-up
    return Comparison(base, seeds=(seed,), searches=SEARCHES, peers=tuple(peers), tolerance=TOLERANCE)


def race(options: argparse.Namespace, lr: float, seed: int, logs: str) -> list[dict[str, Any]]:
    """Adam, and every other method until it is as good."""
    from ffkernels import FastForwardConfig
    from ffkernels.training.trainer import train

    protocol = comparison(options, lr, seed, logs)
    rows = []

    def run(name: str, config: Any, peer: str | None = None, settings: dict[str, Any] | None = None) -> Any:
        result = train(config, save=False, attach=attach_of(peer, settings or {}))
        rows.append(row(name, lr, seed, config, result))
        seconds = sum(stage.seconds for stage in result.stages)
        print(
            f"  lr {lr:g}, seed {seed}, {name}: {result.optimizer_steps} steps to {result.test_loss:.4f}, "
            f"{result.validation_forwards} forwards and {seconds:.2f} s in {len(result.stages)} stages",
            flush=True,
        )
        return result

    adam = run(PLAIN, protocol.adam(seed))
    for search in SEARCHES:
        run(search, protocol.until(adam, seed, search, fast_forward=FastForwardConfig(search=search)))
    for name in options.peers:
        run(name, protocol.until(adam, seed, name), *PEERS[name])
    run("adam-tuned", protocol.until(adam, seed, "adam-tuned", lr=options.tuned_lr))
    return rows


def row(name: str, lr: float, seed: int, config: Any, result: Any) -> dict[str, Any]:
    return {
        "name": name,
        "lr": lr,
        "seed": seed,
        "trained_at_lr": config.lr,
        "optimizer_steps": result.optimizer_steps,
        "test_loss": result.test_loss,
        "reached": result.reached_target,
        "flops": result.flops,
        "seconds": result.seconds,
        "validation_forwards": result.validation_forwards,
        "stages": [stage_row(stage.to_dict()) for stage in result.stages],
    }


def stage_row(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage was, with the number of its losses in their place: they are hundreds."""
    losses = stage.pop("losses")
    return {**stage, "forwards": len(losses)}


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A few stages of each method. A large learning rate keeps them short: bytes do not depend on it."""
    from ffkernels import FastForwardConfig

    plain = comparison(options, 3e-3, 0, "runs").adam(0)
    rank, steps = options.memory_rank, INTERVAL * options.memory_stages
    plain = replace(plain, rank=rank, alpha=2 * rank, steps=steps, batch_size=8, test_examples=32)
    methods: dict[str, Any] = {PLAIN: (plain, None, {})}
    for search in SEARCHES:  # with patience they would be switched off after a few stages without a step
        ff = FastForwardConfig(search=search, patience=None, interval=INTERVAL)
        methods[search] = (replace(plain, fast_forward=ff), None, {})
    methods |= {name: (plain, *PEERS[name]) for name in options.peers}
    return measure(methods)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per learning rate and method, medians over the seeds; of stages, medians over all of them."""
    found = []
    for lr, name in dict.fromkeys((run["lr"], run["name"]) for run in runs):
        of = [run for run in runs if (run["lr"], run["name"]) == (lr, name)]
        adam = [run for run in runs if (run["lr"], run["name"]) == (lr, PLAIN)]
        stages = [stage for run in of for stage in run["stages"]]
        seconds = [stage["seconds"] for stage in stages]
        forwards = [stage["forwards"] for stage in stages]
        saved = [
            1 - run["flops"]["measured"] / a["flops"]["measured"] for run, a in zip(of, adam, strict=True)
        ]
        found.append(
            {
                "lr": lr,
                "name": name,
                "reached": sum(run["reached"] is not False for run in of),
                "seeds": len(of),
                "optimizer_steps": median(run["optimizer_steps"] for run in of),
                "test_loss": median(run["test_loss"] for run in of),
                "validation_forwards": median(run["validation_forwards"] for run in of),
                "forwards_per_stage": median(forwards) if stages else None,
                "seconds_per_stage": median(seconds) if stages else None,
                "seconds_per_forward": sum(seconds) / sum(forwards) if stages else None,
                "seconds": median(run["seconds"]["total"] for run in of),
                "saved_flops_measured": median(saved),
            }
        )
    return found


def promises(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be shown against the authors' loop, each with what was found."""
    rows = {(row["lr"], row["name"]): row for row in document["summary"]}
    told = []
    for lr in dict.fromkeys(lr for lr, _ in rows):
        ours, theirs = rows[lr, "parabolic"], rows.get((lr, "authors"))
        if theirs is None or not ours["forwards_per_stage"]:
            continue
        ratio = theirs["validation_forwards"] / ours["validation_forwards"]
        told.append({"what": f"forwards, authors / parabolic, lr {lr:g}", "at_least": 2, "found": ratio})
        best = min(
            rows[key]["seconds_per_stage"] for key in rows if key[0] == lr and key[1].startswith("authors")
        )
        ratio = best / ours["seconds_per_stage"]
        told.append(
            {
                "what": f"seconds per stage, authors' best / parabolic, lr {lr:g}",
                "at_least": 1,
                "found": ratio,
            }
        )
    for row in document["memory"]:
        if row["name"] in SEARCHES:
            what = f"adapters that memory grows by after the second stage, {row['name']}"
            told.append({"what": what, "at_most": 0, "found": row["growth"] / row["adapter_bytes"]})
    for promise in told:
        least, most = promise.get("at_least"), promise.get("at_most")
        promise["met"] = promise["found"] >= least if least is not None else promise["found"] <= most
    return told


def table(document: dict[str, Any]) -> list[str]:
    """The document in Markdown."""
    lines = [
        "| lr | method | steps | test loss | forwards | a stage | s a stage | ms a forward | FLOPs saved |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in document["summary"]:
        staged = row["forwards_per_stage"] is not None
        cells = [
            f"{row['lr']:g}",
            row["name"]
            + ("" if row["reached"] == row["seeds"] else f" ({row['reached']}/{row['seeds']} reached)"),
            f"{row['optimizer_steps']:g}",
            f"{row['test_loss']:.4f}",
            f"{row['validation_forwards']:g}" if staged else "–",
            f"{row['forwards_per_stage']:g}" if staged else "–",
            f"{row['seconds_per_stage']:.2f}" if staged else "–",
            f"{1000 * row['seconds_per_forward']:.1f}" if staged else "–",
            f"{row['saved_flops_measured']:.0%}".replace("%", " %") if row["name"] != PLAIN else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| method | held beyond Adam after each stage, in adapters | grows per stage | resident MiB |",
        "|---|---|---:|---|",
    ]
    for row in document["memory"]:
        adapter = row["adapter_bytes"]
        held = ", ".join(f"{bytes_ / adapter:.2f}" for bytes_ in row["beyond_adam"])
        resident = ", ".join("–" if r is None else f"{r / 2**20:.0f}" for r in row["resident"])
        lines.append(f"| {row['name']} | {held} | {row['adapters_per_stage']:.2f} | {resident} |")
    lines += [
        "",
        *(
            f"{'kept' if p['met'] else 'NOT KEPT'}: {p['what']}: {p['found']:.2f}"
            for p in document["promises"]
        ),
    ]
    return lines


if __name__ == "__main__":
    main()
