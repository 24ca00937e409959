"""The models and validation sets of the stage benchmark, all made here from seeds.

Weights are random except SmolLM2's where its checkpoint is at hand; speed does not depend on them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.stages.cases import EXAMPLES, LLAMA, PYTHIA, SMOL, TINY, Case
from ffkernels.training import smollm2

MEDIAN, SIGMA, SHORTEST = 0.35, 0.6, 1 / 16  # of mixed lengths, as `cases` says
TOKENS_PER_FORWARD = 16384  # padded; for ours (its default on a GPU) and for the clean eager loop alike

Batches = list[dict[str, torch.Tensor]]


NAMES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("max_position_embeddings",)
ROPE = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}


def sizes(*values: int, **more: Any) -> dict[str, Any]:
    return dict(zip(NAMES, values, strict=True), **more)


# Those of Pythia and Llama are those of their published ones.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    SMOL: ("LlamaConfig", smollm2.SIZES),
    PYTHIA: ("GPTNeoXConfig", sizes(50304, 2048, 8192, 24, 16, 2048)),
    LLAMA: ("LlamaConfig", sizes(128256, 4096, 14336, 32, 32, 8192, num_key_value_heads=8, **ROPE)),
    TINY: ("LlamaConfig", sizes(300, 32, 64, 2, 4, 64, num_key_value_heads=2)),
}


def make_model(
    name: str, device: torch.device, dtype: torch.dtype, method: str = "lora", rank: int = 8
) -> tuple[torch.nn.Module, str]:
    """(model in PEFT, in eval mode; what its weights are), built on the device itself."""
    import transformers

    from ffkernels.training.models import add_adapter, load_model

    torch.manual_seed(0)
    if name == SMOL and smollm2.is_whole(smollm2.cached()):
        base, weights = load_model(smollm2.NAME, dtype=dtype, device=device)[0], "pretrained"
    else:
        kind, given = CONFIGS[name]
        config = getattr(transformers, kind)(**given)
        with device:
            base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        weights = "random"
    base.config.use_cache = False
    model = add_adapter(base.to(device), method=method, rank=rank, seed=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # zero at first, which would make the adapter invisible
                parameter.normal_(std=0.02)
    return model.eval(), weights


def lengths_of(case: Case) -> list[int]:
    if case.lengths == "equal":
        return [case.length] * EXAMPLES
    draw = torch.randn(EXAMPLES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = (MEDIAN * torch.exp(SIGMA * draw)).clamp(SHORTEST, 1.0)
    share[int(share.argmax())] = 1.0
    return [max(2, round(case.length * value)) for value in share.tolist()]


def make_examples(case: Case, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; labels are the tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths_of(case)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Right padding to the longest of these rows, as the usual collators do."""
    longest = max(row["input_ids"].numel() for row in rows)

    def padded(values: list[torch.Tensor], fill: int) -> torch.Tensor:
        out = torch.full((len(rows), longest), fill)
        for row, value in zip(out, values, strict=True):
            row[: value.numel()] = value
        return out

    ids, labels = ([row[key] for row in rows] for key in ("input_ids", "labels"))
    mask = padded([torch.ones_like(row) for row in ids], 0)
    return {"input_ids": padded(ids, 0), "attention_mask": mask, "labels": padded(labels, -100)}


def micro_batches(examples: list[dict[str, torch.Tensor]], tokens: int = TOKENS_PER_FORWARD) -> Batches:
    """In the order of the data set, as many rows at a time as `tokens` hold when padded to the longest."""
    rows = max(1, tokens // max(row["input_ids"].numel() for row in examples))
    return [collate(examples[i : i + rows]) for i in range(0, len(examples), rows)]
