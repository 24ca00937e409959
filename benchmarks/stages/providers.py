"""Those who run a Fast Forward stage, all on the same model, the same examples and the same update Δ.

    authors         what the published code does, in our own words: the adapter's entries of the state dict by
                    name, W + Δ made anew by a thread pool, `load_state_dict`; batches of 2 from a DataLoader,
                    `model(**batch).loss`, the mean of the batches' means, loss and perplexity read. It keeps
                    no best weights and undoes no step.
    clean eager     what a careful user writes: `_foreach_copy_` and `_foreach_add_`; large micro-batches that
                    lie on the device, `model(**batch).loss` weighted by tokens, one read per evaluation
    ours eager, step graph, stage graph      ffkernels' executors
    bare forward    the captured validation forward, replayed and nothing else: the floor under every step

A stage of every provider evaluates the validation loss equally often. Where a search decides, it needs losses
that lead it where it shall go: `SteeredLoss` computes the validation loss and returns numbers of its own.
That is an addition and a product on the device, and all that a user's stage does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.stages.cases import (
    AUTHORS,
    BARE,
    CLEAN,
    EAGER,
    SHORT,
    STAGE,
    STEP,
    Case,
    ahead,
    linear,
    one_batch,
)
from benchmarks.stages.models import TOKENS_PER_FORWARD, Batches, collate, make_examples, micro_batches
from benchmarks.timing import seconds_of
from ffkernels import ops
from ffkernels.search.search import LinearSearch, ParabolicSearch, Search
from ffkernels.stage.eager import EagerExecutor
from ffkernels.stage.program import StageProgram
from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.fast import LabelledLoss
from ffkernels.validation.loss import ValidationLoss

AUTHORS_BATCH = 2  # the default of their --eval_batch_size


class SteeredLoss(ValidationLoss):
    """The validation loss and its sums by example are computed; what is returned was agreed beforehand.

    Each evaluation returns one more than the last, or one less. Of a rise the sums say that all examples
    share it, a sure one, or that one of them alone has it, which proves nothing.

    Args:
        one_batch: all examples in one micro-batch, instead of those that were planned.

    Attributes:
        refused: why users would not have the fast path, which is measured nevertheless; empty where they do.
    """

    def __init__(self, model: torch.nn.Module, batches: Batches, one_batch: bool = False) -> None:
        super().__init__(model, batches)
        self.refused = "" if self.labelled else self.reason
        if self.refused:
            super().__init__(model, batches, check=False)
        if self.labelled is None:
            raise RuntimeError(f"the benchmark is of the fast path, which was refused: {self.refused}")
        self.forward = self.labelled
        if one_batch:
            options = {"max_tokens": TOKENS_PER_FORWARD, "device": self.device}
            self.forward = LabelledLoss(self.causal_lm, self.rows, **options, one_batch=True)
        # So large that the numbers of two evaluations are equal within any tolerance, and yet differ.
        self._number = torch.full((), 1e9, dtype=torch.float64, device=self.device)
        self._more = torch.ones_like(self._number)
        self._sharing = self.example_tokens.clone()

    def steer(self, more: float, sharing: int | None = None) -> None:
        """From now on, captured or not: each is `more`, of which the first `sharing` examples have a part."""
        self._more.fill_(more)
        self._sharing.copy_(self.example_tokens)
        self._sharing[len(self._sharing) if sharing is None else sharing :].zero_()

    @property
    def example_tokens(self) -> torch.Tensor:
        return self.forward.example_tokens

    @property
    def example_counts(self) -> list[int]:
        return self.forward.example_counts

    def real_loss(self) -> torch.Tensor:
        return self.evaluator.run(self.forward.evaluate)

    def __call__(self) -> torch.Tensor:
        self.follow()
        self.evaluator.run(self.forward.evaluate)
        return self._next()

    def evaluate(self) -> torch.Tensor:
        self.forward.evaluate()
        return self._next()

    def measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.follow()
        self.evaluator.run(self.forward.measure)
        return self._next(), self._number * self._sharing

    def evaluate_with_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.forward.measure()
        return self._next(), self._number * self._sharing

    def _next(self) -> torch.Tensor:
        return self._number.add_(self._more)


class Bench:
    """A model, its examples and its last update, and the weights put back before every stage."""

    def __init__(self, case: Case, model: torch.nn.Module, device: torch.device) -> None:
        self.case, self.model, self.device = case, model, device
        self.examples = make_examples(case, model.config.vocab_size)
        self.batches: Batches = [
            {key: value.to(device) for key, value in batch.items()} for batch in micro_batches(self.examples)
        ]
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = [p.detach() for p in self.named.values()]
        self.before = [weight.clone() for weight in self.weights]
        generator = torch.Generator().manual_seed(2)
        self.update = [
            (torch.randn(w.shape, generator=generator) * 1e-5).to(w.device, w.dtype) for w in self.weights
        ]
        self.table = ops.TensorTable(self.named)
        self.loss = SteeredLoss(model, micro_batches(self.examples))

    @cached_property
    def loss_in_one_batch(self) -> SteeredLoss:
        return SteeredLoss(self.model, micro_batches(self.examples), one_batch=True)

    def prepare(self, evaluations: int = 0) -> None:
        """W and best as they are right after the optimizer's step."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.before)
            ops.checkpoint_(self.table)
            torch._foreach_add_(self.weights, self.update)

    def exchange(self, fewer: bool) -> None:
        """Let half of each example's labels count, or all again: other examples at the same places."""
        rows = [dict(row, labels=row["labels"].clone()) for row in self.examples]
        for row in rows:
            row["labels"][: len(row["labels"]) // 2 if fewer else 0] = -100
        if not self.loss.swap_batch(micro_batches(rows)):
            raise RuntimeError("the examples were not exchanged in place")

    def real_tokens(self) -> int:
        return sum(row["input_ids"].numel() for row in self.examples)

    def model_loss(self) -> float:
        """The same number as the validation loss, by the model's own loss: token-weighted."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with torch.no_grad():
            for batch in self.batches:
                scored = int(batch["labels"][:, 1:].ne(-100).sum())
                total += self.model(**batch).loss.double() * scored
                count += scored
        return float(total) / count


class Authors:
    """Their stage. What they gather before it, two copies of the adapter, is made in `prepare`."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.names = [name for name, _ in bench.model.named_parameters() if "lora" in name]
        self.loader = DataLoader(bench.examples, batch_size=AUTHORS_BATCH, collate_fn=collate)
        self.history: dict[str, torch.Tensor] = {}

    def prepare(self, evaluations: int) -> None:
        self.bench.prepare()
        state = self.bench.model.state_dict()
        old = dict(zip(self.bench.named, self.bench.before, strict=True))
        self.history = {name: torch.stack([old[name], state[name].detach()]) for name in self.names}

    def stage(self, evaluations: int) -> None:
        model, history = self.bench.model, self.history
        with ThreadPoolExecutor() as pool:
            change = dict(pool.map(lambda name: (name, history[name][-1] - history[name][-2]), self.names))
        for _ in range(evaluations):
            state = model.state_dict()
            with ThreadPoolExecutor() as pool:
                moved = dict(pool.map(lambda name: (name, state[name] + change[name]), self.names))  # noqa: B023
            model.load_state_dict(moved, strict=False)
            model.eval()
            self._evaluate()
            model.train()
        model.eval()

    def _evaluate(self) -> tuple[float, float]:
        losses = []
        with torch.no_grad():
            for batch in self.loader:
                batch = {key: value.to(self.bench.device) for key, value in batch.items()}
                losses.append(self.bench.model(**batch).loss.unsqueeze(0))
            loss = torch.mean(torch.cat(losses))
            return loss.item(), torch.exp(loss).item()

    def close(self) -> None:
        self.history = {}


class CleanEager:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.best = [torch.empty_like(weight) for weight in bench.weights]
        scored = [int(batch["labels"][:, 1:].ne(-100).sum()) for batch in bench.batches]
        self.shares = [count / sum(scored) for count in scored]
        self.prepare = bench.prepare

    @torch.no_grad()
    def stage(self, evaluations: int) -> None:
        bench = self.bench
        for evaluation in range(evaluations):
            if evaluation:
                torch._foreach_copy_(self.best, bench.weights)
                torch._foreach_add_(bench.weights, bench.update)
            loss = torch.zeros((), device=bench.device)
            for batch, share in zip(bench.batches, self.shares, strict=True):
                loss += bench.model(**batch).loss.float() * share
            loss.item()

    def close(self) -> None:
        self.best = []


class Executor:
    """One of ours, with a search that is led to the number of evaluations that is wanted.

    linear        each loss is the best, and W is kept each time, the dearest move; or the first step's is not
    parabolic     each loss after the first is a rise that is tested and not found sure, the dearest decision,
                  which doubles τ up to `max_tau`; or the first one is sure and ends it

    Long and short stages have the same `max_tau`, and so the same captured graph.
    """

    def __init__(self, bench: Bench, executor: Any, search: str = "parabolic", loss: Any = None) -> None:
        self.bench, self.executor, self.search = bench, executor, search
        self.loss: SteeredLoss = loss or bench.loss
        self.start = 1  # the τ after 0, of a parabolic search

    def prepare(self, evaluations: int) -> None:
        long = self.bench.case.evaluations
        if evaluations not in (SHORT, long):
            raise ValueError(f"{evaluations} evaluations: {SHORT} or {long} are possible")
        if self.search == "linear":
            self.loss.steer(1.0 if evaluations == SHORT else -1.0)
        else:
            self.loss.steer(1.0, None if evaluations == SHORT else 1)
        self.bench.prepare()

    def make_search(self) -> Search:
        long = self.bench.case.evaluations
        return (
            LinearSearch(long - 1)
            if self.search == "linear"
            else ParabolicSearch(1 << (long - 2), self.start)
        )

    def stage(self, evaluations: int) -> None:
        search = self.make_search()
        self.executor.run(StageProgram(self.bench.table, self.loss, search))
        fault = getattr(self.executor, "fault", None)
        if fault or len(search.losses) != evaluations:
            raise RuntimeError(fault or f"{len(search.losses)} evaluations instead of {evaluations}")

    def close(self) -> None:
        self.executor.close()


class BareForward:
    """The captured validation forward, with the sums by example that a parabolic search asks for or without.

    Captured by torch alone, so that it does not share a mistake with the executors.
    """

    def __init__(self, bench: Bench, loss: SteeredLoss | None = None, sums: bool = True) -> None:
        self.bench = bench
        self.prepare = bench.prepare
        forward = (loss or bench.loss).forward
        work = forward.measure if sums else lambda: (forward.evaluate(), None)
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(bench.device)
        side.wait_stream(torch.cuda.current_stream(bench.device))
        with evaluation_mode(bench.model, bench.device):
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream(bench.device).wait_stream(side)
            with torch.cuda.graph(self.graph, stream=side):
                self.result, self.sums = work()

    def stage(self, evaluations: int) -> None:
        for _ in range(evaluations):
            self.graph.replay()

    def close(self) -> None:
        self.graph.reset()


def graph_executor(device: torch.device, name: str, ahead: int = 0) -> Any:
    """A fresh executor; RuntimeError where this machine cannot have it. Asking also tries a small loop."""
    from ffkernels.graphs import core as graphs
    from ffkernels.graphs.executors import StageGraphExecutor, StepGraphExecutor

    refused = (graphs.why_no_stage_graph if name == STAGE else graphs.why_no_step_graph)(device)
    if refused:
        raise RuntimeError(refused)
    return StageGraphExecutor() if name == STAGE else StepGraphExecutor(ahead=ahead)


def makers(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Name → what makes that provider; graphs only on a GPU."""
    case, device = bench.case, bench.device
    found: dict[str, Callable[[], Any]] = {
        AUTHORS: lambda: Authors(bench),
        CLEAN: lambda: CleanEager(bench),
        EAGER: lambda: Executor(bench, EagerExecutor()),
    }
    # Made here, as the memory that its check takes is no provider's. None where one batch was planned anyway.
    several = len(bench.loss.forward.micro_batches) > 1
    in_one = bench.loss_in_one_batch if case.one_batch and several else None
    if case.full:
        found[linear(EAGER)] = lambda: Executor(bench, EagerExecutor(), "linear")
    if in_one is not None:
        found[one_batch(EAGER)] = lambda: Executor(bench, EagerExecutor(), loss=in_one)
    if device.type != "cuda":
        return found
    found[BARE] = lambda: BareForward(bench)
    if in_one is not None:
        found[one_batch(BARE)] = lambda: BareForward(bench, in_one)
    for name in (STEP, STAGE) if case.full else (fastest(device),):
        found[name] = lambda name=name: Executor(bench, graph_executor(device, name))
        if case.full:
            found[linear(name)] = lambda name=name: Executor(bench, graph_executor(device, name), "linear")
    if case.full:
        found[linear(BARE)] = lambda: BareForward(bench, sums=False)
        for replays in (1, 2):
            found[ahead(STEP, replays)] = lambda n=replays: Executor(bench, graph_executor(device, STEP, n))
    return found


def fastest(device: torch.device) -> str:
    """The graph that users get on this machine."""
    from ffkernels.graphs import core as graphs

    return STEP if graphs.why_no_stage_graph(device) else STAGE


def timed(provider: Any, evaluations: int, device: torch.device) -> float:
    """Seconds of one stage."""
    provider.prepare(evaluations)
    return seconds_of(lambda: provider.stage(evaluations), device)
