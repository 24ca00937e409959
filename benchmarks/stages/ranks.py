"""How a stage's time falls with the number of processes, beside what docs/distributed.md's model says.

    python -m benchmarks.stages.ranks --out benchmarks/results

Lets 1, 2 and 4 ranks over gloo, one thread each, train LoRA on the embedded model with DDP, and measures one
validation of 32 examples, its local part, one exchange and whole stages, of all sizes in turn. The model's
two constants, seconds per token and per forward, are fitted on one rank alone, with micro-batches of
different sizes; what it predicts for the others stands beside what was measured there. Ranks of one machine
slow each other down, sharing cores, caches and memory, which ranks with a GPU each do not: how much is
measured apart, as the time of the whole set's forward on all ranks at once over that on one, and is part of
the prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ROOT, record, tables
from benchmarks.timing import seconds_of, summary
from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.ranks.ranks import LOSS, ROW_BYTES, Ranks
from ffkernels.ranks.shards import shard_examples
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.tasks import collate, load_task
from ffkernels.validation.fast import LabelledLoss
from ffkernels.validation.forward_price import forward_price
from ffkernels.validation.micro_batches import plan_micro_batches

CPU = torch.device("cpu")
STAGES, INTERVAL, BATCH = 2, 6, 16
MICRO_BATCHES = (256, 384, 512, 768, 1024, 2048)
PLANNED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def timed(call, repeats: int) -> list[float]:
    """Seconds of each of ``repeats`` calls, after one that is not counted."""
    return [seconds_of(call) for _ in range(repeats + 1)][1:]


def work(lengths: list[int], shard: list[int], max_tokens: int, cost: int) -> tuple[int, int]:
    """Padded tokens and forwards of a shard."""
    mine = [lengths[i] for i in shard]
    groups = plan_micro_batches(mine, max_tokens, cost) if mine else []
    return sum(len(group) * max(mine[i] for i in group) for group in groups), len(groups)


def slowest(lengths: list[int], ranks: int, max_tokens: int, cost: int) -> tuple[int, int]:
    shards = shard_examples(lengths, ranks, max_tokens, cost)
    return max((work(lengths, shard, max_tokens, cost) for shard in shards), key=lambda w: w[0] + cost * w[1])


def share(lengths: list[int], ranks: int, device: str) -> tuple[int, int, float]:
    """Padded tokens and forwards of the slowest rank, and its share of a forward of the whole set."""
    limit, cost = 2048 if device == "cpu" else 16384, forward_price(None, torch.device(device))
    (tokens, forwards), (whole, times) = (slowest(lengths, n, limit, cost) for n in (ranks, 1))
    return tokens, forwards, (tokens + cost * forwards) / (whole + cost * times)


class Job:
    """Training by the first `size` ranks: the embedded model with LoRA in DDP, 32 examples, Fast Forward."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, dist.get_rank()
        # One process is a group too, so that all sizes run the same training loop.
        self.group = dist.new_group(list(range(size)))
        if not self.member:
            return
        model, tokenizer = load_model("tiny")
        model = add_adapter(model, rank=8, seed=0)
        task = load_task("instruction", tokenizer, test_examples=64, max_length=256)
        self.train, self.held_out, self.pad = task.train, task.validation, tokenizer.pad_token_id
        self.model = torch.nn.parallel.DistributedDataParallel(model, process_group=self.group)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.validation = self.loss()
        self.lengths = [row.computed for row in self.validation.rows]
        rows = (self.validation.causal_lm, self.validation.rows)
        self.whole = LabelledLoss(*rows, max_tokens=2048, device=CPU)
        self.ranks = Ranks(CPU, self.group)
        config = FastForwardConfig(interval=INTERVAL, patience=None)
        self.ff = FastForward(self.model, self.optimizer, self.validation, config)
        self.samples: dict[str, list[float]] = {"validation": [], "local": [], "whole": [], "exchange": []}
        self.fit: list[list[float]] = []
        if size == 1:
            self.losses = [self.loss(micro_batch_tokens=tokens, check=False) for tokens in MICRO_BATCHES]
        self.steps: list[float] = []

    @property
    def member(self) -> bool:
        return self.rank < self.size

    def batch(self, examples):
        return collate(examples, self.pad)

    def loss(self, **settings) -> ValidationLoss:
        examples = [self.batch([example]) for example in self.held_out]
        return ValidationLoss(self.model, examples, **settings)

    def measure(self) -> None:
        """One round."""
        calls = {
            "validation": self.validation,
            "local": lambda: self.validation.evaluator.run(self.validation._loss.part),
            "whole": lambda: self.validation.evaluator.run(self.whole.evaluate),
        }
        for name, call in calls.items():
            self.ranks.exchange(LOSS)  # together
            self.samples[name] += timed(call, 1)
        self.samples["exchange"] += timed(lambda: self.ranks.exchange(LOSS, 1.0, 1.0), 10)
        if self.size == 1:
            self.fit.append([timed(loss, 1)[0] for loss in self.losses])

    def train_to_the_next_stage(self) -> None:
        share, stages = BATCH // self.size, len(self.ff.stages)
        while len(self.ff.stages) == stages:
            first = BATCH * self.ff.optimizer_steps + share * self.rank
            batch = self.train[first : first + share]
            self.steps.append(seconds_of(lambda batch=batch: self.step(batch)))

    def step(self, examples: list) -> None:
        self.model(**self.batch(examples)).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def found(self) -> dict:
        found: dict = {name: summary(samples, 1e3, "_ms") for name, samples in self.samples.items()}
        plain = [taken for i, taken in enumerate(self.steps, start=1) if i % INTERVAL]
        found["train_step_ms"] = 1e3 * median(plain)
        names = {"milliseconds": "seconds", "validate_ms": "validate_seconds", "move_ms": "move_seconds"}
        found["stages"] = [
            {"tau": stage.tau, "evaluations": stage.evaluations}
            | {ms: 1e3 * getattr(stage, name) for ms, name in names.items()}
            for stage in self.ff.stages
        ]
        if self.size == 1:
            found["lengths"] = self.lengths
            everything = list(range(len(self.lengths)))
            found["fit"] = [
                [tokens, *work(self.lengths, everything, tokens, forward_price(None, CPU)), median(taken)]
                for tokens, taken in zip(MICRO_BATCHES, zip(*self.fit, strict=True), strict=True)
            ]
        return found


def rank_main(out: Path, sizes: list[int], repeats: int) -> None:
    """What one rank does: jobs of all sizes in turn, so that a machine that slows down slows all of them."""
    jobs = [Job(size) for size in sizes]
    for _ in range(repeats):
        for job in jobs:
            dist.barrier()
            if job.member:
                job.measure()
    for _ in range(STAGES):
        for job in jobs:
            dist.barrier()
            if job.member:
                job.train_to_the_next_stage()
    dist.barrier()
    mine = {job.size: job.found() for job in jobs if job.member}
    everyone = Ranks(CPU).gather_bytes(json.dumps(mine).encode())
    if dist.get_rank() == 0:
        ranks = [json.loads(text) for text in everyone]
        by_size = {str(size): [rank[str(size)] for rank in ranks if str(size) in rank] for size in sizes}
        out.write_text(json.dumps(by_size))


def start(module: str, size: int, *arguments: object) -> Any:
    """Run ``benchmarks.<module>`` on so many ranks, of one thread each; what its first one has written."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        own = ["-m", f"benchmarks.{module}", "--rank-of", out, *arguments]
        command = [sys.executable, *launcher, *map(str, own)]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        return json.loads(out.read_text())


def as_rank(work: Callable[[], None]) -> None:
    """What one of them does between joining the others and leaving them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work()
    dist.destroy_process_group()


def fit(points: list[list[float]]) -> tuple[float, float]:
    """Least squares of seconds = a · tokens + b · forwards."""
    known = torch.tensor([[tokens, forwards] for _, tokens, forwards, _ in points], dtype=torch.float64)
    seconds = torch.tensor([[taken] for *_, taken in points], dtype=torch.float64)
    per_token, per_forward = torch.linalg.lstsq(known, seconds).solution.flatten().tolist()
    return per_token, per_forward


def measure(sizes: list[int], found: dict[str, list[dict]]) -> dict:
    """What was measured by rank, beside what the model says that is fitted on one rank."""
    report: dict = {"ranks": {}}
    lengths = found["1"][0]["lengths"]
    per_token, per_forward = fit(found["1"][0]["fit"])
    names = ("micro_batch_tokens", "tokens", "forwards", "milliseconds")
    report["model"] = {
        "microseconds_per_token": 1e6 * per_token,
        "microseconds_per_forward": 1e6 * per_forward,
        "fitted_on": [dict(zip(names, (*of, 1e3 * s), strict=True)) for *of, s in found["1"][0]["fit"]],
    }
    alone = found["1"][0]["whole"]["median_ms"]
    for size in sizes:
        everyone = found[str(size)]
        first, stages = everyone[0], everyone[0]["stages"]
        tokens, forwards, _ = share(lengths, size, "cpu")
        crowded = max(rank["whole"]["median_ms"] for rank in everyone) / alone
        exchange = first["exchange"]["median_ms"] if size > 1 else 0.0
        predicted = 1e3 * (per_token * tokens + per_forward * forwards) * crowded + exchange
        of_stage = [s["evaluations"] * predicted + s["move_ms"] + 3 * exchange for s in stages]
        over = [s["milliseconds"] / ms for s, ms in zip(stages, of_stage, strict=True)]
        report["ranks"][str(size)] = {
            "slowest_rank": {"tokens": tokens, "forwards": forwards},
            "slowed_by_the_others": crowded,
            "validation": first["validation"],
            "local_of_each_rank": [rank["local"] for rank in everyone],
            "exchange": first["exchange"],
            "train_step_ms": first["train_step_ms"],
            "stages": stages,
            "predicted": {"validation_ms": predicted, "stage_ms": of_stage},
            "measured_over_predicted": {
                "validation": first["validation"]["median_ms"] / predicted,
                "stage": over,
            },
        }
    return {**report, "lengths": lengths, "plan": plan(lengths)}


def plan(lengths: list[int]) -> list[dict]:
    """What each number of ranks leaves to the slowest one, and what it receives: no measurement."""
    rows = []
    for size in PLANNED:
        row: dict = {"ranks": size}
        for device in ("cpu", "gpu"):
            of = share(lengths, size, "cuda" if device == "gpu" else "cpu")
            row[device] = dict(zip(("tokens", "forwards", "of_one_rank"), of, strict=True))
        rows.append({**row, "bytes_received_per_validation": size * ROW_BYTES})
    return rows


def table(report: dict) -> str:
    head = [
        "ranks",
        "tokens",
        "forwards",
        "validation ms (predicted)",
        "stage ms (predicted)",
        "exchange ms",
        "τ",
    ]
    rows = []
    for size, row in report["ranks"].items():
        measured = " ".join(f"{stage['milliseconds']:.0f}" for stage in row["stages"])
        expected = " ".join(f"{ms:.0f}" for ms in row["predicted"]["stage_ms"])
        rows.append([size, *map(str, row["slowest_rank"].values())])
        rows[-1] += [f"{row['validation']['median_ms']:.1f} ({row['predicted']['validation_ms']:.1f})"]
        rows[-1] += [f"{measured} ({expected})", f"{row['exchange']['median_ms']:.3f}"]
        rows[-1] += [" ".join(str(stage["tau"]) for stage in row["stages"])]
    return tables.aligned(head, rows)


def main() -> None:
    module, name = "stages.ranks", "ranks_cpu"
    parser = record.parser(module, __doc__, name=name)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="the first must be 1")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes, repeats = options.ranks, options.repeats
    if options.rank_of is not None:
        return as_rank(lambda: rank_main(options.rank_of, sizes, repeats))
    if sizes[0] != 1:
        parser.error("--ranks must begin with 1, on which the cost model is fitted")
    head = record.provenance(module, row_bytes=ROW_BYTES)
    head["note"] = (
        f"one thread per rank on {head['machine']['cores']} cores: more ranks than cores share them"
    )
    head["task"] = (
        "instruction, 32 examples of at most 256 tokens; embedded model, LoRA rank 8, DDP over gloo"
    )
    report = head | measure(sizes, start(module, max(sizes), "--repeats", repeats, "--ranks", *sizes))
    print(table(report))
    if options.out is not None:
        print(record.write(report, options.out, name))


if __name__ == "__main__":
    main()
