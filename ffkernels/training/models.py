"""Which model to fine-tune, and what of it trains: an adapter, or its own weights.

The frozen base may be 16-bit. The adapter never is: at small learning rates an update is below half a unit
in the last place of a bf16 weight and rounds away, and Fast Forward would repeat a Δ that is mostly zeros.
So every trainable tensor that ``add_adapter`` leaves behind is fp32.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ffkernels.training.config import ADAPTERS
from ffkernels.training.requirements import first_line, no_progress_bars, require
from ffkernels.training.rules import ABOVE_0, FRACTION, check, whole
from ffkernels.training.tokenizer import ByteTokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EMBEDDED = {"tiny": Path(__file__).resolve().parents[1] / "data" / "tiny"}

FROM_PYPI = "smollm2-135m"

# All attention projections, the output included. In GPT-NeoX the MLP's layers are dense_h_to_4h and
# dense_4h_to_h, so the suffix "dense" is the attention's alone. A family is recognised by having every
# name.
ATTENTION_TARGETS = (("query_key_value", "dense"), ("q_proj", "k_proj", "v_proj", "o_proj"))

CONFIG = "config.json"  # says of a directory that a model is saved in it


def load_model(
    name: str = "tiny",
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    attn: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """(model in eval mode, its tokenizer).

    ``name``: "tiny", "smollm2-135m", a directory, or a hub id. ``dtype``: of all weights. ``attn``: one of
    transformers' attention implementations ("sdpa", "eager", "flash_attention_2", …); None leaves the
    choice to transformers.

    Raises:
        ValueError: when a directory holds no model, or ``dtype`` is none.
        RuntimeError: when the model is not at hand, or ``attn`` cannot run here; the message says what to do.
    """
    transformers = require("transformers")
    source = _source(name)
    options = {"dtype": _dtype(dtype)}
    if attn is not None:
        options["attn_implementation"] = attn
    if ours := name in (*EMBEDDED, FROM_PYPI):
        options["local_files_only"] = True
    with _explained(name), no_progress_bars(ours):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
        except (ImportError, ValueError) as error:
            if attn is None:
                raise
            raise RuntimeError(
                f"attn={attn!r} cannot be had for model {name!r} ({first_line(error)}); take 'sdpa', or "
                "leave it out"
            ) from error
        tokenizer = _tokenizer(source, model.config)
    model.config.use_cache = False  # no generation here; a cache would only cost memory
    return model.to(device).eval(), tokenizer


def load_tokenizer(name: str = "tiny") -> Any:
    """The tokenizer of ``load_model(name)``, without the model's weights."""
    source = _source(name)
    with _explained(name), no_progress_bars():
        return _tokenizer(source, require("transformers").AutoConfig.from_pretrained(source))


def _source(name: str) -> str:
    """What transformers is to load for ``name``: a directory, or a hub id as it is."""
    source = str(EMBEDDED.get(name, name))
    if name == FROM_PYPI and not Path(name).is_dir():
        from ffkernels.training import smollm2

        source = str(smollm2.checkpoint())
    if Path(source).is_dir() and not (Path(source) / CONFIG).is_file():
        raise ValueError(f"model {name!r}: this directory holds no {CONFIG}, so it is no saved model.")
    return source


def add_adapter(
    model: PreTrainedModel,
    *,
    method: str = "lora",
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Sequence[str] | None = None,
    seed: int | None = None,
) -> PeftModel:
    """Freeze ``model`` and put a LoRA or DoRA adapter on it; the adapter's tensors are fp32.

    ``targets``: module-name suffixes, or one regular expression over full names. None takes every attention
    projection of GPT-NeoX- and Llama-like models, and PEFT's default for others. ``seed`` fixes the adapter's
    initial values and leaves the caller's random state alone; None draws from the global generator.
    """
    if method not in ADAPTERS:
        raise ValueError(f"method={method!r}; allowed are {', '.join(ADAPTERS)}.")
    check("rank", rank, whole(1))
    check("alpha", alpha, ABOVE_0)
    check("dropout", dropout, FRACTION)
    peft = require("peft")
    if targets is None:
        targets = attention_targets(model)
    elif not isinstance(targets, str):
        _check_targets(model, targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=method == "dora",
        target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
    )
    with torch.random.fork_rng(enabled=seed is not None), warnings.catch_warnings():
        # PEFT asks for it under its old name; nothing here concerns the caller.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise ValueError(
                f"PEFT could not place the adapter with targets={targets!r} ({error}). "
                f"{_linear_modules(model)}"
            ) from error


def train_weights(model: PreTrainedModel, targets: Sequence[str] | None = None) -> PreTrainedModel:
    """Let every weight of ``model`` train, or, with ``targets``, those of the modules with these names alone.

    ``targets``: module-name suffixes, such as ``attention_targets`` gives; their weights and biases train,
    the rest is frozen.
    """
    model.requires_grad_(targets is None)
    if targets is not None:
        _check_targets(model, targets)
        for name, module in model.named_modules():
            if _named(name, targets):
                module.requires_grad_(True)
    return model


def _check_targets(model: torch.nn.Module, targets: Sequence[str]) -> None:
    """PEFT asks only that one of the names is found, and leaves the adapters of a misspelt one out."""
    present = [name for name, _ in model.named_modules()]
    if missing := [target for target in targets if not any(_named(name, [target]) for name in present)]:
        names = ", ".join(map(repr, missing))
        raise ValueError(
            f"targets={list(targets)!r}: this model has no module named {names}. {_linear_modules(model)}"
        )


def _named(module: str, targets: Iterable[str]) -> bool:
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _linear_modules(model: torch.nn.Module) -> str:
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return f"Linear modules of this model: {', '.join(sorted(found)) or 'none'}."


def attention_targets(model: torch.nn.Module) -> list[str] | None:
    """The names of the attention projections where the architecture is known, else None."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next((list(names) for names in ATTENTION_TARGETS if present.issuperset(names)), None)


def _tokenizer(source: str, config: Any) -> Any:
    # A copy of the embedded model that someone saved elsewhere still says whose bytes it reads.
    if getattr(config, "tokenizer_class", None) == ByteTokenizer.__name__:
        return ByteTokenizer()
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        # Padding is masked out of attention and loss, so any token can stand there.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype={dtype!r}; give a floating-point torch dtype or its name: 'bfloat16'.")
    return resolved


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """transformers reports a missing network, a typo and a private model alike; say what can be done."""
    from safetensors import SafetensorError  # of a file of weights that is none; no OSError

    try:
        yield
    except OSError as error:
        if Path(name).is_dir():
            raise RuntimeError(
                f"model {name!r}: this directory cannot be loaded ({first_line(error)})"
            ) from error
        raise RuntimeError(
            f"model {name!r} could not be loaded: it is not embedded here ({', '.join(EMBEDDED)}), not "
            f"{FROM_PYPI!r}, not a directory with a model and its tokenizer, and neither the Hugging Face "
            f"hub nor its local cache gave it ({first_line(error)}). {_what_to_do()}, or use 'tiny'."
        ) from error
    except (ImportError, ValueError, SafetensorError) as error:
        raise RuntimeError(
            f"model {name!r} is there, but transformers {require('transformers').__version__} makes no "
            f"causal language model with a tokenizer of it ({first_line(error)})"
        ) from error


def _what_to_do() -> str:
    """About a model of the hub that did not come."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return (
            "HF_HUB_OFFLINE is set, so that only the cache was asked: unset it where there is a network; "
            "without one copy the model here and name its directory"
        )
    return (
        "With a network: check the spelling; a model that asks for consent wants it given on the hub, and a "
        "login here (hf auth login). Without one: copy the model here and name its directory "
        "(HF_HUB_OFFLINE=1 saves the waiting)"
    )
