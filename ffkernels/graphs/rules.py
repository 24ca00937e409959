"""What keeps a validation loss out of a CUDA graph: a forward that decides anew at every call what to run, or
moves its weights about. What makes a captured one stale is in its token (`graphs.token`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ffkernels.graphs.token import evaluated_modules
from ffkernels.ranks.parallelism import class_names, gathered_by

if TYPE_CHECKING:
    from ffkernels.validation.loss import ValidationLoss

_EAGER = "the stage runs eagerly otherwise"


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
    modules, device = evaluated_modules(validation), torch.device(table_device)
    of_all = (_sharded(validation.model), _offloaded(modules), _elsewhere(modules, device))
    of_each = (rule(module, device) for rule in _OF_A_MODULE for module in modules)
    return next((reason for reason in (*of_all, *of_each) if reason), None)


def _tensors(modules: list[nn.Module]) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield module, name, tensor


def _sharded(model: nn.Module) -> str | None:
    if sharding := gathered_by(model):
        return (
            f"{sharding} gathers and frees parameters around every forward; train with DDP or on one device"
        )
    for name, parameter in model.named_parameters():
        if "DTensor" in class_names(parameter):
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


def _quantised(module: nn.Module, device: torch.device) -> str | None:
    if "Linear8bitLt" not in class_names(module):
        return None
    return (
        "bitsandbytes' 8-bit layers look for outliers in their input at every forward; load the base model "
        "in 4 bit or 16 bit to have graphs"
    )


def _compiled(module: nn.Module, device: torch.device) -> str | None:
    attributes = vars(module)
    if not (
        attributes.get("_compiled_call_impl") is not None
        or isinstance(attributes.get("_orig_mod"), nn.Module)
        or hasattr(attributes.get("forward"), "_torchdynamo_orig_callable")
    ):
        return None
    return (
        f"{type(module).__name__} inside the model is compiled, may be compiled anew at any call and may "
        "bring graphs of its own; compile the whole model (torch.compile(model)), which the validation looks "
        "through, or nothing"
    )


def _rope(module: nn.Module, device: torch.device) -> str | None:
    found = vars(module).get("rope_type")
    for kind in found.values() if isinstance(found, dict) else [found]:
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            return (
                f"the rotary embedding ({kind}) looks at the batch's length to choose its frequencies; "
                f"use a model with fixed rotary frequencies to have graphs, {_EAGER}"
            )
    return None


def _experts(module: nn.Module, device: torch.device) -> str | None:
    name, config = type(module).__name__, vars(module).get("config")
    if not name.endswith("Experts") or config is None:
        return None
    kind = getattr(config, "_experts_implementation_internal", None)
    if kind in (None, "eager"):
        return (
            f"{name} loops over the experts that were hit, which the host reads; call "
            'model.set_experts_implementation("grouped_mm")'
        )
    if kind != "grouped_mm" or device.type != "cuda":
        return None
    # Elsewhere PyTorch's grouped product is a loop over groups whose sizes it copies to the host.
    wide = {parameter.dtype for parameter in module.parameters()} - {torch.bfloat16}
    if not wide and torch.cuda.get_device_capability(device) >= (9, 0):
        return None
    return (
        f"{name} multiplies by groups whose sizes the host reads, except in bfloat16 on compute capability "
        f"9.0 or later; load the model in bfloat16 on such a GPU, {_EAGER}"
    )


def _attention(module: nn.Module, device: torch.device) -> str | None:
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


_OF_A_MODULE = (_quantised, _compiled, _rope, _experts, _attention)
