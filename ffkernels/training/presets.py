"""Settings known from the paper and from its authors' script.

``TrainConfig(**preset("authors-llama3-8b-chat"))`` is the run that main.py of
github.com/AdirRahamim/Fast-Forward makes by default; the other names that begin with ``authors`` change
its model and task only. ``paper-…`` has what Tables 1 to 3 of the paper (its appendix E) give each model
and task; what they do not say is the script's.
"""

from __future__ import annotations

from typing import Any

from ffkernels.engine.config import FastForwardConfig
from ffkernels.ops.notices import announce_once

MODELS = {
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
}

TASKS = ("medical", "instruction", "chat")

BLANK = None  # what a table does not say

# Learning rate, batch size and rank by task, each the same for all models; micro-batches by model.
TABLES: dict[str, tuple[float, int, int, dict[str, int | None]]] = {
    "medical": (4e-5, 128, 8, dict(zip(MODELS, (2, 1, BLANK, BLANK), strict=True))),
    "instruction": (5e-6, 64, 8, dict(zip(MODELS, (2, 1, BLANK, BLANK), strict=True))),
    "chat": (2e-5, 512, 64, dict(zip(MODELS, (2, 2, 1, BLANK), strict=True))),
}

PRESETS = tuple(
    f"{whose}-{model}-{task}" for whose in ("authors", "paper") for model in MODELS for task in TASKS
)


def preset(name: str) -> dict[str, Any]:
    """The values of a TrainConfig called ``name``, one of ``PRESETS``; change some and build it.

    Raises:
        ValueError: when there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; allowed are {', '.join(PRESETS)}.")
    source, _, rest = name.partition("-")
    model, _, task = rest.rpartition("-")
    return {**_authors(model, task), **(_tables(model, task) if source == "paper" else {})}


def _authors(model: str, task: str) -> dict[str, Any]:
    llama = model == "llama3-8b"
    return {
        "model": MODELS[model],
        "task": task,
        "source": "hub",
        "chat_loss": "all",
        "method": "lora",
        "rank": 64,
        "alpha": 16,
        "dropout": 0.1,
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj") if llama else ("query_key_value",),
        "lr": 2e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": None,
        "micro_batch_size": 1,
        "batch_size": 512,  # accumulation_steps of 512 micro-batches
        "epochs": 5,
        "max_length": 1024,
        "eval_tokens": 2 * 1024,  # eval_batch_size examples of max_length
        "test_examples": 1000,
        "validation_examples": 32,
        "evaluate_every": 1,  # evaluate_every, in micro-batches, is one optimizer step's 512
        # num_stabilization_steps are 50 micro-batches, so they end within the first optimizer step.
        "fast_forward": FastForwardConfig(interval=6, warmup=0, search="linear", patience=None),
        "seed": 0,
        "dtype": "bfloat16" if llama else "float32",
    }


def _tables(model: str, task: str) -> dict[str, Any]:
    lr, batch_size, rank, micro_batches = TABLES[task]
    said = {"lr": lr, "batch_size": batch_size, "rank": rank}
    if micro_batches[model] is not BLANK:
        return {**said, "micro_batch_size": micro_batches[model]}
    announce_once(
        f"blank-{model}-{task}",
        f"the paper's table leaves the micro-batch of {model} on {task} blank; the authors' script's is "
        "taken, 1 (micro_batch_size, --micro-batch-size: memory, not the gradient)",
    )
    return said
