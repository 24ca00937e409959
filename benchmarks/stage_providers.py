"""Those who run a Fast Forward stage, all on the same model, the same examples and the same update Δ.

    authors         what the published code does, in our own words: the adapter's entries of the state dict by
                    name, W + Δ made anew by a thread pool, `load_state_dict`; batches of 2 from a DataLoader,
                    `model(**batch).loss`, the mean of the batches' means, loss and perplexity read. It keeps
                    no best weights and undoes no step.
    clean eager     what a careful user writes: `_foreach_copy_` and `_foreach_add_`; large micro-batches that
                    lie on the device, `model(**batch).loss` weighted by tokens, one read per evaluation
    ours eager, step graph, stage graph      ffkernels' executors

A stage of every provider evaluates the validation loss equally often. Where a search decides, it needs a loss
that falls as long as wanted: `FallingLoss` computes the validation loss and returns a number of its own
instead. That is one subtraction on the device, and all that a user's stage does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from stage_cases import Batches, Case, collate, make_examples, micro_batches
from torch.utils.data import DataLoader

from ffkernels import ops
from ffkernels.engine.evaluation_mode import evaluation_mode
from ffkernels.engine.executors import EagerExecutor, StageProgram
from ffkernels.engine.search import LinearSearch
from ffkernels.engine.validation import ValidationLoss

AUTHORS, CLEAN, BARE = "authors", "clean eager", "bare forward"
EAGER, STEP, STAGE = "ours eager", "step graph", "stage graph"
SHORT = 2  # evaluations of the shortest stage: τ = 0, and τ = 1 that is not better
AUTHORS_BATCH = 2  # the default of their --eval_batch_size


def step_graph(ahead: int) -> str:
    return f"{STEP}, {ahead} ahead" if ahead else STEP


class FallingLoss(ValidationLoss):
    """The validation loss is computed; what is returned falls with each evaluation, or stays where it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # So large that the numbers of two evaluations are equal within any tolerance, and yet fall.
        self._number = torch.full((), 1e9, dtype=torch.float64, device=self.device)
        self._slope = torch.ones_like(self._number)

    def fall(self, falling: bool) -> None:
        """From now on; a captured evaluation follows."""
        self._slope.fill_(1.0 if falling else 0.0)

    def __call__(self) -> torch.Tensor:
        super().__call__()
        return self._count()

    def evaluate(self) -> torch.Tensor:
        super().evaluate()
        return self._count()

    def real_loss(self) -> torch.Tensor:
        return super().__call__()

    def forward_alone(self) -> torch.Tensor:
        """The validation forward in `evaluation_mode`, without the counting."""
        return super().evaluate()

    def _count(self) -> torch.Tensor:
        return self._number.sub_(self._slope)


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
        self.loss = FallingLoss(model, micro_batches(self.examples))

    def prepare(self, evaluations: int = 0) -> None:
        """W and best as they are right after the optimizer's step."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.before)
            ops.checkpoint_(self.table)
            torch._foreach_add_(self.weights, self.update)

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
    """One of ours. The search is the paper's.

    While the loss falls it ends at `max_tau`, after the case's number of evaluations; where it does not, it
    ends after two, in the same captured graph.
    """

    def __init__(self, bench: Bench, executor: Any) -> None:
        self.bench, self.executor = bench, executor

    def prepare(self, evaluations: int) -> None:
        if evaluations not in (SHORT, self.bench.case.evaluations):
            raise ValueError(
                f"{evaluations} evaluations: {SHORT} or {self.bench.case.evaluations} are possible"
            )
        self.bench.loss.fall(evaluations != SHORT)
        self.bench.prepare()

    def stage(self, evaluations: int) -> None:
        search = LinearSearch(self.bench.case.evaluations - 1)
        self.executor.run(StageProgram(self.bench.table, self.bench.loss, search))
        fault = getattr(self.executor, "fault", None)
        if fault or len(search.losses) != evaluations:
            raise RuntimeError(fault or f"{len(search.losses)} evaluations instead of {evaluations}")

    def close(self) -> None:
        self.executor.close()


class BareForward:
    """The captured validation forward, replayed and nothing else: the floor under every Fast Forward step.

    Captured by torch alone, so that it does not share a mistake with the executors.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.prepare = bench.prepare
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(bench.device)
        side.wait_stream(torch.cuda.current_stream(bench.device))
        with evaluation_mode(bench.model, bench.device):
            with torch.cuda.stream(side):
                bench.loss.forward_alone()
            torch.cuda.current_stream(bench.device).wait_stream(side)
            with torch.cuda.graph(self.graph, stream=side):
                self.result = bench.loss.forward_alone()

    def stage(self, evaluations: int) -> None:
        for _ in range(evaluations):
            self.graph.replay()

    def close(self) -> None:
        self.graph.reset()


def graph_executor(device: torch.device, name: str, ahead: int = 0) -> Any:
    """A fresh executor; RuntimeError where this machine cannot have it. Asking also tries a small loop."""
    from ffkernels.engine import graphs
    from ffkernels.engine.graph_executors import StageGraphExecutor, StepGraphExecutor

    refused = (graphs.why_no_stage_graph if name == STAGE else graphs.why_no_step_graph)(device)
    if refused:
        raise RuntimeError(refused)
    return StageGraphExecutor() if name == STAGE else StepGraphExecutor(ahead=ahead)


def makers(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Name → what makes that provider; graphs only on a GPU."""
    found: dict[str, Callable[[], Any]] = {
        AUTHORS: lambda: Authors(bench),
        CLEAN: lambda: CleanEager(bench),
        EAGER: lambda: Executor(bench, EagerExecutor()),
    }
    if (device := bench.device).type == "cuda":
        found[BARE] = lambda: BareForward(bench)
        for ahead in bench.case.ahead:
            found[step_graph(ahead)] = lambda n=ahead: Executor(bench, graph_executor(device, STEP, n))
        found[STAGE] = lambda: Executor(bench, graph_executor(device, STAGE))
    return found


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(provider: Any, evaluations: int, device: torch.device) -> float:
    """Seconds of one stage."""
    provider.prepare(evaluations)
    wait(device)
    begin = time.perf_counter()
    provider.stage(evaluations)
    wait(device)
    return time.perf_counter() - begin
