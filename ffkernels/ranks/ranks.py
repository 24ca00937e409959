"""Several processes, one search: what the ranks of a job tell each other so that all take the same τ.

Every rank holds the whole validation set, runs its own shard of it, and sends 288 bytes:

    (what is being exchanged, whether this rank failed, Σ NLL in float64, labelled tokens, a checksum)
    Σ NLL of each of its examples, where there are such sums: room for 32

The rows of all ranks come back in rank order and every rank adds them up itself, correctly rounded
(`math.fsum`): the loss is the same on every rank bit for bit, which an all-reduce need not promise. Rows
are as long whatever they are about, since a rank that failed may be sending its row where others send sums:
an exception on one rank becomes one on all of them at their next exchange, and ranks that are at different
places say so instead of waiting for each other.
"""

from __future__ import annotations

import atexit
import json
import math
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from ffkernels.ranks.interrupts import interrupt_later
from ffkernels.ranks.trial import NoLoss, comes_of_weights, say_there_is_none

# What an exchange is about; the number travels.
CONSTRUCTION, FACTS, START, UPDATE, LOSS, DECISION, BYTES, PRICE, ALIGNMENT = range(1, 10)
_WHAT = {
    CONSTRUCTION: "making a ValidationLoss or a FastForward",
    FACTS: "comparing their settings",
    START: "the start of a Fast Forward stage",
    UPDATE: "the update of a Fast Forward stage",
    LOSS: "a validation loss",
    DECISION: "the end of a Fast Forward stage",
    BYTES: "sending a message",
    PRICE: "whether a Fast Forward stage pays",
    ALIGNMENT: "the alignment of gradient and update",
}
_ROW = struct.Struct("<iiddq")
_WORDS = struct.Struct("<4q")  # the same 32 bytes as the integers in which they travel
_HEAD = 4
_RAISED = -1  # in place of whether there are sums
ROOM = 32  # a shard with more examples sends the rest in a second message
ROW_BYTES = _ROW.size + 8 * ROOM


class RankFailed(RuntimeError):
    """Another rank raised, so this one cannot go on either; the message names it and its error."""


class RanksDisagree(RuntimeError):
    """The ranks have different settings, data, weights or decisions; the message names them."""


@dataclass(frozen=True)
class Row:
    """What one rank said in one exchange."""

    kind: int
    failed: bool
    a: float
    b: float
    c: int


class Ranks:
    """The processes of one job, as Fast Forward sees them. All methods but the constructor are collective.

    Args:
        device: where the model is; what is exchanged travels from there if the group's backend can, else from
            the CPU.
        group: the process group whose ranks train one model together; by default all processes.

    Attributes:
        rank, size: this process's number in the group, and how many there are.
        forward_is_collective: the model's forward itself waits for the other ranks (FSDP). A rank that
            raises inside it cannot tell the others, who wait there.
        forgiving: where a measurement raises what may come of the weights, there is no loss, and that is
            ``NoLoss`` on every rank. Not where ``forward_is_collective``.
    """

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in process_group; make FastForward in those that are")
        self.device = _exchange_device(device, group)
        self.forward_is_collective = self.forgiving = False
        _outlive_the_backends_threads()

    @classmethod
    def present(cls, device: torch.device, group: Any = None) -> Ranks | None:
        """The ranks of this job, or None when it has one process."""
        return cls(device, group) if several_processes(group) else None

    def exchange(self, kind: int, a: float = 0.0, b: float = 0.0, c: int = 0) -> list[Row]:
        """Send one row and get those of all ranks, in rank order.

        Raises:
            RankFailed: when another rank reports a failure, on every rank that does not.
            RanksDisagree: when the ranks are not all exchanging the same kind of thing.
        """
        return self._exchange(Row(kind, False, a, b, c))[0]

    def _exchange(self, mine: Row, numbers: Sequence[float] = ()) -> tuple[list[Row], torch.Tensor]:
        """The rows, and the numbers beside them, (ranks, ROOM) float64."""
        kind = mine.kind
        rows, beside = self._gather(mine, numbers)
        if any(row.failed for row in rows):
            raise RankFailed(self._failures(rows, ""))
        if any(row.kind != kind for row in rows):
            places = {rank: _WHAT.get(row.kind, str(row.kind)) for rank, row in enumerate(rows)}
            raise RanksDisagree(
                f"the ranks are not at the same place: {_by_value(places)}; every rank must make the same "
                "calls in the same order"
            )
        return rows, beside

    def add(self, kind: int, numbers: Sequence[float]) -> list[float]:
        """The sums over the ranks of up to ``ROOM`` numbers: the same floats on every rank."""
        _, beside = self._exchange(Row(kind, False, 0.0, 0.0, len(numbers)), numbers)
        return [_sum(iter(column)) for column in beside.T[: len(numbers)].tolist()]

    def mean(self, measure: Callable[[], tuple[Any, float]]) -> float:
        """Σ totals / Σ weights over the ranks, of what ``measure()`` returns on each: (total, weight).

        The same float on every rank. What ``measure`` raises is raised here, and as ``RankFailed`` elsewhere,
        unless ``forgiving`` says otherwise.
        """
        return self.mean_with_sums(lambda: (*measure(), None), ())[0]

    def mean_with_sums(
        self, measure: Callable[[], tuple[Any, float, list[float] | None]], shares: Sequence[int]
    ) -> tuple[float, list[float] | None]:
        """As ``mean``, and the sums by example of all ranks, in rank order.

        Args:
            measure: returns (total, weight, sums), of which the sums are as many as this rank's share, or
                None.
            shares: how many sums each rank has.

        Returns:
            the mean and the sums; None in their place where a rank sends none.
        """
        more = max(shares, default=0) - ROOM
        try:
            total, weight, numbers = measure()
            total, sent = float(total), int(numbers is not None)
        except BaseException as error:
            if not self._forgives(error):
                self.fail(error, forwards=True)
                raise
            say_there_is_none(error)
            total, weight, numbers, sent = math.nan, 0.0, None, _RAISED
        # Between two messages that belong together nobody may leave.
        with interrupt_later() if more > 0 else nullcontext():
            rows, beside = self._exchange(Row(LOSS, False, total, weight, sent), numbers or ())
            if any(row.c == _RAISED for row in rows):
                raise NoLoss("a rank has no loss at these weights")
            mean = _sum(row.a for row in rows) / _sum(row.b for row in rows)
            if not all(row.c for row in rows):
                return mean, None
            if more > 0:
                beside = torch.cat([beside, self._gather_numbers(numbers[ROOM:], more)], 1)
        return mean, torch.cat([theirs[:n] for theirs, n in zip(beside, shares, strict=True)]).tolist()

    def _forgives(self, error: BaseException) -> bool:
        told = isinstance(error, (RankFailed, RanksDisagree, dist.DistError))
        return self.forgiving and not self.forward_is_collective and not told and comes_of_weights(error)

    def fail(self, error: BaseException, *, forwards: bool = False) -> None:
        """Tell the others at their next exchange that this rank ends with ``error``. Once per error.

        Nothing is sent where everyone knows (``RankFailed``, ``RanksDisagree``), nor where the others may be
        in ``forwards`` that are collective: they wait there, not here.
        """
        known = isinstance(error, (RankFailed, RanksDisagree, dist.DistError))
        if known or hasattr(error, "_told_the_ranks"):
            return
        error._told_the_ranks = True  # type: ignore[attr-defined]
        if forwards and self.forward_is_collective:
            return
        with suppress(RankFailed):  # the others are gone: this rank's own error is what counts
            rows, _ = self._gather(Row(0, True, 0.0, 0.0, 0))
            self._failures(rows, f"{type(error).__name__}: {error}")

    def agree(self, facts: Mapping[str, Any], advice: str) -> None:
        """Raise ``RanksDisagree`` on every rank, naming ranks and values, unless all have the same facts.

        ``facts`` are plain values; ``advice`` says in the message what to do about a difference.
        """
        self.exchange(FACTS)
        with interrupt_later():
            texts = self.gather_bytes(json.dumps(facts, default=str).encode())
        everyone = [json.loads(text) for text in texts]
        for name in facts:
            values = {rank: theirs.get(name) for rank, theirs in enumerate(everyone)}
            if any(value != values[0] for value in values.values()):
                raise RanksDisagree(f"the ranks differ in {name}: {_by_value(values)}; {advice}")

    def in_step(self, optimizer_steps: int, schedule: int, skip: bool = False) -> bool:
        """All ranks have come equally far; whether any of them wants to skip the coming stage.

        ``schedule``: the fingerprint of what says when the next stages run.
        """
        rows = self.exchange(START, float(skip), float(optimizer_steps), schedule)
        self.agree_on_rows(
            rows,
            {"b": "the optimizer steps they have taken", "c": "what their earlier stages came to (a hash)"},
            "load the same checkpoint on every rank, and step all optimizers equally often",
        )
        return any(row.a for row in rows)

    def agree_on_rows(self, rows: Sequence[Row], names: Mapping[str, str], advice: str) -> None:
        """The same for rows that were exchanged; ``names`` says which of a, b, c count and what they are."""
        for field, name in names.items():
            values = {rank: getattr(row, field) for rank, row in enumerate(rows)}
            if any(repr(value) != repr(values[0]) for value in values.values()):  # NaN equals NaN here
                raise RanksDisagree(f"the ranks differ in {name}: {_by_value(values)}; {advice}")

    def gather_bytes(self, mine: bytes) -> list[bytes]:
        """The bytes of every rank, in rank order."""
        lengths = [row.c for row in self._gather(Row(BYTES, False, 0.0, 0.0, len(mine)))[0]]
        sent = torch.tensor(list(mine.ljust(max(lengths), b"\0")), dtype=torch.uint8)
        received = self._all_gather(sent).tolist()
        return [bytes(row[:length]) for row, length in zip(received, lengths, strict=True)]

    def _gather(self, row: Row, numbers: Sequence[float] = ()) -> tuple[list[Row], torch.Tensor]:
        mine = torch.zeros(_HEAD + ROOM, dtype=torch.int64)
        mine[:_HEAD] = torch.tensor(_WORDS.unpack(_ROW.pack(row.kind, row.failed, row.a, row.b, row.c)))
        sent = torch.tensor(numbers[:ROOM], dtype=torch.float64)
        mine.view(torch.float64)[_HEAD : _HEAD + len(sent)] = sent
        table = self._all_gather(mine)
        rows = []
        for words in table[:, :_HEAD].tolist():
            kind, failed, a, b, c = _ROW.unpack(_WORDS.pack(*words))
            rows.append(Row(kind, bool(failed), a, b, c))
        return rows, table.view(torch.float64)[:, _HEAD:]

    def _gather_numbers(self, numbers: Sequence[float], width: int) -> torch.Tensor:
        """(ranks, width) float64, each rank's numbers and then zeros."""
        mine = torch.zeros(width, dtype=torch.float64)
        mine[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        return self._all_gather(mine)

    def _all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        """(ranks, length) on the CPU, of the 1-dim tensor of every rank, all equally long."""
        received = torch.empty(self.size * len(mine), dtype=mine.dtype, device=self.device)
        try:
            # PyTorch 2.13 renamed it.
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(received, mine.to(self.device), group=self.group)
        except RuntimeError as error:
            raise RankFailed(
                f"rank {self.rank} of {self.size} lost the others during Fast Forward: a process ended or "
                f"does not answer ({error}); its own output says why"
            ) from error
        return received.cpu().view(self.size, len(mine))

    def _failures(self, rows: Sequence[Row], message: str) -> str:
        """Every rank is here, those that failed and those that heard of it: now the texts are sent."""
        with interrupt_later():
            messages = self.gather_bytes(message[:2000].encode())
        told = [
            f"rank {rank}: {messages[rank].decode(errors='replace')}"
            for rank, row in enumerate(rows)
            if row.failed
        ]
        return f"Fast Forward ends on rank {self.rank}, since others failed. " + "; ".join(told)


def several_processes(group: Any = None) -> bool:
    """Whether this job has a process group, or this group, of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) != 1


def refuse_late_ranks(made: Any) -> None:
    """Refuse to go on with what was made ``before_ranks``, where there are several by now."""
    if made.before_ranks and several_processes():
        raise RuntimeError(
            "this job became one of several processes after its ValidationLoss or FastForward was made: "
            "each rank would go its own way; call init_process_group (or make the Accelerator) first"
        )


@contextmanager
def telling(ranks: Ranks | None, *, forwards: bool = False) -> Iterator[None]:
    """What raises in this block on one rank raises on the others at their next exchange.

    ``forwards``: until then they may run the model.
    """
    try:
        yield
    except BaseException as error:
        if ranks is not None:
            ranks.fail(error, forwards=forwards)
        raise


@contextmanager
def together(ranks: Ranks | None, *, forwards: bool = False) -> Iterator[None]:
    """A block that succeeds on every rank or raises on every rank."""
    with telling(ranks, forwards=forwards):
        yield
        if ranks is not None:
            ranks.exchange(CONSTRUCTION)


@cache
def _outlive_the_backends_threads() -> None:
    """Let a process that ends right after an exchange give its interpreter's lock away once more.

    gloo's thread lets go of an exchange's tensors a little after the exchange has returned, and takes the
    lock for that; in an interpreter that is ending, Python ends the thread inside a destructor instead, and
    the process aborts: "terminate called without an active exception", exit code -6, after all is done.
    """
    atexit.register(time.sleep, 0.05)


def _exchange_device(device: torch.device, group: Any) -> torch.device:
    """The model's device where its backend sends from there ("cpu:gloo,cuda:nccl"), else the CPU."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
    # gloo copies everything to the CPU first, and knows few other devices.
    if backends.get(device.type, "gloo") != "gloo":
        return device
    if "cpu" in backends:
        return torch.device("cpu")
    # NCCL alone, with a model on the CPU: what it sends from is this process's GPU.
    kind = next(iter(backends))
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _sum(values: Iterator[float]) -> float:
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond float64, or inf − inf
        return math.nan


def _by_value(values: Mapping[int, Any]) -> str:
    """ "rank 0, 2: 6; rank 1: 8" """
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(repr(value), []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, held))}: {value}" for value, held in ranks.items())
