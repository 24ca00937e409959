"""SaLSA, a line search for the step size (PyPI: SaLSa-Optimizer; arXiv 2407.20650), on a session. Optional.

    every step   a preconditioned gradient as direction, its length by Armijo's rule on the training batch
    probes       more forwards of that batch; the steadier the lengths have been, the fewer steps search

It is no Fast Forward loop: it has no stages and sees no validation examples. It is here because it promises
what Fast Forward promises, training without a learning-rate sweep. The optimizer is the package's own,
unchanged; this file gives it the closure it needs and charges its probes: their FLOPs to the run's meter
(which counts where the trainer drives it), their time to the optimizer step.
"""

from __future__ import annotations

from typing import Any

import torch

from ffkernels.reporting.flops import Flops
from ffkernels.stage.record import Stage

try:
    from salsa.SaLSA import SaLSA
except ImportError as error:
    raise ImportError(
        "the peer 'salsa' needs the package SaLSa-Optimizer (its module is salsa.SaLSA; the package named "
        "salsa is something else): pip install SaLSa-Optimizer"
    ) from error


class SalsaSearch:
    """SaLSA in place of the session's optimizer; learning rate and schedule of the session have no effect.

    Args:
        interval, cap: have no meaning here; taken because the Fast Forward loops have them.
        options: of the package's ``SaLSA``, such as ``use_mv=True``.

    Attributes:
        stages: stays empty.
        probes: forwards of training batches beyond the one that made the gradients.

    Raises:
        ValueError: with dropout (the probes would see other masks than the loss they are compared with), or
            with an optimizer of several groups, which SaLSA does not know.
    """

    name = "salsa"

    def __init__(
        self, session: Any, *, interval: int | None = None, cap: int | None = None, **options: Any
    ) -> None:
        if session.config.dropout:
            raise ValueError(
                f"dropout={session.config.dropout!r}: must be 0 with the peer 'salsa', whose probes would "
                "see other dropout masks than the loss they are compared with"
            )
        if len(session.optimizer.param_groups) != 1:
            raise ValueError(
                f"the session's optimizer has {len(session.optimizer.param_groups)} parameter groups; the "
                "peer 'salsa' replaces it and knows one; use optimizer='adamw'"
            )
        self.session = session
        self.stages: list[Stage] = []
        self.probes = 0
        self._batch: Any = None
        self._loss: torch.Tensor | None = None
        self._forward_flops = 0
        self._plain = session.optimizer
        self._backward, self._count = session.backward, session.meter.training_step
        peer = self

        class Stepping(SaLSA):
            """The package's optimizer, for a loop that calls ``step()`` after its own backward pass."""

            def step(self, closure: Any = None) -> torch.Tensor:
                return super().step(closure or peer._closure)

        session.optimizer = Stepping(session.trainable, **options)
        session.optimizer.register_step_pre_hook(self._before_step)
        session.optimizer.register_step_post_hook(self._after_step)
        session.backward, session.meter.training_step = self._remember, self._counted
        self._attached = True

    def detach(self) -> None:
        """Give the session its own optimizer back. Idempotent."""
        if self._attached:
            self._attached = False
            self.session.optimizer = self._plain
            del self.session.backward, self.session.meter.training_step
            self._batch = self._loss = None

    def _remember(self, batch: Any) -> torch.Tensor:
        self._batch, self._loss = batch, self._backward(batch)
        return self._loss

    def _counted(self, *batch: Any, **options: Any) -> Flops:
        flops = self._count(*batch, **options)
        self._forward_flops += flops.paper // 3  # the paper's convention: a training step is three forwards
        return flops

    def _closure(self, backwards: bool = False) -> torch.Tensor:
        """The present batch's loss; ``backwards`` asks for its gradients too, which are there already."""
        if backwards:
            return self._loss
        self.probes += 1
        total = sum(self._batch.labelled)
        loss = torch.zeros((), device=self.session.device)
        with torch.no_grad():
            for micro_batch, tokens in zip(self._batch.micro_batches, self._batch.labelled, strict=True):
                if tokens:
                    loss += self.session.model(**micro_batch).loss * (tokens / total)
        return loss

    def _before_step(self, *_: Any) -> None:
        self._probes_before = self.probes

    def _after_step(self, *_: Any) -> None:
        probed = (self.probes - self._probes_before) * self._forward_flops
        self.session.meter.add(Flops(probed, probed))
        self._forward_flops = 0


def attach(session: Any, **options: Any) -> SalsaSearch:
    """Let SaLSA choose the step sizes of ``session``; ``options`` are those of its optimizer."""
    return SalsaSearch(session, **options)
