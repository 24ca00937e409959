"""How a model is spread over processes: where Fast Forward works, where it cannot, and why.

    DDP, or equal replicas            every rank moves its whole copy by the same k·Δ
    FSDP2 (`fully_shard`, HSDP too)   every rank moves its shards, which each forward gathers
    anything else                     refused with its reason

Found by class names, so that nothing is imported for a model that does not use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ffkernels.ranks.optimizer_wrappers import optimizer_chain

_INSTEAD = "train with DDP or FSDP2 (torch.distributed.fsdp.fully_shard)"


def class_names(value: object) -> set[str]:
    return {cls.__name__ for cls in type(value).__mro__}


def gathered_by(model: nn.Module) -> str | None:
    """What gathers parameters for each forward: "DeepSpeed ZeRO-3", "FSDP1" or "FSDP2"; None for nothing."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3"
    names = set().union(*map(class_names, model.modules()))
    if "FullyShardedDataParallel" in names:
        return "FSDP1"
    return "FSDP2" if "FSDPModule" in names else None


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `fully_shard` was applied to."""
    return [module for module in model.modules() if "FSDPModule" in class_names(module)]


def reshard(modules: Iterable[nn.Module]) -> None:
    """Drop gathered parameters, so that the next forward gathers the shards as they are then.

    FSDP2 keeps the outermost module's parameters gathered after a forward, for the backward pass that follows
    in training. Weights that Fast Forward moves in between would not be seen.
    """
    for module in modules:
        module.reshard()


def replicas(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    """The DDP modules: `model` itself, or inside `torch.compile` and wrappers of one's own."""
    return [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]


def training_group(model: nn.Module) -> Any:
    """The process group over which DDP averages gradients; None, for the default group, elsewhere."""
    return next((module.process_group for module in replicas(model)), None)


def why_refused(model: nn.Module, optimizer: object) -> str | None:
    """Why Fast Forward cannot move the weights that this model and optimizer train, as "cause; cure"."""
    sharding = gathered_by(model)
    if sharding == "DeepSpeed ZeRO-3":
        return (
            "DeepSpeed ZeRO-3 keeps no weights in the model between steps, only partitions that it gathers "
            f"for each layer's forward; {_INSTEAD}"
        )
    if sharding == "FSDP1":
        return (
            "FullyShardedDataParallel (FSDP1) trains flattened shards, in which the model's parameters are "
            "views that come and go with every forward; use fully_shard (FSDP2), in accelerate "
            "fsdp_version: 2, or DDP"
        )
    return _deepspeed(optimizer) or _tensor_parallel(model)


def _deepspeed(optimizer: object) -> str | None:
    for wrapper in optimizer_chain(optimizer):
        module, name = type(wrapper).__module__, type(wrapper).__name__
        # Its fp16 and bf16 optimizers and those of ZeRO; DeepSpeed's plain optimizers live in deepspeed.ops.
        if module.startswith("deepspeed.runtime"):
            return (
                f"{name} of DeepSpeed trains its own float32 copy of weights and overwrites the model's with "
                "it at every step, which would undo what Fast Forward moved; "
                f"{_INSTEAD}, or DeepSpeed with zero_optimization.stage 0 in float32"
            )
    return None


def _tensor_parallel(model: nn.Module) -> str | None:
    by_fsdp = {id(p) for module in fsdp_modules(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        placements = getattr(parameter, "placements", None)
        if placements is None:
            continue
        shards = sum(not placement.is_replicate() for placement in placements)
        if shards > 1 or id(parameter) not in by_fsdp:
            return (
                f"{name} is sharded by tensor parallelism ({', '.join(map(str, placements))}): its ranks "
                "compute one example together, and Fast Forward would give them different ones; "
                f"{_INSTEAD}"
            )
    return None
