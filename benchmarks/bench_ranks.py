"""How a stage's time falls with the number of processes, beside what docs/distributed.md's model says.

    python benchmarks/bench_ranks.py --out benchmarks/results

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
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import checkout  # noqa: F401  puts it on the path
import torch
import torch.distributed as dist

from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.ranks.ranks import LOSS, ROW_BYTES, Ranks
from ffkernels.ranks.shards import shard_examples
from ffkernels.reporting.machine import machine_info, version_info
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
    """Seconds of each of `repeats` calls, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return taken[1:]


def summary(samples: list[float]) -> dict[str, float]:
    ordered = sorted(samples)
    return {
        "median_ms": 1e3 * median(ordered),
        "p20_ms": 1e3 * ordered[len(ordered) // 5],
        "p80_ms": 1e3 * ordered[4 * len(ordered) // 5],
        "samples": len(ordered),
    }


def work(lengths: list[int], shard: list[int], max_tokens: int, cost: int) -> tuple[int, int]:
    """Padded tokens and forwards of a shard."""
    mine = [lengths[i] for i in shard]
    groups = plan_micro_batches(mine, max_tokens, cost) if mine else []
    return sum(len(group) * max(mine[i] for i in group) for group in groups), len(groups)


def slowest(lengths: list[int], ranks: int, max_tokens: int, cost: int) -> tuple[int, int]:
    shards = shard_examples(lengths, ranks, max_tokens, cost)
    return max((work(lengths, shard, max_tokens, cost) for shard in shards), key=lambda w: w[0] + cost * w[1])


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
            begin = time.perf_counter()
            self.model(**self.batch(self.train[first : first + share])).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps.append(time.perf_counter() - begin)

    def found(self) -> dict:
        found: dict = {name: summary(samples) for name, samples in self.samples.items()}
        plain = [taken for i, taken in enumerate(self.steps, start=1) if i % INTERVAL]
        found["train_step_ms"] = 1e3 * median(plain)
        found["stages"] = [
            {
                "tau": stage.tau,
                "evaluations": stage.evaluations,
                "milliseconds": 1e3 * stage.seconds,
                "validate_ms": 1e3 * stage.validate_seconds,
                "move_ms": 1e3 * stage.move_seconds,
            }
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
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
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
    dist.destroy_process_group()


def start(sizes: list[int], repeats: int) -> dict[str, list[dict]]:
    """{size: what each of its ranks measured}"""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(max(sizes))]
        arguments = ["--rank-of", str(out), "--repeats", str(repeats), "--ranks", *map(str, sizes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run([sys.executable, *launcher, __file__, *arguments], check=True, env=environment)
        return json.loads(out.read_text())


def fit(points: list[list[float]]) -> tuple[float, float]:
    """Least squares of seconds = a · tokens + b · forwards."""
    known = torch.tensor([[tokens, forwards] for _, tokens, forwards, _ in points], dtype=torch.float64)
    seconds = torch.tensor([[taken] for *_, taken in points], dtype=torch.float64)
    per_token, per_forward = torch.linalg.lstsq(known, seconds).solution.flatten().tolist()
    return per_token, per_forward


def measure(sizes: list[int], repeats: int) -> dict:
    cores = machine_info()["cores"]
    report: dict = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": {**machine_info(), "load_before": os.getloadavg()},
        "versions": version_info(),
        "note": f"one thread per rank on {cores} cores: more ranks than cores share them",
        "task": "instruction, 32 examples of at most 256 tokens; embedded model, LoRA rank 8, DDP over gloo",
        "row_bytes": ROW_BYTES,
        "ranks": {},
    }
    per_token = per_forward = alone = 0.0
    lengths: list[int] = []
    found = start(sizes, repeats)
    for size in sizes:
        everyone = found[str(size)]
        first = everyone[0]
        if size == 1:
            lengths = first["lengths"]
            per_token, per_forward = fit(first["fit"])
            report["model"] = {
                "microseconds_per_token": 1e6 * per_token,
                "microseconds_per_forward": 1e6 * per_forward,
                "fitted_on": [
                    {"micro_batch_tokens": m, "tokens": t, "forwards": f, "milliseconds": 1e3 * s}
                    for m, t, f, s in first["fit"]
                ],
            }
        tokens, forwards = slowest(lengths, size, 2048, forward_price(None, CPU))
        whole = max(rank["whole"]["median_ms"] for rank in everyone)
        alone = whole if size == 1 else alone
        crowded = whole / alone
        exchange = first["exchange"]["median_ms"] if size > 1 else 0.0
        predicted = 1e3 * (per_token * tokens + per_forward * forwards) * crowded + exchange
        stages = first["stages"]
        report["ranks"][str(size)] = {
            "slowest_rank": {"tokens": tokens, "forwards": forwards},
            "slowed_by_the_others": crowded,
            "validation": first["validation"],
            "local_of_each_rank": [rank["local"] for rank in everyone],
            "exchange": first["exchange"],
            "train_step_ms": first["train_step_ms"],
            "stages": stages,
            "predicted": {
                "validation_ms": predicted,
                "stage_ms": [
                    stage["evaluations"] * predicted + stage["move_ms"] + 3 * exchange for stage in stages
                ],
            },
            "measured_over_predicted": {
                "validation": first["validation"]["median_ms"] / predicted,
                "stage": [
                    stage["milliseconds"]
                    / (stage["evaluations"] * predicted + stage["move_ms"] + 3 * exchange)
                    for stage in stages
                ],
            },
        }
    report["machine"]["load_after"] = os.getloadavg()
    report["lengths"] = lengths
    report["plan"] = plan(lengths)
    return report


def plan(lengths: list[int]) -> list[dict]:
    """What each number of ranks leaves to the slowest one, and what it receives: no measurement."""
    rows = []
    for size in PLANNED:
        by_cost = {}
        for name, device in (("cpu", CPU), ("gpu", torch.device("cuda"))):
            limit = 2048 if name == "cpu" else 16384
            cost = forward_price(None, device)
            tokens, forwards = slowest(lengths, size, limit, cost)
            alone, times = slowest(lengths, 1, limit, cost)
            share = (tokens + cost * forwards) / (alone + cost * times)
            by_cost[name] = {"tokens": tokens, "forwards": forwards, "of_one_rank": share}
        rows.append({"ranks": size, **by_cost, "bytes_received_per_validation": size * ROW_BYTES})
    return rows


def table(report: dict) -> str:
    lines = ["ranks  tokens  forwards  validation ms (predicted)  stage ms (predicted)  exchange ms  τ"]
    for size, row in report["ranks"].items():
        stages, predicted = row["stages"], row["predicted"]
        measured = " ".join(f"{stage['milliseconds']:.0f}" for stage in stages)
        expected = " ".join(f"{ms:.0f}" for ms in predicted["stage_ms"])
        lines.append(
            f"{size:>5}  {row['slowest_rank']['tokens']:>6}  {row['slowest_rank']['forwards']:>8}  "
            f"{row['validation']['median_ms']:>8.1f} ({predicted['validation_ms']:.1f})  "
            f"{measured} ({expected})  {row['exchange']['median_ms']:.3f}  "
            f"{' '.join(str(stage['tau']) for stage in stages)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for ranks_cpu_<date>.json; else only the table")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="the first must be 1")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of is not None:
        return rank_main(arguments.rank_of, arguments.ranks, arguments.repeats)
    if arguments.ranks[0] != 1:
        parser.error("--ranks must begin with 1, on which the cost model is fitted")
    report = measure(arguments.ranks, arguments.repeats)
    print(table(report))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"ranks_cpu_{report['date'][:10]}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
