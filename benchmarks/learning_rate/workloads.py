"""What trains, on what, for how long: plain data, to add to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEDULES = ("constant", "linear", "cosine")
RANK, LENGTH, WARMUP = 8, 64, 8


@dataclass(frozen=True)
class Method:
    """What of a model trains.

    Attributes:
        label: as tables name it.
        rate: near the tuned one at a constant schedule and batch 16: a sweep begins there.
        config: a class of PEFT's; None trains all weights.
        options: its arguments; ``r`` is ``RANK`` and ``target_modules`` are the attention's where the class
            has them and they are not given.
    """

    label: str
    rate: float
    config: str | None
    options: tuple[tuple[str, Any], ...] = ()


def lora(label: str, rate: float, alpha: float, **options: Any) -> Method:
    return Method(label, rate, "LoraConfig", (("lora_alpha", alpha), *options.items()))


METHODS = {
    "lora": lora("LoRA, α = 16", 1e-2, 16),
    "lora-1": lora("LoRA, α = 1", 3e-2, 1),
    "lora-256": lora("LoRA, α = 256", 1e-3, 256),
    "lora-all": lora("LoRA on all linear layers, α = 16", 1e-2, 16, target_modules="all-linear"),
    "dora": lora("DoRA, α = 16", 1e-2, 16, use_dora=True),
    "lora-r64": lora("LoRA, rank 64, α = 16", 4e-3, 16, r=64),
    "rslora": lora("rsLoRA, rank 64, α = 16", 2e-3, 16, r=64, use_rslora=True),
    "oft": Method("OFT", 1e-2, "OFTConfig", (("oft_block_size", 0),)),
    "loha": Method("LoHa", 1e-2, "LoHaConfig"),
    "lokr": Method("LoKr", 2e-2, "LoKrConfig"),
    "vera": Method("VeRA", 1e-1, "VeraConfig"),
    "ia3": Method("IA3", 1e-1, "IA3Config", (("feedforward_modules", []),)),
    "layernorm": Method(
        "LayerNorm",
        1e-1,
        "LNTuningConfig",
        (("target_modules", ["input_layernorm", "post_attention_layernorm", "final_layer_norm"]),),
    ),
    "prompt": Method("prompt tuning", 1.0, "PromptTuningConfig", (("num_virtual_tokens", 8),)),
    "tokens": Method(
        "trainable tokens", 1e-1, "TrainableTokensConfig", (("token_indices", list(range(32, 127))),)
    ),
    "all": Method("all weights", 1e-3, None),
}

RANDOM = "-random"  # ends the names of models whose weights are random
# dtype of the base, test examples.
MODELS = {
    "tiny": ("float32", 400),
    "smollm2-135m": ("bfloat16", 96),
    f"smollm2-135m{RANDOM}": ("bfloat16", 96),
    f"tiny-llama{RANDOM}": ("float32", 32),
}


@dataclass(frozen=True)
class Workload:
    """Its name says all of it.

    Attributes:
        permuted: each byte stands for another one, the same throughout, so that the model is far from its
            data and every step counts.
    """

    task: str
    batch: int
    steps: int = 120
    schedule: str = "constant"
    method: str = "lora"
    model: str = "tiny"
    permuted: bool = False

    @property
    def name(self) -> str:
        text = f"{self.task}, permuted" if self.permuted else self.task
        return f"{self.model}, {self.method}, {text}, batch {self.batch}, {self.steps} steps, {self.schedule}"

    @property
    def weights(self) -> str:
        """What those of the model are: "pretrained" or "random"."""
        return "random" if self.model.endswith(RANDOM) else "pretrained"

    @property
    def bench(self) -> tuple[Any, ...]:
        """What two workloads have in common that train the same weights on the same batches."""
        return self.task, self.batch, self.method, self.model, self.permuted

    @property
    def group(self) -> str:
        """Under which the tables sum it up."""
        if self.model != "tiny":
            return self.model
        if self.permuted:
            return "steep"
        if self.method == "lora" and self.batch != 16:
            return f"{self.schedule}, {self.steps:,} steps"
        return "methods"
