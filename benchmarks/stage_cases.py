"""What a stage is measured on: models, adapters and validation sets, all made here from seeds.

Weights are random except SmolLM2's where its checkpoint is at hand; speed does not depend on them. A
validation set is 32 examples with a label on every token. ``mixed``: lengths are log-normal with median 0.35
of the longest and σ = 0.6, cut to between 1/16 of the longest and the longest, of which there is one, as
instruction data has it (about 0.4 of the padded rectangle is real). ``equal``: all are as long as the
longest, so that there is no padding to save.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

EXAMPLES = 32
MEDIAN, SIGMA, SHORTEST = 0.35, 0.6, 1 / 16
TOKENS_PER_FORWARD = 16384  # padded; for ours (its default on a GPU) and for the clean eager loop alike
AHEAD = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """One row: a model with an adapter, and a validation set.

    ``evaluations``: of the validation loss per stage, the same for every provider. ``ahead``: of the step
    graph, how many replays may run before the answer to an earlier one is awaited. ``seconds``: what the row
    may take, a guess for an H200; it is left out where less time is left.
    """

    model: str
    length: int
    lengths: str = "mixed"
    method: str = "lora"
    rank: int = 8
    evaluations: int = 6
    ahead: tuple[int, ...] = (0,)
    seconds: float = 15.0

    @property
    def name(self) -> str:
        return f"{self.model} {self.method} r={self.rank} {EXAMPLES}×{self.length} {self.lengths}"


SMOL, PYTHIA, LLAMA, TINY = "SmolLM2-135M", "Pythia-1.4B", "Llama-3-8B", "tiny Llama"

# Most wanted first: what no time is left for is left out.
CASES = (
    Case(SMOL, 64, ahead=AHEAD),
    Case(SMOL, 256, ahead=AHEAD),
    Case(SMOL, 1024),
    Case(LLAMA, 1024, evaluations=3, seconds=40),
    Case(LLAMA, 64, evaluations=4, seconds=18),
    Case(PYTHIA, 64, seconds=15),
    Case(LLAMA, 256, evaluations=4, seconds=25),
    Case(PYTHIA, 256, seconds=15),
    Case(PYTHIA, 1024, evaluations=4, seconds=15),
    Case(SMOL, 256, method="dora", seconds=18),
    Case(SMOL, 256, rank=64),
    Case(SMOL, 256, lengths="equal"),
    Case(SMOL, 1024, lengths="equal"),
    Case(LLAMA, 256, rank=64, evaluations=4, seconds=25),
    Case(LLAMA, 256, method="dora", evaluations=4, seconds=30),
    Case(LLAMA, 1024, lengths="equal", evaluations=3, seconds=60),
)
DRY_CASES = (
    Case(TINY, 16, evaluations=3, seconds=0.5),
    Case(TINY, 16, lengths="equal", method="dora", rank=2, evaluations=3, seconds=0.5),
)


def make_config(name: str) -> Any:
    """A transformers config; the sizes of Pythia and Llama are those of their published ones."""
    import transformers

    if name == SMOL:
        from ffkernels.training import smollm2

        return transformers.LlamaConfig(**smollm2.SIZES)
    if name == PYTHIA:
        return transformers.GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=16,
            max_position_embeddings=2048,
        )
    if name == LLAMA:
        return transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
    return transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def make_model(
    name: str, device: torch.device, dtype: torch.dtype, method: str = "lora", rank: int = 8
) -> tuple[torch.nn.Module, str]:
    """(model in PEFT, in eval mode; what its weights are), built on the device itself."""
    import transformers

    from ffkernels.training import smollm2
    from ffkernels.training.models import add_adapter, load_model

    torch.manual_seed(0)
    if name == SMOL and smollm2.is_whole(smollm2.cached()):
        base, weights = load_model(smollm2.NAME, dtype=dtype, device=device)[0], "pretrained"
    else:
        with device:
            base = transformers.AutoModelForCausalLM.from_config(make_config(name), dtype=dtype)
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

    def padded(key: str, value: int) -> torch.Tensor:
        out = torch.full((len(rows), longest), value)
        for i, row in enumerate(rows):
            out[i, : row[key].numel()] = row[key]
        return out

    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        mask[i, : row["input_ids"].numel()] = 1
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


def micro_batches(
    examples: list[dict[str, torch.Tensor]], tokens: int = TOKENS_PER_FORWARD
) -> list[dict[str, torch.Tensor]]:
    """In the order of the data set, as many rows at a time as `tokens` hold when padded to the longest."""
    rows = max(1, tokens // max(row["input_ids"].numel() for row in examples))
    return [collate(examples[i : i + rows]) for i in range(0, len(examples), rows)]


Batches = list[dict[str, torch.Tensor]]
Evaluate = Callable[[], float]
