#!/usr/bin/env python3
"""Memory and time of Fast Forward inside PEFT, beside plain AdamW and the prototype of PEFT's PR #2693.

    python contrib/peft/measure.py memory --model tiny --out contrib/peft/results
    python contrib/peft/measure.py memory --model smollm2-135m --out contrib/peft/results
    python contrib/peft/measure.py time --out contrib/peft/results

`memory` trains a few steps with every method from the same weights and records every allocation of torch's CPU
allocator (exact bytes, from the profiler). `time` trains AdamW for some steps and the others until they reach its test
loss, and counts CPU seconds of one thread. Models and data are those of ffkernels.
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
INTERVAL, LR, MAX_LENGTH = 6, 1e-4, 64
NAMES = {
    "adamw": "AdamW",
    "prototype": "prototype of #2693",
    "fast-forward-linear": "this proposal, `linear`",
    "fast-forward-parabolic": "this proposal, `parabolic`",
    "adamw-tuned": "AdamW, tuned lr",
}


def create_fast_forward_optimizer(*args, **kwargs):
    """That of the module in this folder, as a part of the installed PEFT."""
    name = "peft.optimizers.fast_forward"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / "src/peft/optimizers/fast_forward.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].create_fast_forward_optimizer(*args, **kwargs)


class Method:
    """An optimizer, with or without Fast Forward."""

    def __init__(self, model, optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def train_step(self, batch) -> None:
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        self.step()

    def step(self) -> None:
        self.optimizer.step()

    @property
    def validation_losses(self) -> int:
        fast_forward = getattr(self.optimizer, "fast_forward", None)
        return sum(len(stage.losses) for stage in fast_forward.stages) if fast_forward else 0


class Prototype(Method):
    """Our own rendition of how the prototype trains, with its 10 validation examples in one batch.

    Before every step it clones all parameters, the frozen ones too. On the interval's last step it adds their update
    again and again. The first addition is not compared with anything, the last one is not undone. The model stays in
    training mode, autograd records, and the loss is divided by the number of tokens of the training batch.
    """

    validation_losses = 0

    def __init__(self, model, optimizer, validation, limit: int) -> None:
        super().__init__(model, optimizer)
        self.validation, self.limit, self.steps = validation, limit, 0

    def train_step(self, batch) -> None:
        self.number = batch["attention_mask"].sum().item()
        self.previous = [param.data.clone() for param in self.model.parameters()]
        super().train_step(batch)

    def step(self) -> None:
        super().step()
        self.steps += 1
        if self.steps % INTERVAL:
            return
        current = [param.data for param in self.model.parameters()]
        self.update = [now - before for now, before in zip(current, self.previous)]
        last = None
        for _ in range(self.limit):
            for now, update in zip(current, self.update):
                now += update
            self.outputs = self.model(**self.validation, num_items_in_batch=self.number)
            self.validation_losses += 1
            if last is not None and last < self.outputs.loss:
                break
            last = self.outputs.loss
        self.last = last


class Setting:
    """A model, its data, and every method on it from the same start."""

    def __init__(self, model: str, batch_size: int, limit: int, seed: int = 0) -> None:
        from ffkernels.training.models import load_model
        from ffkernels.training.tasks import collate, load_task

        self.batch_size, self.limit, self.seed, self.model = batch_size, limit, seed, None
        self.base, tokenizer = load_model(model)
        task = load_task("instruction", tokenizer, max_length=MAX_LENGTH, seed=seed, test_examples=256)
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
        self.train_examples = [task.train[i] for i in order]
        self.collate = lambda examples: collate(examples, tokenizer.pad_token_id or 0)
        self.validation, self.test = self._batches(task.validation), self._batches(task.test)
        self.prototype_batch = self.collate(task.validation[:10])

    def _batches(self, examples):
        return [self.collate(examples[i : i + self.batch_size]) for i in range(0, len(examples), self.batch_size)]

    def batches(self):
        examples = itertools.cycle(self.train_examples)
        while True:
            yield self.collate(list(itertools.islice(examples, self.batch_size)))

    def method(self, name: str, *, optimizer_cls=torch.optim.AdamW, lr: float = LR, **kwargs) -> Method:
        """On a new adapter on the same frozen weights; only one at a time."""
        from ffkernels.training.models import add_adapter

        if self.model is not None:
            self.base = self.model.unload()
        self.model = model = add_adapter(self.base, rank=8, seed=self.seed).train()
        torch.manual_seed(0)
        if name.startswith("fast-forward-"):
            search = {"search": name.removeprefix("fast-forward-"), "max_tau": self.limit, "weight_decay": 0.0}
            kwargs = {"lr": lr, "validation": self.validation, "interval": INTERVAL, **search, **kwargs}
            return Method(model, create_fast_forward_optimizer(model, optimizer_cls, **kwargs))
        trainable = [param for param in model.parameters() if param.requires_grad]
        optimizer = optimizer_cls(trainable, lr=lr, weight_decay=0.0)
        if name == "prototype":
            return Prototype(model, optimizer, self.prototype_batch, self.limit)
        return Method(model, optimizer)


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
    losses = itertools.count(0, -1)
    scripted = {"validation": lambda model: next(losses), "interval": 1, "foreach": False}
    method = setting.method(name, optimizer_cls=torch.optim.SGD, **scripted)
    method.model(**next(setting.batches())).loss.backward()
    ledger = Ledger()
    with ledger.record():
        method.step()
    return ledger.peak


def measure_memory(model: str, *, steps: int, batch_size: int, limit: int) -> dict:
    setting, rows = Setting(model, batch_size, limit), []
    for name in ("adamw", "prototype", "fast-forward-linear", "fast-forward-parabolic"):
        method, batches, ledger = setting.method(name), setting.batches(), Ledger()
        for _ in range(steps):
            batch = next(batches)
            with ledger.record():
                method.train_step(batch)
        row = {"name": name, "peak_bytes": ledger.peak, "held_after_step_bytes": ledger.live}
        rows.append({**row, "validation_losses": method.validation_losses})
        del method
        rows[-1]["stage_buffers_bytes"] = stage_buffers(setting, name) if "fast" in name else None
    config = {"steps": steps, "batch_size": batch_size, "max_length": MAX_LENGTH, "max_tau": limit}
    trainable = [param.nbytes for param in setting.model.parameters() if param.requires_grad]
    return {
        "kind": "memory",
        "model": model,
        "config": {**config, "lr": LR, "interval": INTERVAL},
        "model_bytes": sum(param.nbytes for param in setting.model.parameters()),
        "adapter_bytes": sum(trainable),
        "adapter_tensors": len(trainable),
        "memory": rows,
    }


@torch.no_grad()
def test_loss(setting: Setting) -> float:
    weights = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in setting.test]
    model = setting.model.eval()
    losses = [model(**batch).loss.item() for batch in setting.test]
    model.train()
    return sum(loss * weight for loss, weight in zip(losses, weights)) / sum(weights)


def run(setting: Setting, name: str, steps: int, lr: float, target: float | None) -> dict:
    """Train until the test loss is at most `target`, or for so many steps. The test costs the method nothing."""
    method, batches = setting.method(name, lr=lr), setting.batches()
    seconds, step, loss = 0.0, 0, float("nan")
    for step in range(1, steps + 1):
        batch = next(batches)
        start = time.process_time()
        method.train_step(batch)
        seconds += time.process_time() - start
        if target is not None or step == steps:
            loss = test_loss(setting)
            if target is not None and loss <= target + 1e-4:
                break
    return {
        "name": name,
        "seed": setting.seed,
        "lr": lr,
        "optimizer_steps": step,
        "validation_losses": method.validation_losses,
        "cpu_seconds": seconds,
        "test_loss": loss,
        "reached": target is None or loss <= target + 1e-4,
    }


def measure_time(*, steps: int, batch_size: int, seeds: int, tuned_lr: float) -> dict:
    runs = []
    for seed in range(seeds):
        setting, target = Setting("tiny", batch_size, limit=1000, seed=seed), None
        for name in NAMES:
            runs.append(run(setting, name, steps, tuned_lr if name == "adamw-tuned" else LR, target))
            target = target or runs[-1]["test_loss"]  # of the first, AdamW
    config = {"steps": steps, "batch_size": batch_size, "max_length": MAX_LENGTH, "lr": LR, "tuned_lr": tuned_lr}
    return {"kind": "time", "model": "tiny", "config": {**config, "interval": INTERVAL, "seeds": seeds}, "runs": runs}


def table(report: dict) -> list[str]:
    """The rows of PROPOSAL.md."""
    head, rows = (memory_table if report["kind"] == "memory" else time_table)(report)
    return [head, "|---|" + "---:|" * (head.count("|") - 2), *("| " + " | ".join(cells) + " |" for cells in rows)]


def memory_table(report: dict) -> tuple[str, list[list[str]]]:
    held_by_adamw, rows = report["memory"][0]["held_after_step_bytes"], []
    for row in report["memory"]:
        beyond, buffers = max(row["held_after_step_bytes"] - held_by_adamw, 0), row["stage_buffers_bytes"]
        cells = [NAMES[row["name"]], f"{row['peak_bytes'] / 2**20:.1f} MiB"]
        cells.append(f"{beyond / 2**20:.1f} MiB = {beyond / report['model_bytes']:.2f} × all weights")
        adapters = (buffers or 0) / report["adapter_bytes"]
        cells.append("" if buffers is None else f"{buffers / 2**20:.2f} MiB = {adapters:.2f} × adapter")
        rows.append(cells)
    return "| | peak above the model's weights | held between steps, beyond AdamW's | buffers of a stage |", rows


def time_table(report: dict) -> tuple[str, list[list[str]]]:
    rows, adam = [], [run["cpu_seconds"] for run in report["runs"] if run["name"] == "adamw"]
    for name, label in NAMES.items():
        runs = [run for run in report["runs"] if run["name"] == name]
        steps, losses, seconds, reached = (
            [run[key] for run in runs] for key in ("optimizer_steps", "validation_losses", "cpu_seconds", "reached")
        )
        label += "" if all(reached) else f" (reached in {sum(reached)} of {len(runs)})"
        share = 100 * median(own / of_adam for own, of_adam in zip(seconds, adam))
        cells = [label, f"{runs[0]['lr']:g}", f"{median(steps):g}", f"{median(losses):g}"]
        rows.append([*cells, f"{median(seconds):.1f}", f"{share:.0f} %"])
    return "| | learning rate | optimizer steps | validation losses | CPU seconds | share of AdamW's |", rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "time"])
    parser.add_argument("--model", choices=["tiny", "smollm2-135m"], default="tiny", help="for memory")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    args = parser.parse_args()

    import transformers
    from ffkernels.reporting.machine import machine_info

    import peft

    torch.set_num_threads(1)
    if args.what == "time":
        report = measure_time(steps=120, batch_size=16, seeds=3, tuned_lr=1e-2)
    elif args.model == "tiny":
        report = measure_memory("tiny", steps=2 * INTERVAL, batch_size=16, limit=64)
    else:
        report = measure_memory(args.model, steps=INTERVAL, batch_size=4, limit=4)
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
