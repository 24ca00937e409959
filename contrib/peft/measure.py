#!/usr/bin/env python3
"""Memory and time of Fast Forward inside PEFT, beside plain AdamW and the prototype of PEFT's PR #2693.

    python contrib/peft/measure.py memory --model tiny --out contrib/peft/results
    python contrib/peft/measure.py memory --model smollm2-135m --out contrib/peft/results
    python contrib/peft/measure.py time --out contrib/peft/results

`memory` trains a few steps with every method from the same weights and records every allocation of torch's CPU
allocator (exact bytes, from the profiler), so it does not depend on what else the machine does. `time` trains AdamW
for a number of steps and all others until they reach its test loss, in turn, and counts CPU seconds of one thread.
The prototype is our own rendition of what that PR does, with its 10 examples in one batch.

Needs ffkernels for the models and the data. The optimizer is the one in this folder.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch


HERE = Path(__file__).resolve().parent
INTERVAL = 6
LR = 1e-4
NAMES = {
    "adamw": "AdamW",
    "prototype": "prototype of #2693",
    "fast-forward-linear": "this proposal, `linear`",
    "fast-forward-parabolic": "this proposal, `parabolic`",
    "adamw-tuned": "AdamW, tuned lr",
}


def fast_forward_module():
    """The module in this folder, as a part of the installed PEFT."""
    name = "peft.optimizers.fast_forward"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / "src/peft/optimizers/fast_forward.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Prototype:
    """How the prototype trains.

    Before every step it clones all parameters, the frozen ones too. On the interval's last step it adds the update of
    all parameters to them again and again and compares with the loss before; the first addition is not compared with
    anything, the last one is not undone. The model stays in training mode, autograd records, and the loss is divided
    by the number of tokens of the training batch.
    """

    def __init__(self, model, optimizer, batch, limit: int) -> None:
        self.model, self.optimizer, self.batch, self.limit = model, optimizer, batch, limit
        self.steps = 0
        self.losses: list[float] = []

    def before_forward(self, training_batch) -> None:
        self.number = training_batch["attention_mask"].sum().item()
        self.previous = [param.data.clone() for param in self.model.parameters()]

    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % INTERVAL:
            return
        current = [param.data for param in self.model.parameters()]
        self.update = [now - before for now, before in zip(current, self.previous)]
        last = None
        for _ in range(self.limit):
            for now, update in zip(current, self.update):
                now += update
            self.outputs = self.model(**self.batch, num_items_in_batch=self.number)
            self.losses.append(self.outputs.loss.item())
            if last is not None and last < self.outputs.loss:
                break
            last = self.outputs.loss
        self.last = last


class Plain:
    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer
        self.step = optimizer.step

    def before_forward(self, training_batch) -> None:
        pass

    @property
    def losses(self) -> list[float]:
        fast_forward = getattr(self.optimizer, "fast_forward", None)
        return [loss for stage in fast_forward.stages for _, loss in stage.losses] if fast_forward else []


class Setting:
    """A model, its data, and every method on it from the same start."""

    def __init__(self, model: str, *, batch_size: int, max_length: int, limit: int, seed: int = 0) -> None:
        from ffkernels.training.models import load_model
        from ffkernels.training.tasks import collate, load_task

        self.name, self.batch_size, self.limit, self.seed = model, batch_size, limit, seed
        self.base, tokenizer = load_model(model)
        task = load_task("instruction", tokenizer, max_length=max_length, seed=seed, test_examples=256)
        pad = tokenizer.pad_token_id or 0
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
        self.train_examples = [task.train[i] for i in order]
        self.collate = lambda examples: collate(examples, pad)
        self.validation = self._batches(task.validation)
        self.prototype_batch = self.collate(task.validation[:10])
        self.test = self._batches(task.test)
        self.model = None

    def _batches(self, examples):
        return [self.collate(examples[i : i + self.batch_size]) for i in range(0, len(examples), self.batch_size)]

    def batches(self):
        for start in itertools.count(0, self.batch_size):
            rows = [self.train_examples[(start + i) % len(self.train_examples)] for i in range(self.batch_size)]
            yield self.collate(rows)

    def fresh_model(self):
        """The adapter anew on the same frozen weights; only one at a time."""
        from ffkernels.training.models import add_adapter

        if self.model is not None:
            self.base = self.model.unload()
        self.model = add_adapter(self.base, rank=8, seed=self.seed).train()
        return self.model

    def method(self, name: str, model, *, optimizer_cls=torch.optim.AdamW, validation=None, lr: float = LR, **kwargs):
        trainable = [param for param in model.parameters() if param.requires_grad]
        if name.startswith("adamw"):
            return Plain(optimizer_cls(trainable, lr=lr, weight_decay=0.0))
        if name == "prototype":
            optimizer = optimizer_cls(trainable, lr=lr, weight_decay=0.0)
            return Prototype(model, optimizer, self.prototype_batch, self.limit)
        return Plain(
            fast_forward_module().create_fast_forward_optimizer(
                model,
                optimizer_cls,
                lr=lr,
                validation=self.validation if validation is None else validation,
                search=name.removeprefix("fast-forward-"),
                max_tau=self.limit,
                weight_decay=0.0,
                **{"interval": INTERVAL, **kwargs},
            )
        )


def train_step(model, method, batch) -> None:
    method.before_forward(batch)
    method.optimizer.zero_grad()
    model(**batch).loss.backward()
    method.step()


# Memory.


class Ledger:
    """What torch's CPU allocator has given out since the start, in bytes: now and at most."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    @contextmanager
    def record(self):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            yield
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.live += event.nbytes()
            self.peak = max(self.peak, self.live)


def stage_buffers(setting: Setting, name: str) -> int:
    """Bytes that a stage holds by itself: SGD works in place and the loss is a constant, so all the rest is zero."""
    model = setting.fresh_model()
    losses = itertools.count(0, -1)
    method = setting.method(
        name,
        model,
        optimizer_cls=torch.optim.SGD,
        validation=lambda model: next(losses),
        foreach=False,
        interval=1,
    )
    model(**next(setting.batches())).loss.backward()
    ledger = Ledger()
    with ledger.record():
        method.step()
    return ledger.peak


def measure_memory(name: str, *, steps: int, batch_size: int, max_length: int, limit: int) -> dict:
    setting = Setting(name, batch_size=batch_size, max_length=max_length, limit=limit)
    rows = []
    for method_name in ("adamw", "prototype", "fast-forward-linear", "fast-forward-parabolic"):
        print(f"{name}: {method_name}", file=sys.stderr)
        model = setting.fresh_model()
        trainable = [param for param in model.parameters() if param.requires_grad]
        sizes = {
            "model_bytes": sum(param.nbytes for param in model.parameters()),
            "adapter_bytes": sum(param.nbytes for param in trainable),
            "adapter_tensors": len(trainable),
        }
        torch.manual_seed(0)
        method, batches, ledger = setting.method(method_name, model), setting.batches(), Ledger()
        for _ in range(steps):
            batch = next(batches)
            with ledger.record():
                train_step(model, method, batch)
        rows.append(
            {
                "name": method_name,
                "peak_bytes": ledger.peak,
                "held_after_step_bytes": ledger.live,
                "validation_losses": len(method.losses),
                "stage_buffers_bytes": stage_buffers(setting, method_name) if "fast" in method_name else None,
            }
        )
        del method
    config = {"steps": steps, "batch_size": batch_size, "max_length": max_length, "max_tau": limit}
    return {
        "kind": "memory",
        "model": name,
        "config": {**config, "lr": LR, "interval": INTERVAL},
        **sizes,
        "memory": rows,
    }


# Time.


def test_loss(setting: Setting, model) -> float:
    model.eval()
    total = number = 0
    with torch.no_grad():
        for batch in setting.test:
            weight = int(batch["labels"][:, 1:].ne(-100).sum())
            total += model(**batch).loss.item() * weight
            number += weight
    model.train()
    return total / number


def run(setting: Setting, name: str, steps: int, lr: float, target: float | None) -> dict:
    """Train until the test loss is at most `target`, or for so many steps. The test costs the method nothing."""
    model = setting.fresh_model()
    torch.manual_seed(0)
    method, batches = setting.method(name, model, lr=lr), setting.batches()
    seconds, step, loss = 0.0, 0, float("nan")
    for step in range(1, steps + 1):
        batch = next(batches)
        start = time.process_time()
        train_step(model, method, batch)
        seconds += time.process_time() - start
        if target is not None or step == steps:
            loss = test_loss(setting, model)
            if target is not None and loss <= target + 1e-4:
                break
    return {
        "name": name,
        "seed": setting.seed,
        "lr": lr,
        "optimizer_steps": step,
        "validation_losses": len(method.losses),
        "cpu_seconds": seconds,
        "test_loss": loss,
        "reached": target is None or loss <= target + 1e-4,
    }


def measure_time(*, steps: int, batch_size: int, max_length: int, seeds: int, tuned_lr: float) -> dict:
    runs = []
    for seed in range(seeds):
        setting = Setting("tiny", batch_size=batch_size, max_length=max_length, limit=1000, seed=seed)
        runs.append(run(setting, "adamw", steps, LR, None))
        target = runs[-1]["test_loss"]
        for name in ("prototype", "fast-forward-linear", "fast-forward-parabolic"):
            runs.append(run(setting, name, steps, LR, target))
        runs.append(run(setting, "adamw-tuned", steps, tuned_lr, target))
        print(*runs[-5:], sep="\n", file=sys.stderr)
    config = {"steps": steps, "batch_size": batch_size, "max_length": max_length, "lr": LR, "tuned_lr": tuned_lr}
    return {"kind": "time", "model": "tiny", "config": {**config, "interval": INTERVAL, "seeds": seeds}, "runs": runs}


# The tables of PROPOSAL.md.


def table(report: dict) -> list[str]:
    return memory_table(report) if report["kind"] == "memory" else time_table(report)


def memory_table(report: dict) -> list[str]:
    adapter, model = report["adapter_bytes"], report["model_bytes"]
    plain = next(row for row in report["memory"] if row["name"] == "adamw")
    lines = [
        "| | peak above the model's weights | held between steps, beyond AdamW's | buffers of a stage |",
        "|---|---:|---:|---:|",
    ]
    for row in report["memory"]:
        beyond = row["held_after_step_bytes"] - plain["held_after_step_bytes"]
        buffers = row["stage_buffers_bytes"]
        cells = [
            NAMES[row["name"]],
            f"{row['peak_bytes'] / 2**20:.1f} MiB",
            f"{max(beyond, 0) / 2**20:.1f} MiB = {max(beyond, 0) / model:.2f} × all weights",
            "" if buffers is None else f"{buffers / 2**20:.2f} MiB = {buffers / adapter:.2f} × adapter",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def time_table(report: dict) -> list[str]:
    lines = [
        "| | learning rate | optimizer steps | validation losses | CPU seconds | share of AdamW's |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    adam = [run["cpu_seconds"] for run in report["runs"] if run["name"] == "adamw"]
    for name, label in NAMES.items():
        runs = [run for run in report["runs"] if run["name"] == name]
        share = median(run["cpu_seconds"] / seconds for run, seconds in zip(runs, adam))
        reached = sum(run["reached"] for run in runs)
        if reached < len(runs):
            label += f" (reached in {reached} of {len(runs)})"
        cells = [
            label,
            f"{runs[0]['lr']:g}",
            f"{median(run['optimizer_steps'] for run in runs):g}",
            f"{median(run['validation_losses'] for run in runs):g}",
            f"{median(run['cpu_seconds'] for run in runs):.1f}",
            f"{100 * share:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time"])
    parser.add_argument("--model", choices=["tiny", "smollm2-135m"], default="tiny", help="for memory")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it works")
    args = parser.parse_args()

    import transformers
    from ffkernels.reporting.machine import machine_info

    import peft

    torch.set_num_threads(1)
    if args.what == "time":
        steps, seeds = (12, 1) if args.quick else (120, 3)
        report = measure_time(steps=steps, batch_size=16, max_length=64, seeds=seeds, tuned_lr=1e-2)
    else:
        tiny = args.model == "tiny"
        report = measure_memory(
            args.model,
            steps=INTERVAL if args.quick or not tiny else 2 * INTERVAL,
            batch_size=16 if tiny else 4,
            max_length=64,
            limit=3 if args.quick else (64 if tiny else 4),
        )
    report |= {
        "machine": {**machine_info(), "threads": 1},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "command": "python contrib/peft/measure.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.what}_{report['model']}_{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(*table(report), f"wrote {path}", sep="\n")


if __name__ == "__main__":
    main()
