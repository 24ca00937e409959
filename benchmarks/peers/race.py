"""Our Fast Forward beside the authors' loop and PEFT's prototype on the same work: forwards, time, memory.

    python -m benchmarks.peers.race              the embedded model at one learning rate, two seeds: about ten
                                                 minutes on two quiet cores
    python -m benchmarks.peers.race --fast       the same in small: about two minutes; the numbers mean little

For every learning rate and seed, with the same model, data order, adapter initialisation and batch:

    adam            N steps; its final test loss is L*
    linear          ours with the paper's search, until test loss ≤ L* + 1e-4, N steps at most
    parabolic       ours with the bracketing search
    authors         the authors' loop: 2 examples per validation forward, as there
    authors-32      the same with all validation examples in one forward, the best that can be done for it
    peft-prototype  PEFT's prototype: 10 examples, train mode
    adam-tuned      no Fast Forward, a tuned learning rate; what a user would try first

and before that, at another rank, a few stages of each for the memory that it holds (memory.py). A
"forward" is one pass over the validation examples, in however many batches. Seconds of a stage are all that
belongs to Fast Forward, the prototype's clones in other steps too. Test losses are charged to nobody. Writes
one JSON file.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import RESULTS, record, tables
from benchmarks.peers.memory import INTERVAL, PLAIN, attach_of, measure

MODULE = "peers.race"
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
    parser = record.parser(MODULE, __doc__)
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
    options = parser.parse_args(argv)
    if options.fast:
        options.lr, options.seeds, options.steps, options.batch_size = [3e-3], [0], 12, 8
        options.max_length, options.test_examples, options.memory_stages = 24, 48, 3
    options.out = options.out or (Path("runs") if options.fast else RESULTS)
    if options.memory_stages < 3:
        parser.error(f"--memory-stages {options.memory_stages}: growth needs at least 3")
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    import torch

    from ffkernels.training.compare import warm_up

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    document = record.provenance(MODULE, argv, kind="peers")
    document |= {"config": record.settings(options), "memory": memory(options), "runs": []}
    name = f"peers_{Path(options.model).name}"
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as logs:
        warm_up(comparison(options, options.lr[0], options.seeds[0], logs))
        for lr in options.lr:
            for seed in options.seeds:
                document["runs"] += race(options, lr, seed, logs)
                document["summary"] = summary(document["runs"])
                document["promises"] = promises(document)
                # After every race: a long run that is stopped keeps what it has.
                out = record.write(document, options.out, name)
    print("\n".join(["", table({out.name: document}), "", *told(document), f"written: {out}"]))
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
    whole = ("optimizer_steps", "test_loss", "flops", "seconds", "validation_forwards")
    stages = [stage.to_dict() for stage in result.stages]
    for stage in stages:  # the number of its losses in their place: they are hundreds
        stage["forwards"] = len(stage.pop("losses"))
    return {
        **{"name": name, "lr": lr, "seed": seed, "trained_at_lr": config.lr},
        **{key: getattr(result, key) for key in whole},
        "reached": result.reached_target,
        "stages": stages,
    }


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
        of, adam = ([run for run in runs if (run["lr"], run["name"]) == (lr, who)] for who in (name, PLAIN))
        stages = [stage for run in of for stage in run["stages"]]
        seconds, forwards = ([stage[part] for stage in stages] for part in ("seconds", "forwards"))
        flops = ((run["flops"]["measured"], a["flops"]["measured"]) for run, a in zip(of, adam, strict=True))
        middle = ("optimizer_steps", "test_loss", "validation_forwards")
        found.append(
            {
                **{"lr": lr, "name": name, "seeds": len(of)},
                "reached": sum(run["reached"] is not False for run in of),
                **{part: median(run[part] for run in of) for part in middle},
                "forwards_per_stage": median(forwards) if stages else None,
                "seconds_per_stage": median(seconds) if stages else None,
                "seconds_per_forward": sum(seconds) / sum(forwards) if stages else None,
                "seconds": median(run["seconds"]["total"] for run in of),
                "saved_flops_measured": median(1 - own / plain for own, plain in flops),
            }
        )
    return found


def promises(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be shown against the authors' loop, each with what was found."""
    rows = {(row["lr"], row["name"]): row for row in document["summary"]}
    found = []

    def promise(what: str, bound: str, limit: float, value: float) -> None:
        met = value >= limit if bound == "at_least" else value <= limit
        found.append({"what": what, bound: limit, "found": value, "met": met})

    for lr in dict.fromkeys(lr for lr, _ in rows):
        ours, theirs = rows[lr, "parabolic"], rows.get((lr, "authors"))
        if theirs is None or not ours["forwards_per_stage"]:
            continue
        ratio = theirs["validation_forwards"] / ours["validation_forwards"]
        promise(f"forwards, authors / parabolic, lr {lr:g}", "at_least", 2, ratio)
        best = min(of["seconds_per_stage"] for (at, who), of in rows.items() if at == lr and "authors" in who)
        ratio = best / ours["seconds_per_stage"]
        promise(f"seconds per stage, authors' best / parabolic, lr {lr:g}", "at_least", 1, ratio)
    for row in (row for row in document["memory"] if row["name"] in SEARCHES):
        what = f"adapters that memory grows by after the second stage, {row['name']}"
        promise(what, "at_most", 0, row["growth"] / row["adapter_bytes"])
    return found


def told(document: dict[str, Any]) -> list[str]:
    return [
        f"{'kept' if p['met'] else 'NOT KEPT'}: {p['what']}: {p['found']:.2f}" for p in document["promises"]
    ]


def table(results: tables.Results) -> str:
    """Each way to fast-forward on the same work, and what it holds on to; the newest measurement."""
    if (found := tables.newest(results, "peers")) is None:
        return tables.missing(MODULE)
    name, data = found
    config, held = data["config"], {one["name"]: one for one in data["memory"]}
    head = ["way", "optimizer steps", "validation losses", "in a stage", "seconds of a stage"]
    head += ["FLOPs saved (measured)", "time saved", "memory grows per stage, in adapters"]
    rows = []
    for lr in config["lr"]:
        of = {one["name"]: one for one in data["summary"] if one["lr"] == lr}
        for kind in (kind for kind in tables.ORDER if kind in of):
            one, staged = of[kind], of[kind]["forwards_per_stage"] is not None
            row = [tables.LABELS[kind] + (f", lr {tables.rate(lr)}" if len(config["lr"]) > 1 else "")]
            row[0] += "" if one["reached"] == one["seeds"] else f" ({one['reached']}/{one['seeds']} reached)"
            row.append(f"{one['optimizer_steps']:.0f}")
            parts = (
                ("validation_forwards", ".0f"),
                ("forwards_per_stage", ".0f"),
                ("seconds_per_stage", ".2f"),
            )
            row += [format(one[part], form) if staged else "" for part, form in parts]
            saved = (one["saved_flops_measured"], 1 - one["seconds"] / of[PLAIN]["seconds"])
            row += ["" if kind == PLAIN else tables.percent(share) for share in saved]
            row.append(f"{held[kind]['adapters_per_stage']:.0f}" if staged and kind in held else "")
            rows.append(row)
    said = (
        f"{config['task']}, learning rate {', '.join(map(tables.rate, config['lr']))}, batch "
        f"{config['batch_size']}, {tables.counted(len(config['seeds']), 'seed')}; memory at rank "
        f"{config['memory_rank']}"
    )
    return tables.captioned(name, data, said, head, rows)


if __name__ == "__main__":
    main()
