"""Training whose captured stages are each run a second time, eagerly, from the weights that they began with.

Both must have found the same:

    losses        exactly on the stand-in for CUDA; on a GPU within `loss_tolerance`
    all else      exactly: τ, verdicts, why it ended, the number of moves, the weights
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig
from ffkernels.graphs import check as graph_check
from ffkernels.graphs.check import Snapshot
from ffkernels.graphs.executors import GraphExecutor
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.search.search import Search, make_search
from ffkernels.stage.eager import EagerExecutor
from ffkernels.stage.program import StageProgram

MAX_TAU = 8


class Place:
    """Where a situation happens, and what has been seen there.

    Args:
        device: of the models.
        build: a fresh model on it, the same each time, of which little trains.
        batch: `padded_batch`.
        monkeypatch: undoes what is watched here.
        exact: whether captured losses must be the eager ones bit for bit.

    Attributes:
        pairs: of each captured stage what it found, and what its eager twin did.
        told, starts: what the device was told between stages: tokens by example, and τ after 0.
    """

    def __init__(
        self,
        device: torch.device,
        build: Callable[[], nn.Module],
        batch: Callable[..., dict[str, torch.Tensor]],
        monkeypatch: pytest.MonkeyPatch,
        *,
        exact: bool,
    ) -> None:
        self.device, self.build, self.batch, self.patch, self.exact = device, build, batch, monkeypatch, exact
        self.pairs: list[tuple[dict, dict]] = []
        self.told: list[list[float]] = []
        self.starts: list[int] = []
        self._watch()

    def _watch(self) -> None:
        from ffkernels.ops.decide import DecideState

        run, observe = GraphExecutor.run, Search.observe
        know, start_at = DecideState.know, DecideState.start_at

        def noted(search, tau, loss, sure=True, computed=True):
            vars(search).setdefault("verdicts", []).append(bool(sure))
            observe(search, tau, loss, sure, computed)

        def run_twice(executor, program):
            table, search, start = program.table, program.search, Snapshot(program.table)
            run(executor, program)
            end = Snapshot(table)
            start.restore()
            again = make_search(search.name, search.max_tau, search.start)
            twin = StageProgram(table, program.validation, again)
            EagerExecutor().run(twin)
            eager, captured = outcome(twin), outcome(program, end.weights)
            end.restore()
            self.pairs.append((captured, eager))
            allowed = graph_check.loss_tolerance(program.validation, self.device)
            compare(captured, eager, 0.0 if self.exact else allowed)

        def told(state, critical, tokens=(), weights=()):
            self.told.append(list(tokens))
            know(state, critical, tokens, weights)

        def begun(state, start):
            self.starts.append(start)
            start_at(state, start)

        self.patch.setattr("ffkernels.ops.notices._announced", set())
        self.patch.setattr(GraphExecutor, "run", run_twice)
        self.patch.setattr(Search, "observe", noted)
        self.patch.setattr(DecideState, "know", told)
        self.patch.setattr(DecideState, "start_at", begun)


def outcome(program: StageProgram, weights: list[torch.Tensor] | None = None) -> dict[str, Any]:
    search = program.search
    return {
        "losses": dict(search.losses),
        "verdicts": getattr(search, "verdicts", []),
        "found": (search.best_tau, program.reason, program.moves),
        "weights": weights or [weight.detach().clone() for weight in program.table.weights],
    }


def compare(captured: dict, eager: dict, tolerance: float) -> None:
    assert list(captured["losses"]) == list(eager["losses"]), "other τ were tried"
    if tolerance:
        assert captured["losses"] == pytest.approx(eager["losses"], rel=tolerance)
    else:
        assert captured["losses"] == eager["losses"]
    assert captured["verdicts"] == eager["verdicts"]
    assert captured["found"] == eager["found"]
    assert all(map(torch.equal, captured["weights"], eager["weights"]))


class Training:
    """A loop around a model with a `FastForward`; leaving it detaches."""

    def __init__(self, place: Place, name: str, model: nn.Module, validation: Any, interval: int = 2) -> None:
        self.place, self.name, self.model, self.validation = place, name, model, validation
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=2e-3)
        config = FastForwardConfig(interval=interval, executor=name, max_tau=MAX_TAU, patience=None)
        self.ff = FastForward(model, self.optimizer, validation, config)
        self.weights = trainable

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *exc: object) -> None:
        self.ff.detach()

    def step(self, batch: dict[str, torch.Tensor] | None = None, forward: Any = nullcontext) -> None:
        batch = batch or self.place.batch(4, 12, seed=100 + self.ff.optimizer_steps)
        self.optimizer.zero_grad()
        with forward():
            loss = self.model(**{key: value.to(self.place.device) for key, value in batch.items()}).loss
        loss.backward()
        self.optimizer.step()

    def stage(self, forward: Any = nullcontext) -> None:
        """Steps up to the next stage, which runs on the executor that was asked for."""
        for _ in range(self.ff.config.interval):
            self.step(forward=forward)
        stage = self.ff.stages[-1]
        assert (stage.optimizer_step, stage.executor) == (self.ff.optimizer_steps, self.name), (
            stage.executor_reason
        )
        assert stage.evaluations > 1, "nothing was searched"

    @property
    def captures(self) -> int:
        """How often the present graphs' executor recorded."""
        return self.ff._executor._graph.captures


@contextmanager
def nothing_said() -> Iterator[None]:
    """Nothing was given up, and nothing captured anew."""
    with warnings.catch_warnings():
        of_stages = ".*(Fast Forward stage|captured stage|ValidationLoss)"
        warnings.filterwarnings("error", of_stages, FFKernelsNotice)
        yield
