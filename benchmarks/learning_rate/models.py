"""The model of a workload and its tokenizer; and what of both is at hand where nothing can be fetched."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.learning_rate.workloads import RANDOM, Workload
from benchmarks.stages.cases import SMOL, TINY
from benchmarks.stages.models import CONFIGS
from ffkernels.training import smollm2
from ffkernels.training.models import load_model, load_tokenizer
from ffkernels.training.requirements import require

ARCHITECTURES = {f"{smollm2.NAME}{RANDOM}": SMOL, f"tiny-llama{RANDOM}": TINY}
PACKAGES = {"medical": "simple_icd_10_cm"}  # of tasks; "instruction" needs none


def loaded(workload: Workload, dtype: str) -> tuple[Any, Any]:
    """(model in eval mode on the CPU, its tokenizer); random weights are always the same, and read bytes."""
    if workload.weights != "random":
        return load_model(workload.model, dtype=dtype)
    transformers = require("transformers")
    kind, sizes = CONFIGS[ARCHITECTURES[workload.model]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**sizes)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    return model.eval(), load_tokenizer("tiny")


def smollm2_or_random() -> str:
    """The name of SmolLM2, with random weights where its own are not in the cache: nothing is fetched."""
    return smollm2.NAME if smollm2.is_whole(smollm2.cached()) else f"{smollm2.NAME}{RANDOM}"


def task_is_at_hand(task: str) -> bool:
    return task not in PACKAGES or find_spec(PACKAGES[task]) is not None
