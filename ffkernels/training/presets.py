"""Settings known from the paper: what its authors' script does unless it is told otherwise.

``TrainConfig(**preset("authors-llama3-8b-chat"))`` is the run that the script makes by default: main.py of
github.com/AdirRahamim/Fast-Forward. The other names change its model and task only, as its two flags would.
The paper's tables of hyper-parameters, which give each model and task its own learning rate, batch size and
rank, are *not* in here; of them this module knows the ranges alone.
"""

from __future__ import annotations

from typing import Any

from ffkernels.engine.config import FastForwardConfig

MODELS = {
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
    "pythia-2.8b": "EleutherAI/pythia-2.8b",
    "pythia-6.9b": "EleutherAI/pythia-6.9b",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
}

TASKS = ("medical", "instruction", "chat")

PRESETS = tuple(f"authors-{model}-{task}" for model in MODELS for task in TASKS)

# From the least to the largest that the paper trains with, over all models and tasks.
PAPER_LEARNING_RATES = (5e-6, 4e-5)
PAPER_BATCH_SIZES = (64, 512)


def preset(name: str) -> dict[str, Any]:
    """The values of a TrainConfig called ``name``, one of ``PRESETS``; change some and build it.

    Raises:
        ValueError: when there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; allowed are {', '.join(PRESETS)}.")
    model, _, task = name.removeprefix("authors-").rpartition("-")
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
