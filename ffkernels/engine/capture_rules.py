"""What keeps a validation loss out of a CUDA graph, and what makes a captured one stale.

A captured forward is a list of kernels with their arguments. Everything that Python decided while it was
recorded is fixed in it: the address of every parameter and buffer, which adapters are active and with what
scaling, which attention function runs, what autocast casts to. `why_not_captured` finds the models whose
forward decides anew at every call, or moves its weights about. `token` is all that a recording has fixed,
as one value to compare: equal tokens, valid graph.

    why_not_captured(validation, device)   None, or the cause and what to do about it
    token(validation)                      once per stage, on the host alone: no torch operator runs
    describe_change(old, new)              what differs between two tokens, in words

Not in a token: train/eval flags (an evaluation sets them), `requires_grad`, gradients and gradient
checkpointing (nothing is checkpointed in eval mode), and the values of weights: a replay reads them anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ffkernels.engine.causal_lm import find_autocast

if TYPE_CHECKING:
    from ffkernels.engine.validation import ValidationLoss

__all__ = ["describe_change", "evaluated_modules", "token", "why_not_captured"]

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}
_EAGER = "the stage runs eagerly otherwise"


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


def why_not_captured(validation: ValidationLoss, table_device: torch.device, *, explicit: bool) -> str | None:
    """Why this validation loss must not be captured on `table_device`, as "cause; cure", or None.

    Args:
        table_device: where the weights that move are.
        explicit: the user asked for a graph by name, which allows losses that are not on the fast path: the
            user answers for a loss function that is nothing but kernels.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            return (
                f"training runs in {ranks} processes, and collectives have no place in a graph that loops; "
                "train in one process to have graphs"
            )
    if validation.path != "fast" and not explicit:
        return (
            f"the validation loss is on its {validation.path} path ({validation.reason}), where Python may "
            'decide anew at every call; ask for executor="step_graph" or "stage_graph" by name if it does not'
        )
    modules = evaluated_modules(validation)
    return (
        _sharded(validation.model)
        or _offloaded(modules)
        or _elsewhere(modules, torch.device(table_device))
        or _quantised(modules)
        or _compiled(modules)
        or _rope(modules)
        or _experts(modules)
        or _attention(modules)
    )


def _class_names(value: object) -> set[str]:
    return {cls.__name__ for cls in type(value).__mro__}


def _tensors(modules: list[nn.Module]) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield module, name, tensor


def _sharded(model: nn.Module) -> str | None:
    if any(_class_names(module) & _SHARDED for module in model.modules()):
        return "FSDP gathers and frees parameters around every forward; train with DDP or on one device"
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            return "DeepSpeed ZeRO-3 gathers and frees parameters around every forward; use ZeRO-1 or ZeRO-2"
        if "DTensor" in _class_names(parameter):
            return f"{name} is a DTensor, whose operators communicate; train with whole tensors on one device"
    return None


def _offloaded(modules: list[nn.Module]) -> str | None:
    for module in modules:
        hook = vars(module).get("_hf_hook")
        if hook is not None:
            return (
                f"accelerate put {type(hook).__name__} on {type(module).__name__}: it moves weights or "
                'inputs around every forward; load the model on one device (device_map={"": 0}), where it '
                "fits, or call accelerate.hooks.remove_hook_from_submodules(model)"
            )
    for module, name, tensor in _tensors(modules):
        if tensor.device.type == "meta":
            return (
                f"{type(module).__name__}.{name} is on the meta device, its data offloaded; load the whole "
                "model onto the device"
            )
    return None


def _elsewhere(modules: list[nn.Module], device: torch.device) -> str | None:
    found = {tensor.device for _, _, tensor in _tensors(modules)}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        return f"the model is spread over {names}, and a graph lives on one device; put it on one device"
    for other in found - {device}:
        return f"the model is on {other} and the weights that move are on {device}; put both on one device"
    return None


def _quantised(modules: list[nn.Module]) -> str | None:
    for module in modules:
        if "Linear8bitLt" in _class_names(module):
            return (
                "bitsandbytes' 8-bit layers look for outliers in their input at every forward; load the base "
                "model in 4 bit or 16 bit to have graphs"
            )
    return None


def _compiled(modules: list[nn.Module]) -> str | None:
    for module in modules:
        attributes = vars(module)
        if (
            attributes.get("_compiled_call_impl") is not None
            or isinstance(attributes.get("_orig_mod"), nn.Module)
            or hasattr(attributes.get("forward"), "_torchdynamo_orig_callable")
        ):
            return (
                f"{type(module).__name__} inside the model is compiled, may be compiled anew at any call and "
                "may bring graphs of its own; compile the whole model (torch.compile(model)), which the "
                "validation looks through, or nothing"
            )
    return None


def _rope(modules: list[nn.Module]) -> str | None:
    for module in modules:
        found = vars(module).get("rope_type")
        kinds = found.values() if isinstance(found, dict) else [found]
        for kind in kinds:
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                return (
                    f"the rotary embedding ({kind}) looks at the batch's length to choose its frequencies; "
                    f"use a model with fixed rotary frequencies to have graphs, {_EAGER}"
                )
    return None


def _experts(modules: list[nn.Module]) -> str | None:
    for module in modules:
        config = vars(module).get("config")
        if not type(module).__name__.endswith("Experts") or config is None:
            continue
        kind = getattr(config, "_experts_implementation_internal", None)
        if kind in (None, "eager"):
            return (
                f"{type(module).__name__} loops over the experts that were hit, which the host reads; call "
                'model.set_experts_implementation("grouped_mm") or "batched_mm"'
            )
    return None


def _attention(modules: list[nn.Module]) -> str | None:
    for module in modules:
        kind = getattr(vars(module).get("config"), "_attn_implementation_internal", None)
        if kind == "flex_attention":
            return (
                "flex_attention compiles itself while it runs; load the model with "
                'attn_implementation="sdpa" to have graphs'
            )
        if isinstance(kind, str) and kind.startswith("flash_attention"):
            return (
                f"transformers looks for packed sequences before {kind}, which the host waits for; load the "
                'model with attn_implementation="sdpa", whose causal kernels are flash attention too'
            )
    return None


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
    modules: list[Any] = []
    tensors: list[tuple] = []
    adapters: list[tuple] = []
    hooks: list[tuple] = []
    forwards: list[tuple] = []
    configs: dict[int, tuple] = {}
    for module in evaluated_modules(validation):
        attributes, key = module.__dict__, id(module)
        modules.append(key)
        modules.append(type(module))
        if attributes["_parameters"]:
            _add_tensors(tensors, key, attributes["_parameters"])
        if attributes["_buffers"]:
            _add_tensors(tensors, key, attributes["_buffers"])
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
    return value if value.__hash__ is not None else id(value)


def _autocast_state(validation: ValidationLoss) -> tuple:
    kind = validation.device.type
    enabled = torch.is_autocast_enabled(kind)
    wrapped = find_autocast(validation.causal_lm.wrappers) if validation.causal_lm is not None else None
    return (
        torch.get_autocast_dtype(kind) if enabled else None,
        wrapped.fast_dtype if wrapped is not None and wrapped._enabled else None,
    )


def _precision() -> tuple:
    matmul = torch.backends.cuda.matmul
    # "none" leaves the choice to the wider setting, and that to the default.
    widths = (getattr(matmul, "fp32_precision", "none"), getattr(torch.backends, "fp32_precision", "none"))
    return (
        torch.are_deterministic_algorithms_enabled(),
        next((width for width in widths if width != "none"), "ieee"),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )


_IN_WORDS = {
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
        elif field == "modules":
            found.append("modules were added, removed or replaced")
        elif field == "tensors":
            found.append(_describe_tensors(before, after, new.names))
        elif before is not None and field in ("autocast", "attention", "precision"):
            found.append(f"{_IN_WORDS[field]} ({_first_difference(before, after)})")
        else:
            found.append(_IN_WORDS[field])
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
