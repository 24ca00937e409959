"""Whether an optimizer leaves weights that were moved where they are, found by trying.

An optimizer that trains other weights than the model's and writes them over these takes back what a stage
moves: master copies, slow weights, averages, a start that updates are added to.

    twice    2 steps, + shift on one of the two, 12 steps        the same gradients, the same random numbers
    stays    ⟨difference of the ends, shift⟩ / ⟨shift, shift⟩     1: steps do not depend on where they begin

2 steps make its state, and 12 see a period of as many. It is tried on copies: of the optimizer, with all
that it is made of, and of the smallest weight of each of its groups. Where something in it cannot be copied
so that nothing of the run is touched, nothing is known.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ffkernels.ranks.optimizer_wrappers import names_of, needs_closure, optimizer_chain
from ffkernels.validation.restore import keep_random_state

BEFORE, STEPS = 2, 12
ENOUGH = 0.9  # of a shift: less than it was lost by what decays or averages slowly
RATE = 1e-3  # so small that what depends on the weights' size (trust ratios) is
LARGEST = 1 << 26  # bytes of tensors to copy
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, Enum)
_TENSORS = (Tensor, nn.Parameter)


class _CannotCopy(Exception):
    pass


def refuse_pulling_back(optimizer: object) -> None:
    """Try each wrapper of an optimizer, from the inside out, and refuse the first that pulls weights back.

    Raises:
        ValueError: naming it.
    """
    chain = optimizer_chain(optimizer)
    for place in reversed(range(len(chain))):
        stays = what_stays(chain[place])
        if stays is not None and stays < ENOUGH:
            inside = chain[place + 1 :]
            cure = f"use {names_of(inside)} alone" if inside else "use one without, such as torch.optim.AdamW"
            raise ValueError(
                f"{type(chain[place]).__name__} has weights of its own and draws the model's back to them: "
                f"tried on copies, {max(0.0, stays):.0%} of a move of the weights was left {STEPS} steps "
                f"later. It would undo what Fast Forward moves; {cure}"
            )


def what_stays(optimizer: Any) -> float | None:
    """The share of a shift of the weights that is left ``STEPS`` steps later; None where it cannot be tried.

    Nothing that the optimizer holds is written, and no hook hears of the steps.
    """
    if not callable(getattr(type(optimizer), "step", None)):
        return None
    for closure in (False, True):
        if not closure and needs_closure(optimizer):
            continue
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.enable_grad():
            warnings.simplefilter("ignore")
            with suppress(Exception):
                return _tried(optimizer, closure)
    return None


def _tried(optimizer: Any, closure: bool) -> float | None:
    twins = [_Twin(optimizer), _Twin(optimizer)]
    generator = torch.Generator().manual_seed(0)

    def like(weight: Tensor, size: float) -> Tensor:
        drawn = torch.randn(weight.shape, generator=generator, device="cpu") * size
        return drawn.to(weight.device, weight.dtype)

    sizes = [float(w.detach().float().square().mean().sqrt()) for w in twins[0].weights]
    shifts = [like(w, 0.1 * size or 0.01) for w, size in zip(twins[0].weights, sizes, strict=True)]
    for step in range(BEFORE + STEPS):
        gradients = [like(w, 0.01) for w in twins[0].weights]
        if step == BEFORE:
            for weight, shift in zip(twins[1].weights, shifts, strict=True):
                weight.data.add_(shift)
        for twin in twins:
            with keep_random_state(shifts[0].device):  # so both twins draw the same numbers
                twin.step(gradients, closure)
    left = []
    for one, other, shift in zip(*(twin.weights for twin in twins), shifts, strict=True):
        moved = (other.detach().double() - one.detach().double()) * shift.double()
        left.append(float(moved.sum() / shift.double().square().sum()))
    return min(left) if all(abs(share) < float("inf") for share in left) else None


def _holds_nothing(value: Any) -> bool:
    """A function that knows no object."""
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, (type(None), ModuleType))
    return isinstance(value, FunctionType) and not value.__closure__


class _Twin:
    """A copy of an optimizer that trains copies of its groups' smallest weights."""

    def __init__(self, optimizer: Any) -> None:
        self._copies: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no id is given twice
        self._bytes = 0
        self._all: list[Tensor] = []
        self._left_out: set[int] = set()
        self.weights: list[nn.Parameter] = []
        self._chain = optimizer_chain(optimizer)
        for group in self._chain[-1].param_groups:
            parameters = sorted(group["params"], key=lambda p: (p.numel() < 16, p.numel()))
            for parameter in parameters[:1]:
                self.weights.append(self._tensor(parameter))
            self._left_out |= {id(p) for p in parameters[1:]}
            self._all += group["params"]
        if not self.weights:
            raise _CannotCopy
        self._optimizer = self._object(optimizer)
        for group in self._copies[id(self._chain[-1])].param_groups:
            if group.get("lr") is not None:
                group["lr"] = RATE
            if group.get("weight_decay"):
                group["weight_decay"] = 0.0

    def step(self, gradients: list[Tensor], closure: bool) -> None:
        def evaluate() -> Tensor:
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight.grad = gradient.clone()
            return torch.zeros((), device=gradients[0].device)

        evaluate()
        type(self._optimizer).step(self._optimizer, *([evaluate] if closure else []))

    def _copy(self, value: Any) -> Any:
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, _PLAIN) or _holds_nothing(value):
            return value
        if type(value) in _TENSORS:
            return self._tensor(value)
        if isinstance(value, torch.optim.Optimizer) or any(value is part for part in self._chain):
            return self._object(value)
        if isinstance(value, MethodType) and id(value.__self__) in self._copies:
            return MethodType(value.__func__, self._copies[id(value.__self__)])
        if type(value) in (tuple, set, frozenset):
            return type(value)(self._copy(item) for item in value)
        if isinstance(value, (list, deque)):
            return self._filled(value, lambda new: new.extend(map(self._copy, self._present(value))))
        if isinstance(value, dict):
            present = list(self._present(value))
            return self._filled(
                value, lambda new: new.update((self._copy(k), self._copy(value[k])) for k in present)
            )
        raise _CannotCopy

    def _present(self, values: Any) -> list[Any]:
        """All but weights that are left out, and but their parts in lists with one for each weight."""
        shapes = [getattr(value, "shape", None) for value in values]
        of = self._all if shapes == [weight.shape for weight in self._all] else values
        return [value for value, weight in zip(values, of, strict=True) if id(weight) not in self._left_out]

    def _filled(self, value: Any, fill: Callable[[Any], None]) -> Any:
        new = value.copy()  # of its class, with a defaultdict's factory
        new.clear()
        self._remember(value, new)
        fill(new)
        return new

    def _tensor(self, value: Tensor) -> Tensor:
        self._bytes += value.nbytes
        if type(value) not in _TENSORS or value.layout != torch.strided or self._bytes > LARGEST:
            raise _CannotCopy
        copy = value.detach().clone()
        is_weight = isinstance(value, nn.Parameter)
        return self._remember(value, nn.Parameter(copy, value.requires_grad) if is_weight else copy)

    def _object(self, value: Any) -> Any:
        new = self._remember(value, object.__new__(type(value)))
        for name, attribute in vars(value).items():
            if name.startswith("_optimizer_"):  # hooks
                vars(new)[name] = OrderedDict()
            elif name != "step":  # a scheduler's, around the original's
                vars(new)[name] = self._copy(attribute)
        return new

    def _remember(self, value: Any, copy: Any) -> Any:
        self._kept.append(value)
        self._copies[id(value)] = copy
        return copy
