"""Which tensors Fast Forward moves: the trainable parameters that the optimizer updates.

Chosen by ``requires_grad``, never by name: half of PEFT's methods have no "lora" in theirs. One memory is
moved once, also where several parameters lie in it, and only where it is: of a DTensor each rank has its own
shard (``local_tensors``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.ops import TensorTable
from ffkernels.ops.notices import announce_once
from ffkernels.ranks.digests import digest
from ffkernels.ranks.optimizer_wrappers import optimizer_chain, parts, refuse_own_weights
from ffkernels.ranks.parallelism import fsdp_modules, reshard

NameFilter = Callable[[str], bool] | str | Iterable[str]

# AdaLoRA keeps how many ranks are left as a parameter. PEFT's cast of a 16-bit adapter to float32 turns it
# into a trainable one, but it is a count, not a weight, and no checkpoint has it.
_COUNTS = re.compile(r"(^|\.)ranknum(\.|$)")


def unwrap_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The torch optimizer whose ``step`` really runs, out of wrappers (``optimizer_wrappers``).

    Raises:
        TypeError: when no torch optimizer is inside, or one that has no hooks.
        ValueError: when one on the way says that it keeps weights of its own, which a stage cannot move.
    """
    chain = optimizer_chain(optimizer) or [optimizer]
    refuse_own_weights(chain)
    inner, name = chain[-1], type(chain[-1]).__name__
    if not isinstance(inner, torch.optim.Optimizer):
        several = parts(inner)
        cure = (
            f", which holds {len(several)} of them ({', '.join(type(part).__name__ for part in several)}): "
            "make one FastForward for each, or one optimizer class whose step() calls theirs"
            if several
            else ""
        )
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or wrap one as .optimizer, got {name}{cure}"
        )
    if not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{name} is a torch.optim.Optimizer without hooks on its step, since its __init__ does not call "
            "torch.optim.Optimizer.__init__(self, params, defaults); let it do so"
        )
    return inner


def trainable_weights(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
) -> dict[str, nn.Parameter]:
    """Parameters of ``model`` that require a gradient and belong to ``optimizer``, by name.

    ``include`` and ``exclude`` narrow the set: a predicate on the name, a regular expression
    (``re.search``), or several of them. Of parameters that are the same memory, the first stands for all.
    DTensors are among them as they are; ``local_tensors`` gives what can be moved.

    Raises:
        ValueError: when nothing is left, saying at which of the conditions.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # After a forward without a backward, the outermost module lists gathered copies of its parameters.
        reshard(fsdp_modules(model))
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            "the model has no trainable parameter (requires_grad is False on all of them); "
            "add an adapter or unfreeze some"
        )
    weights = {name: p for name, p in trainable.items() if id(p) in updated}
    if not weights:
        raise ValueError(
            f"none of the model's {len(trainable)} trainable parameters is in the optimizer's param_groups "
            f"({type(optimizer).__name__}, {len(updated)} other tensors); give the optimizer whose step() "
            "updates them, made after the model was moved and adapters were added"
        )
    weights = _each_memory_once(_without_counts(weights))
    wanted, unwanted = _matcher(include, "include"), _matcher(exclude, "exclude")
    kept = {
        name: p
        for name, p in weights.items()
        if (include is None or wanted(name)) and not (exclude is not None and unwanted(name))
    }
    if not kept:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} leave none of the {len(weights)} trainable "
            f"parameters (the first is {next(iter(weights))!r})"
        )
    if not any(p.numel() for p in kept.values()):
        raise ValueError(
            f"all {len(kept)} trainable parameters are empty on this process between steps, and Fast Forward "
            "moves whole weights: keep them whole there, or use DDP or FSDP2 (fully_shard)"
        )
    return kept


def require_same_model(validation: Any, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse a loss that moving these weights cannot change.

    Raises:
        ValueError: when the validation's model has none of them.
    """
    validated = {id(p) for p in validation.model.parameters()}
    if not any(id(weight) in validated for weight in weights.values()):
        raise ValueError(
            "validation belongs to a model that has none of the weights Fast Forward moves; make the "
            "ValidationLoss from the model that trains"
        )


def _without_counts(weights: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    counts = [name for name in weights if _COUNTS.search(name)]
    if counts:
        announce_once(
            "ranknum",
            f"AdaLoRA's ranknum is trainable here ({len(counts)} of them, such as {counts[0]!r}) and the "
            "optimizer changes it, which no checkpoint will show; Fast Forward leaves it out. Set "
            "requires_grad = False on these parameters before you make the optimizer",
        )
    return {name: p for name, p in weights.items() if name not in counts}


def _each_memory_once(weights: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    seen: set[tuple] = set()
    kept = {}
    for (name, weight), local in zip(weights.items(), local_tensors(weights).values(), strict=True):
        place = (local.device, local.data_ptr(), local.numel(), local.dtype)
        if local.data_ptr() == 0 or place not in seen:  # 0: empty, or not materialised
            kept[name] = weight
        seen.add(place)
    return kept


def local_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same names with tensors that have memory of their own: of a DTensor this rank's shard, else itself.

    A shard is the memory that the parameter trains in, so moving it moves the parameter. It is empty on a
    rank that got no row.
    """
    # Without a gradient to route, to_local() returns the shard itself or a plain view of it.
    with torch.no_grad():
        return {
            name: weight.to_local() if hasattr(weight, "to_local") else weight
            for name, weight in weights.items()
        }


def _matcher(names: NameFilter | None, field: str) -> Callable[[str], bool]:
    if names is None:
        return lambda name: False
    if callable(names):
        return names
    if isinstance(names, str):
        names = [names]
    names = list(names)
    if not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"{field} must be a predicate, a regular expression or several of them, got {names!r}"
        )
    patterns = [re.compile(n) for n in names]
    return lambda name: any(p.search(name) for p in patterns)


def signature(weights: dict[str, nn.Parameter]) -> tuple:
    """What must not change while a table points at these weights, or at their shards."""
    return tuple(
        (name, id(weights[name]), t.data_ptr(), t.shape, t.stride(), t.dtype, t.device)
        for name, t in local_tensors(weights).items()
    )


class MovedWeights:
    """The weights that stages move, and the table of them, which follows them to other memory.

    Args:
        model, optimizer, include, exclude: as of ``trainable_weights``.
        impl: which implementation moves them.

    Attributes:
        parameters: by name.
        table: of their tensors, in the same order; None when it was let go.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
        *,
        impl: str = "auto",
    ) -> None:
        self._present = partial(trainable_weights, model, optimizer, include, exclude)
        self._optimizer, self._impl = optimizer, impl
        self.table: TensorTable | None = None
        self._make(self._present())
        self._given = self._in_optimizer()  # held, so that no other parameter gets the id of one

    def _make(self, weights: dict[str, nn.Parameter]) -> None:
        tell_of_rounding(weights)
        self.table = TensorTable(local_tensors(weights), impl=self._impl)
        self.parameters, self._signature = weights, signature(weights)

    def _in_optimizer(self) -> list[nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def is_stale(self, others: bool = False) -> bool:
        """Whether the table is missing or of memory that the weights have left.

        Args:
            others: or the optimizer has other parameters than when it was looked at last.
        """
        if self.table is None or self._is_elsewhere():
            return True
        return others and list(map(id, self._in_optimizer())) != list(map(id, self._given))

    def _is_elsewhere(self) -> bool:
        """Of a DTensor the table has a shard that stays where it lay when the parameter gets another one."""
        return self.table.is_stale(local_tensors(self.parameters).values())

    def refresh(self, let_go: Callable[[], None]) -> bool:
        """Take the table along, or make it anew for other weights; whether it is another one.

        ``let_go`` is called before, where either is to be done: a capture holds on to the memory.
        """
        weights = self._present()
        now = signature(weights)
        given, rebuilt = self._in_optimizer(), False
        if self.table is None or now != self._signature or self._is_elsewhere():
            let_go()
            rebuilt = self.table is None or not self._follow(weights, now)
            if rebuilt:
                self.table = None  # free the old arenas first
                self._make(weights)
        self._given = given
        return rebuilt

    def follow(self) -> bool:
        """Take the table along where its weights lie elsewhere; False where that takes another table."""
        return not self._is_elsewhere() or self._follow(self.parameters, signature(self.parameters))

    def free(self) -> None:
        """Let the table go with its arenas."""
        self.table, self.parameters, self._given = None, {}, []

    @property
    def sharded(self) -> bool:
        """Whether this process has a part of some of them only."""
        return any(hasattr(weight, "placements") for weight in self.parameters.values())

    @property
    def fingerprint(self) -> list[Any]:
        """How many there are, and a hash of their names, shapes and dtypes."""
        facts = [[name, list(p.shape), str(p.dtype)] for name, p in self.parameters.items()]
        return [len(facts), digest(facts)]

    def _follow(self, weights: dict[str, nn.Parameter], now: tuple) -> bool:
        """Whether only the memory is another, and the table is there now. Else it is said what changed."""
        names, before = ([entry[:2] for entry in one] for one in (now, self._signature))
        if names != before or not self.table.follow(list(local_tensors(weights).values())):
            _tell_of_changes(self._signature, now)
            return False
        self.parameters, self._signature = weights, now
        return True


def _tell_of_changes(before: tuple, now: tuple) -> None:
    old, new = {entry[0]: entry for entry in before}, {entry[0]: entry for entry in now}
    shared = [name for name in new if name in old]
    changes = {
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "another parameter": [name for name in shared if old[name][1] != new[name][1]],
        "of another shape, layout, dtype or device": [n for n in shared if old[n][3:] != new[n][3:]],
    }
    changes = {what: names for what, names in changes.items() if names}
    told = "; ".join(f"{len(names)} {what}, such as {names[0]!r}" for what, names in changes.items())
    announce_once(
        f"weights-changed-{', '.join(changes)}",
        f"the trainable parameters changed since Fast Forward looked last ({told or 'in another order'}); "
        "the table is rebuilt for the present ones",
    )


def tell_of_rounding(weights: Mapping[str, Tensor]) -> None:
    """Say once where trainable weights are so narrow that repeated updates round away."""
    small = sorted({str(p.dtype) for p in weights.values() if p.dtype in (torch.bfloat16, torch.float16)})
    if small:
        announce_once(
            "16-bit-weights",
            f"some trainable weights are {', '.join(small)}: much of an update rounds away when it is "
            "repeated, so Fast Forward finds fewer steps; keep trainable weights in float32 (PEFT: "
            "autocast_adapter_dtype=True)",
        )
