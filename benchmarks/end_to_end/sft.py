"""TRL's SFTTrainer with and without Fast Forward: FLOPs on the way to the plain run's final test loss.

    python -m benchmarks.end_to_end.sft                                 the embedded model, about 3 minutes
    python -m benchmarks.end_to_end.sft --model smollm2-135m --bf16 …   SmolLM2-135M
    python -m benchmarks.end_to_end.sft --fast                          the same in small: seconds

For every learning rate, with the same seed, data order and adapter initialisation:

    plain         SFTTrainer, constant schedule, N steps; its final test loss is L*
    fast forward  the same with FastForwardCallback, until test loss ≤ L* + 1e-4, N steps at most

FLOPs are measured (PyTorch's counter over the real forward and backward, Adam, and for Fast Forward every
validation and weight move). The test loss is measured after every stage, every ``--check-every`` steps and at
the end, outside the clock and charged to nobody. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from benchmarks import record
from benchmarks.tables import Results, counted, markdown, percent, rate

MODULE, TOLERANCE = "end_to_end.sft", 1e-4
# Of both trainers: nothing that is not measured.
PLAIN = {"lr_scheduler_type": "constant", "report_to": [], "logging_strategy": "no", "save_strategy": "no"}
PLAIN |= {"gradient_checkpointing": False, "disable_tqdm": True, "dataloader_pin_memory": False}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = record.parser(MODULE, __doc__, out="runs/bench_sft.json")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=48, help="of the plain run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0, help="of LoRA; PEFT's own default is 8")
    parser.add_argument("--train", type=int, default=4000, help="training examples")
    parser.add_argument("--test", type=int, default=256, help="test examples")
    parser.add_argument("--validation", type=int, default=32, help="validation examples of Fast Forward")
    parser.add_argument("--search", default="parabolic", choices=["parabolic", "linear"])
    parser.add_argument("--check-every", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fast", action="store_true", help="small and quick; the numbers mean little")
    options = parser.parse_args(argv)
    if options.fast:
        options.steps, options.batch_size, options.train, options.test = 24, 32, 400, 48
        options.lr, options.seeds = options.lr[-1:], options.seeds[:1]
    return options


def splits(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Docstring → function pairs as TRL's prompt and completion; the splits share no example."""
    from datasets import Dataset

    from ffkernels.training.offline import documented_functions

    rows = [{"prompt": f'"""{doc}"""\n', "completion": code} for doc, code in documented_functions()]
    rows = [row for row in rows if len(row["prompt"]) <= 2 * options.max_length]
    random.Random(seed).shuffle(rows)
    sizes = {"test": options.test, "validation": options.validation, "train": options.train}
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = Dataset.from_list(rows[start : start + size])
        start += size
    return parts


def run(
    options: argparse.Namespace, lr: float, seed: int, fast_forward: bool, target: float | None
) -> dict[str, Any]:
    """One training run; its curve of (step, test loss, FLOPs, seconds) and how it ended."""
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ffkernels import FastForwardCallback, FastForwardConfig, ValidationLoss
    from ffkernels.reporting.flops import FlopMeter
    from ffkernels.training import trainer_access
    from ffkernels.training.models import attention_targets, load_model
    from ffkernels.training.step_flops import StepFlops
    from ffkernels.training.trainer_data import examples_and_collator

    model, tokenizer = load_model(options.model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = tokenizer.for_transformers()
    data = splits(options, seed)
    # The plain run's curve is for the reader; only its end counts.
    check_every = options.check_every if fast_forward else max(options.check_every, options.steps // 4)
    ff = FastForwardCallback(config=FastForwardConfig(search=options.search))

    class Measure(TrainerCallback):
        """Counts the plain run's FLOPs, measures the test loss, and stops at the target."""

        def __init__(self):
            self.curve, self.stages, self.paused = [], 0, 0.0

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            examples, collator = examples_and_collator(trainer, trainer.eval_dataset["test"])
            self.test = ValidationLoss(model, examples, collator=collator)
            self.meter = FlopMeter(sum(p.numel() for p in model.parameters() if p.requires_grad))
            if not fast_forward:  # else the callback counts
                self.costs = StepFlops()
                trainer_access.wrap_training_step(trainer, self.count)
            self.began = perf_counter()
            self.measure(state)

        @contextmanager
        def count(self, model, inputs):
            with self.costs.batch(model, inputs) as cost:
                yield
            self.meter.add(cost[0])

        def on_step_end(self, args, state, control, **kwargs):
            self.meter.optimizer_step()
            staged, self.stages = len(ff.stages) > self.stages, len(ff.stages)
            step = state.global_step
            if staged or step % check_every == 0 or step == options.steps:
                loss = self.measure(state)
                control.should_training_stop |= target is not None and loss <= target

        def measure(self, state):
            begin = perf_counter()
            loss = float(self.test())
            flops = dict(ff.flops if fast_forward else self.meter.totals)
            seconds = begin - self.began - self.paused
            step = state.global_step
            self.curve.append({"step": step, "test_loss": loss, "flops": flops, "seconds": seconds})
            print(f"    step {step}: test loss {loss:.4f}, {flops['measured'] / 1e12:.3f} TFLOP", flush=True)
            self.paused += perf_counter() - begin
            return loss

    measure = Measure()
    with tempfile.TemporaryDirectory(prefix="ffkernels-") as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=lr,
            max_length=options.max_length,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=options.bf16,
            **PLAIN,
        )
        adapter = {"r": options.rank, "lora_alpha": options.alpha}
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=data["train"],
            eval_dataset={"validation": data["validation"], "test": data["test"]},
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=attention_targets(model), task_type="CAUSAL_LM", **adapter),
        )
        for callback in [ff, measure] if fast_forward else [measure]:
            trainer.add_callback(callback)
        trainer.train()
    last = measure.curve[-1]
    return {
        **{"name": "fast_forward" if fast_forward else "plain", "lr": lr, "seed": seed},
        "optimizer_steps": last["step"],
        **{name: last[name] for name in ("test_loss", "flops", "seconds")},
        "curve": measure.curve,
        "stages": [stage.to_dict() for stage in ff.stages],
        "reached": None if target is None else last["test_loss"] <= target,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    import torch
    import trl

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    document = record.provenance(MODULE, argv, kind="sft")
    document["versions"]["trl"] = trl.__version__
    document |= {"config": record.settings(options), "runs": [], "savings": []}
    for lr in options.lr:
        for seed in options.seeds:
            print(f"lr {lr:g}, seed {seed}: plain")
            plain = run(options, lr, seed, False, None)
            print(f"lr {lr:g}, seed {seed}: fast forward, to {plain['test_loss'] + TOLERANCE:.4f}")
            ff = run(options, lr, seed, True, plain["test_loss"] + TOLERANCE)
            saved = {f"flops_{name}": 1 - ff["flops"][name] / plain["flops"][name] for name in plain["flops"]}
            saved["seconds"] = 1 - ff["seconds"] / plain["seconds"]
            document["runs"] += [plain, ff]
            document["savings"].append({"lr": lr, "seed": seed, "reached": ff["reached"], **saved})
            # After every pair: a long run that is stopped keeps what it has.
            record.write(document, options.out)
    print(table({"": document}), f"written: {options.out}", sep="\n")
    return document


def table(results: Results) -> str:
    """SFTTrainer with the callback against without."""
    rows = []
    for _, data in sorted(results.items()):
        if data.get("kind") != "sft":
            continue
        config = data["config"]
        label = {"tiny": "embedded", "smollm2-135m": "SmolLM2-135M"}.get(config["model"], config["model"])
        label += f", batch {config['batch_size']}" if config["batch_size"] != 32 else ""
        for lr in sorted({entry["lr"] for entry in data["savings"]}):
            entries = [entry for entry in data["savings"] if entry["lr"] == lr]
            text = "not reached"
            if all(entry["reached"] for entry in entries):
                shares = sorted(entry["flops_measured"] for entry in entries)
                text = percent(shares[0])
                if len(shares) > 1:
                    text += f" – {percent(shares[-1])} ({counted(len(shares), 'seed')})"
            rows.append((label, lr, config["steps"], [label, rate(lr), str(config["steps"]), text]))
    rows.sort(key=lambda row: (row[0] != "embedded", *row[:3]))
    head = ["model", "learning rate", "plain steps", "FLOPs saved (measured)"]
    return markdown(head, [row[-1] for row in rows])


def command_of(config: Mapping[str, Any]) -> str:
    """Of a file that does not say it: the command line with what of its options is no default."""
    words = ["python benchmarks/bench_sft.py"]
    for name, default in record.settings(parse([])).items():
        if (value := config.get(name, default)) == default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            every = value if isinstance(value, list) else [value]
            words += [f"{each:g}" if isinstance(each, float) else str(each) for each in every]
    return " ".join(words)


if __name__ == "__main__":
    main()
