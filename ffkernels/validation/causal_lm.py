"""Take a causal language model apart: the backbone, the head, and what the model does around them.

    logits = head(backbone(input_ids))          optionally  softcap · tanh(logits / softcap)

The validation loss runs the two halves itself, so that hidden states can be gathered between them. That
is only right for models whose forward is these two halves and nothing else. Whatever can be read from the
structure is decided here, with the reason in words; what cannot is left to the comparison with the
model's own loss. Structure must catch everything that depends on the adapters: a fresh LoRA
adapter has B = 0 and changes no loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from ffkernels.ranks.parallelism import gathered_by

# PEFT methods that act in the wrapper's forward, not inside the layers.
_PEFT_AROUND_THE_MODEL = {"XLORA", "POLY"}
# Config fields that scale the logits after the head (the neutral values mean "not at all"), or cap them.
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier_scale")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_NEUTRAL = (None, False, 1, 1.0)
_LOSSES_OF_CAUSAL_MODELS = (None, "ForCausalLM", "ForConditionalGeneration")


class FastPathRefused(Exception):
    """The model or the data are not what the fast path computes; the message says why."""


@dataclass(frozen=True)
class CausalLM:
    backbone: nn.Module
    head: nn.Module
    wrappers: tuple[nn.Module, ...]  # modules whose forward is bypassed, outermost first
    config: Any  # of the text model; may be None
    vocabulary: int | None
    embeddings: int | None
    softcap: float | None
    # The model itself where nothing but its whole forward may be run: FSDP2 gathers the parameters there.
    through: nn.Module | None = None
    # Pass a causal mask made once instead of none: "eager" attention would make its own at every forward.
    given_mask: bool = False

    @property
    def embedding_dtype(self) -> torch.dtype:
        """The dtype in which hidden states enter the backbone."""
        weight = getattr(self.wrappers[-1].get_input_embeddings(), "weight", None)
        floating = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        return weight.dtype if floating else torch.get_default_dtype()

    def current(self) -> CausalLM:
        """Itself, or the halves that the model has now: adapters put around the head later replace it.

        Raises:
            RuntimeError: when the model is no longer what the fast path computes.
        """
        inner = self.wrappers[-1]
        if inner.get_output_embeddings() is self.head and inner.base_model is self.backbone:
            return self
        try:
            return replace(find_causal_lm(self.wrappers[0]), given_mask=self.given_mask)
        except FastPathRefused as refusal:
            raise RuntimeError(
                f"the model changed since its ValidationLoss was made: {refusal}; make a new one"
            ) from refusal

    def check_length(self, longest: int) -> None:
        """Refuse what is only right for sequences up to some length."""
        window, name = _attention_window(self.config)
        if window is not None and window < longest:
            raise FastPathRefused(f"config.{name} = {window} is shorter than the longest example ({longest})")
        limit = _rope_limit(self.config)
        if limit is not None and limit < longest:
            raise FastPathRefused(
                f"the rotary embedding changes with the batch's length beyond {limit} positions and the "
                f"longest example has {longest}"
            )


def model_device(model: nn.Module) -> torch.device:
    """Where inputs go: the device of the first parameter or buffer that holds data.

    Raises:
        TypeError: for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: a torch.nn.Module is needed")
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The innermost model and the wrappers around it: data parallel, `torch.compile`, PEFT."""
    wrappers: list[nn.Module] = []
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            inner = model._orig_mod
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()
        else:
            return model, tuple(wrappers)
        if inner is model:
            return model, tuple(wrappers)
        wrappers.append(model)
        model = inner


def accepts_argument(module: nn.Module, name: str) -> bool:
    """Whether the class's forward takes `name`, by name or in its **kwargs."""
    try:
        parameters = inspect.signature(type(module).forward).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def find_causal_lm(model: nn.Module) -> CausalLM:
    """Backbone and head of `model`, or `FastPathRefused`."""
    through = _whole_model(model)
    inner, wrappers = unwrap(model)
    for wrapper in wrappers:
        _refuse_peft(wrapper)
    for module in (*wrappers, inner) if through is None else ():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(getattr(hook, "is_harmless_before_a_bypassed_forward", False) for hook in hooks):
            raise FastPathRefused(f"forward hooks on {type(module).__name__} would be skipped")

    config = getattr(inner, "config", None)
    if not callable(getattr(inner, "get_output_embeddings", None)) or config is None:
        raise FastPathRefused(f"{type(inner).__name__} is not a transformers model with an output embedding")
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    _refuse_by_config(inner, config, text)
    head = inner.get_output_embeddings()
    backbone = getattr(inner, "base_model", None)
    if not isinstance(head, nn.Module) or not isinstance(backbone, nn.Module) or backbone is inner:
        raise FastPathRefused(f"{type(inner).__name__} has no separate backbone and output embedding")
    for name, module in backbone.named_modules():
        if getattr(module, "is_causal", True) is False:
            raise FastPathRefused(f"{name} attends in both directions")

    softcap = next(filter(None, (getattr(text, name, None) for name in _SOFTCAPS)), None)
    inputs = inner.get_input_embeddings() if callable(getattr(inner, "get_input_embeddings", None)) else None
    return CausalLM(
        backbone=backbone,
        head=head,
        wrappers=(*wrappers, inner),
        config=text,
        vocabulary=_rows(head, "out_features") or getattr(text, "vocab_size", None),
        embeddings=_rows(inputs, "num_embeddings"),
        softcap=float(softcap) if softcap else None,
        through=through,
    )


def find_autocast(wrappers: tuple[nn.Module, ...]) -> torch.autocast | None:
    """The autocast that accelerate wrapped around a bypassed `forward`, if there is one and it is enabled.

    `Accelerator.prepare` replaces `model.forward` on the instance by a chain of decorators, one of them a
    `torch.autocast`. The fast path calls the backbone below it and has to enter the same precision itself.
    """
    for module in reversed(wrappers):
        forward = vars(module).get("forward")
        for _ in range(16):
            if forward is None:
                break
            for cell in getattr(forward, "__closure__", None) or ():
                try:
                    value = cell.cell_contents
                except ValueError:
                    continue
                if isinstance(value, torch.autocast):
                    return value if value._enabled else None
            forward = _next_layer(forward)
    return None


def _next_layer(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    for attribute in ("__func__", "model_forward", "__wrapped__"):
        layer = getattr(forward, attribute, None)
        if callable(layer):
            return layer
    return None


def cuda_products_in_tf32() -> bool:
    """Whether float32 products run in TF32 on CUDA: factors rounded to 10 bits of mantissa, by 5e-4 at most.

    PyTorch has two interfaces to that switch. The old getters (`torch.get_float32_matmul_precision`,
    `allow_tf32`) raise RuntimeError once the new one switched TF32 on, as `TrainingArguments(tf32=True)`
    does. The new getter knows what either has set: what `cuda.matmul` leaves open ("none") its backend
    decides, and what that leaves open the root of the tree.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _rows(module: nn.Module | None, attribute: str) -> int | None:
    # The weight first: PEFT's tied copy of an output embedding has in_features and out_features exchanged.
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.ndim == 2:
        return weight.shape[0]
    size = getattr(module, attribute, None)
    return size if isinstance(size, int) else None


def _whole_model(model: nn.Module) -> nn.Module | None:
    """What has to be called as a whole, because its parameters are gathered in its forward; else None."""
    sharding = gathered_by(model)
    if sharding is None:
        return None
    if sharding != "FSDP2":
        raise FastPathRefused(
            f"{sharding} gathers parameters in the wrapper's forward, which would be bypassed"
        )
    # The hook in front of the head is new for every forward: a compiled whole would be compiled each time.
    return model._orig_mod if isinstance(getattr(model, "_orig_mod", None), nn.Module) else model


def _refuse_peft(wrapper: nn.Module) -> None:
    configs = getattr(wrapper, "peft_config", None)
    if not isinstance(configs, dict):
        return
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or kind in _PEFT_AROUND_THE_MODEL:
            raise FastPathRefused(f"PEFT's {kind} works in the wrapper's forward, not inside the layers")
        if getattr(config, "alora_invocation_tokens", None):
            raise FastPathRefused("activated LoRA looks for its invocation tokens in the wrapper's forward")
        if kind == "ADALORA" and getattr(config, "orth_reg_weight", 0):
            raise FastPathRefused("AdaLoRA's wrapper adds an orthogonality penalty to the model's own loss")


def _refuse_by_config(model: nn.Module, config: Any, text: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise FastPathRefused(f"{type(model).__name__} is an encoder-decoder model")
    loss_type = getattr(model, "loss_type", None)
    if loss_type not in _LOSSES_OF_CAUSAL_MODELS:
        raise FastPathRefused(
            f"{type(model).__name__}'s loss ({loss_type}) is not the causal language model's"
        )
    if getattr(text, "use_bidirectional_attention", None):
        raise FastPathRefused("config.use_bidirectional_attention is set")
    if getattr(text, "output_router_logits", False):
        raise FastPathRefused("config.output_router_logits adds the routers' auxiliary loss")
    for name in _LOGIT_SCALES:
        value = getattr(text, name, None)
        if value not in _NEUTRAL:
            raise FastPathRefused(f"config.{name} = {value} changes the logits after the output embedding")


def _attention_window(config: Any) -> tuple[int | None, str]:
    layers = getattr(config, "layer_types", None)
    limited = layers is None or any("sliding" in kind or "chunked" in kind for kind in layers)
    if limited and getattr(config, "use_sliding_window", True):
        for name in ("sliding_window", "attention_chunk_size"):
            size = getattr(config, name, None)
            if isinstance(size, int) and size > 0:
                return size, name
    return None, ""


def _rope_limit(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict):
        return None
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in (rope, *nested):
        if parameters.get("rope_type", parameters.get("type")) in ("dynamic", "longrope"):
            return (
                parameters.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or getattr(config, "max_position_embeddings", None)
            )
    return None
