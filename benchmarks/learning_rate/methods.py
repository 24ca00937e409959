"""PEFT's methods, each with what PEFT's own comparison trains it at; and those that are left out, with why.

A method is named as in ``peft.PEFT_TYPE_TO_CONFIG_MAPPING``; variants of LoRA by their own names. Options are
PEFT's defaults, but for rank and targets (see ``Method``) and for what is given here: what has no default, or
whose default does not fit a model of 128 hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.learning_rate.workloads import METHODS, Method

# Where the rates are from: the folder in PEFT's repository, and its commit.
SOURCE = "method_comparison/MetaMathQA/experiments"
SOURCE_COMMIT = "5d602fdbff04"
GENERAL = 1e-4  # its default_training_params.json: where no experiment says another one


@dataclass(frozen=True)
class PeftMethod(Method):
    """A method of PEFT's comparison.

    Attributes:
        published: the rates of its experiments there.
        experiment: whether it has any; without one, ``published`` is ``GENERAL``.
    """

    published: tuple[float, ...] = (GENERAL,)
    experiment: bool = True


def peft(label: str, config: str, *published: float, experiment: bool = True, **options: Any) -> PeftMethod:
    published = published or (GENERAL,)
    return PeftMethod(label, published[0], f"{config}Config", tuple(options.items()), published, experiment)


TOKENS = 8  # virtual ones
NORMS = ["input_layernorm", "post_attention_layernorm", "final_layer_norm"]

# CPT learns the tokens of an example in front: its input (2), what leads to the answer (3), the answer (4).
EXAMPLE = list(b"Say yes.\nyes\n")
EXAMPLE_TYPES = [2] * 8 + [3] + [4] * 4

# In the order in which they are run: the oldest and most used first.
PEFT_METHODS: dict[str, PeftMethod] = {
    "LORA": peft("LoRA", "Lora"),
    "DoRA": peft("LoRA, `use_dora`", "Lora", use_dora=True),
    "IA3": peft("IA³", "IA3", 1e-4, 1e-3, 5e-3, feedforward_modules=[]),
    "PREFIX_TUNING": peft("prefix tuning", "PrefixTuning", 1e-3, 5e-3, num_virtual_tokens=TOKENS),
    "PROMPT_TUNING": peft("prompt tuning", "PromptTuning", 1e-4, 1e-3, num_virtual_tokens=TOKENS),
    "P_TUNING": peft("P-tuning", "PromptEncoder", num_virtual_tokens=TOKENS, encoder_hidden_size=128),
    "ADALORA": peft("AdaLoRA", "AdaLora", total_step=100, tinit=0, tfinal=0),
    "LOHA": peft("LoHa", "LoHa"),
    "LOKR": peft("LoKr", "LoKr", 3e-3),
    "OFT": peft("OFT", "OFT", oft_block_size=0),
    "BOFT": peft("BOFT", "BOFT"),
    "VERA": peft("VeRA", "Vera", 1e-3),
    "LN_TUNING": peft("LayerNorm tuning", "LNTuning", target_modules=NORMS),
    "FOURIERFT": peft("FourierFT", "FourierFT"),
    "VBLORA": peft("VB-LoRA", "VBLoRA", 1e-4, 5e-4, vector_length=64),
    "HRA": peft("HRA", "HRA"),
    "MISS": peft("MiSS", "Miss"),
    "RANDLORA": peft("RandLoRA", "RandLora"),
    "SHIRA": peft("SHiRA", "Shira", 3e-4, random_seed=0),
    "C3A": peft("C3A", "C3A", 0.3, block_size=64),
    "ROAD": peft("RoAd", "Road", 1e-3),
    "TRAINABLE_TOKENS": peft("trainable tokens", "TrainableTokens", 0.2, token_indices=list(range(32, 127))),
    "rsLoRA": peft("LoRA, `use_rslora`", "Lora", use_rslora=True),
    "DELORA": peft("DeLoRA", "Delora", 1e-3),
    "WAVEFT": peft("WaveFT", "WaveFT"),
    "OSF": peft("OSF", "OSF", 5e-5),
    "GRALORA": peft("GraLoRA", "Gralora", 2e-4),
    "HIRA": peft("HiRA", "Hira", 4.5e-3),
    "LILY": peft("Lily", "Lily"),
    "PEANUT": peft("PEANuT", "Peanut"),
    "PSOFT": peft("PSOFT", "Psoft"),
    "PVERA": peft("PVeRA", "Pvera", 3e-3),
    "TINYLORA": peft("TinyLoRA", "TinyLora", 1e-3),
    "UNILORA": peft("Uni-LoRA", "UniLora"),
    "GLORA": peft("GLoRA", "Glora", 1e-4, 5e-4),
    "DEFT": peft("DEFT", "Deft"),
    "FROD": peft("FRoD", "Frod", 1e-4, 1e-3, progressbar=False),
    "BEFT": peft("BEFT", "Beft"),
    "ADAMSS": peft("AdaMSS", "Adamss"),
    "SUPERTUNING": peft("Super-Tuning", "Supertuning", r=None),
    "CARTRIDGE": peft("Cartridge", "Cartridge", experiment=False, num_virtual_tokens=TOKENS),
    "CPT": peft("CPT", "CPT", experiment=False, cpt_token_ids=EXAMPLE, cpt_tokens_type_mask=EXAMPLE_TYPES),
    "SHADOW": peft("Shadow", "Shadow", experiment=False, target_modules=None),
}

LEFT_OUT: dict[str, str] = {
    "ADAPTION_PROMPT": "supports Llama, Mistral and GPT-2, not GPT-NeoX, which the embedded model is",
    "MULTITASK_PROMPT_TUNING": "needs several tasks, and a task's number with each example",
    "POLY": "needs several tasks, and a task's number with each example",
    "XLORA": "mixes LoRA adapters that have been trained before",
}

ALL_METHODS: dict[str, Method] = {**METHODS, **PEFT_METHODS}
