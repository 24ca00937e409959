"""What a captured evaluation has fixed, as one value to compare: equal tokens, valid graph.

A captured forward is a list of kernels with their arguments. Everything that Python decided while it was
recorded is fixed in it: the address of every parameter and buffer, which adapters are active and with what
scaling, which attention function runs, what autocast casts to.

Not in a token: train/eval flags (an evaluation sets them), `requires_grad`, gradients and gradient
checkpointing (nothing is checkpointed in eval mode), and the values of weights: a replay reads them anew.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ffkernels.validation.causal_lm import cuda_products_in_tf32, find_autocast
from ffkernels.validation.evaluator import autocast_dtype

if TYPE_CHECKING:
    from ffkernels.validation.loss import ValidationLoss


def evaluated_modules(validation: ValidationLoss) -> list[nn.Module]:
    """The modules that `validation.evaluate()` runs: on the fast path the backbone's and the head's."""
    lm = validation.causal_lm
    waiting = [validation.model] if lm is None else [lm.backbone, lm.head]
    found: dict[int, nn.Module] = {}
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in found:
            continue
        found[id(module)] = module
        # Straight from the dictionaries: this walk is a third of what a token costs.
        children = module.__dict__["_modules"]
        if children:
            waiting.extend(children.values())
    return list(found.values())


class _Names:
    """Names of a model's modules, looked up when a change has to be described. Equal for the same model."""

    __slots__ = ("_id", "_model")

    def __init__(self, model: nn.Module) -> None:
        self._model, self._id = weakref.ref(model), id(model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Names) and self._id == other._id

    def __hash__(self) -> int:
        return hash(self._id)

    def of(self, module: int) -> str:
        model = self._model()
        for name, candidate in model.named_modules() if model is not None else ():
            if id(candidate) == module:
                return name or type(candidate).__name__
        return "a module that is gone"


class Token(NamedTuple):
    """All that a captured evaluation has fixed. The fields' order is the order in which changes are named."""

    names: _Names
    version: tuple
    adapters: tuple  # (module, active, disabled, merged, scaling, variants) of every PEFT layer
    modules: tuple  # module, class, …
    tensors: tuple  # (module, name, address, dtype, shape, strides) of every parameter and buffer
    hooks: tuple  # (module, ids of its hooks)
    forwards: tuple  # (module, id of the forward that its instance carries)
    attention: tuple  # (config, attention and experts implementation)
    autocast: tuple
    precision: tuple
    attention_backends: tuple


def token(validation: ValidationLoss) -> Token:
    """What a capture of `validation.evaluate()` has fixed, now.

    The validation follows its model first (`ValidationLoss.follow`): buffers that belong to a device or a
    head that the model has left are rebuilt, which shows as another version.
    """
    validation.follow()
    modules, tensors, adapters, hooks, forwards = [], [], [], [], []
    configs: dict[int, tuple] = {}
    for module in evaluated_modules(validation):
        attributes, key = module.__dict__, id(module)
        modules += (key, type(module))
        for held in (attributes["_parameters"], attributes["_buffers"]):
            if held:
                _add_tensors(tensors, key, held)
        if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
            _add_hooks(hooks, key, attributes["_forward_hooks"], attributes["_forward_pre_hooks"])
        if "forward" in attributes:
            forwards.append((key, id(attributes["forward"])))
        if "_disable_adapters" in attributes:
            adapters.append(_adapter_state(module, key))
        config = attributes.get("config")
        if config is not None and id(config) not in configs:
            configs[id(config)] = (
                getattr(config, "_attn_implementation_internal", None),
                getattr(config, "_experts_implementation_internal", None),
            )
    everywhere = nn.modules.module
    hooks.append((0, *everywhere._global_forward_hooks, *everywhere._global_forward_pre_hooks))
    return Token(
        names=_Names(validation.model),
        version=(validation.version, validation.path),
        adapters=tuple(adapters),
        modules=tuple(modules),
        tensors=tuple(tensors),
        hooks=tuple(hooks),
        forwards=tuple(forwards),
        attention=tuple(configs.items()),
        autocast=_autocast_state(validation),
        precision=_precision(),
        attention_backends=(
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
    )


def referred(validation: ValidationLoss) -> tuple:
    """What a token names by its id: held as long as the token is, so that nothing else gets that id."""
    modules = evaluated_modules(validation)
    held = [(m.__dict__.get("forward"), *(m.__dict__.get("lora_variant") or {}).values()) for m in modules]
    return validation.model, modules, held


def _add_tensors(found: list[tuple], key: int, tensors: dict[str, torch.Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            try:
                address = tensor.data_ptr()
            except RuntimeError:  # a tensor without storage
                address = id(tensor)
            found.append((key, name, address, tensor.dtype, tensor.shape, tensor.stride()))


def _add_hooks(found: list[tuple], key: int, *hooks: dict[int, Any]) -> None:
    # Gradient checkpointing hooks the embedding for training's sake; without gradients the hook does nothing.
    ids = [
        number
        for registered in hooks
        for number, hook in registered.items()
        if not getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
    ]
    if ids:
        found.append((key, *ids))


def _adapter_state(module: nn.Module, key: int) -> tuple:
    attributes = module.__dict__
    return (
        key,
        _frozen(getattr(module, "_active_adapter", None)),
        attributes["_disable_adapters"],
        _frozen(attributes.get("merged_adapters")),
        _frozen(attributes.get("scaling")),
        tuple((name, id(variant)) for name, variant in (attributes.get("lora_variant") or {}).items()),
    )


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(value)
    if isinstance(value, torch.Tensor):
        return (value.data_ptr(), value.shape)
    return value if value.__hash__ is not None else repr(value)


def _autocast_state(validation: ValidationLoss) -> tuple:
    kind = validation.device.type
    active = autocast_dtype(kind) or validation.evaluator.autocast
    lm = validation.causal_lm
    wrapped = find_autocast(lm.wrappers) if lm is not None else None
    return active, None if wrapped is None else wrapped.fast_dtype


def _precision() -> tuple:
    matmul = torch.backends.cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        "TF32" if cuda_products_in_tf32() else "IEEE float32",
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )


_IN_WORDS = {
    "modules": "modules were added, removed or replaced",
    "version": "the validation set's buffers were rebuilt",
    "forwards": "a module's forward was replaced",
    "hooks": "forward hooks were added or removed",
    "attention": "the attention or experts implementation",
    "autocast": "autocast",
    "precision": "a precision or determinism switch",
    "attention_backends": "which attention kernels are allowed",
}
_ADAPTER_PARTS = (
    "the active adapter",
    "adapters were switched off or on",
    "adapters were merged or unmerged",
    "an adapter's scaling",
    "a kind of adapter",
)
_TENSOR_PARTS = ("address", "dtype", "shape", "strides")


def describe_change(old: Token, new: Token) -> str:
    """Which parts differ, in words; "nothing" for equal tokens."""
    if old.names != new.names:
        return "another model"
    found: list[str] = []
    for field in Token._fields[1:]:
        before, after = getattr(old, field), getattr(new, field)
        if before == after:
            continue
        if field == "adapters":
            found.append(_describe_adapters(before, after, new.names))
        elif field == "tensors":
            found.append(_describe_tensors(before, after, new.names))
        else:
            shown = field in ("autocast", "attention", "precision")
            found.append(_IN_WORDS[field] + (f" ({_first_difference(before, after)})" if shown else ""))
    return "; ".join(found) or "nothing"


def _first_difference(before: tuple, after: tuple) -> str:
    for old, new in zip(before, after, strict=False):
        if old != new:
            if isinstance(old, tuple) and isinstance(new, tuple):
                return _first_difference(old, new)
            return f"{old} → {new}"
    return f"{len(before)} → {len(after)}"


def _describe_adapters(before: tuple, after: tuple, names: _Names) -> str:
    if len(before) != len(after):
        return f"{len(before)} adapter layers became {len(after)}"
    for old, new in zip(before, after, strict=True):
        for part, was, now in zip(_ADAPTER_PARTS, old[1:], new[1:], strict=True):
            if was != now:
                shown = f" ({was} → {now})" if part != _ADAPTER_PARTS[-1] else ""
                return f"{part}{shown} at {names.of(new[0])}"
    return "the adapter layers"


def _describe_tensors(before: tuple, after: tuple, names: _Names) -> str:
    old = {entry[:2]: entry[2:] for entry in before}
    new = {entry[:2]: entry[2:] for entry in after}
    changed = [key for key in new if key in old and new[key] != old[key]]
    if not changed:
        return f"{len(new.keys() - old.keys())} tensors came and {len(old.keys() - new.keys())} went"
    module, name = changed[0]
    part = next(
        part
        for part, was, now in zip(_TENSOR_PARTS, old[changed[0]], new[changed[0]], strict=True)
        if was != now
    )
    more = f" and of {len(changed) - 1} more tensors" if len(changed) > 1 else ""
    return f"the {part} of {names.of(module)}.{name}{more}"
