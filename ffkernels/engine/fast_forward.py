"""When a Fast Forward stage runs: hooks on the optimizer's step, the record of every stage, and its state.

    before every step                  c of gradient and update; best ← W    (align, or checkpoint)
    after an interval's last step      Δ ← W − best; best ← W                (delta)
    then one stage, if it should pay   search the best τ in W + τ·Δ by validation loss and stay there

Training goes on with the optimizer's own state untouched. Source: Rahamim et al., arXiv 2409.04206.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn

from ffkernels.engine.auto_rate import AutoRate
from ffkernels.engine.config import FastForwardConfig
from ffkernels.engine.decision import StageDecision
from ffkernels.engine.ladder import Ladder
from ffkernels.engine.rank_executor import RankExecutor
from ffkernels.engine.step_hooks import on_step
from ffkernels.engine.watch import StepWatch
from ffkernels.ranks.parallelism import training_group, why_refused
from ffkernels.ranks.ranks import Ranks, refuse_late_ranks, several_processes, telling, together
from ffkernels.search.search import make_search
from ffkernels.stage.optimizer_rehearsal import refuse_pulling_back
from ffkernels.stage.program import StageProgram
from ffkernels.stage.record import INTERRUPTED, Stage, next_start
from ffkernels.stage.weights import MovedWeights, NameFilter, require_same_model, unwrap_optimizer
from ffkernels.validation.causal_lm import model_device
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.pool import draw_for_stage

STATE_VERSION = 1

_attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref] = weakref.WeakKeyDictionary()


def attached(optimizer: torch.optim.Optimizer) -> FastForward | None:
    """The FastForward that sits on this optimizer."""
    return _attached.get(optimizer, lambda: None)()


class FastForward:
    """Fast Forward for any training loop: every ``interval`` steps, repeat the last update while it helps.

    The loop does not change; the stage runs inside ``optimizer.step()``, after the step itself. Between
    steps the model always holds plain weights that can be saved or evaluated. A context manager: leaving
    it detaches. In a job of several processes make the same one on each: they share the validation and take
    the same τ.

    Args:
        model: the module that trains.
        optimizer: its optimizer, or a wrapper that keeps it as ``.optimizer``, where the hooks sit.
        validation: a ``ValidationLoss``, or what makes one: batches or a callable ``loss_fn(model)``. Of a
            ``ValidationPool``, other examples are drawn before each stage. With ``config.interval=None``
            nothing is validated, and of a ``ValidationLoss`` only its process group is looked at.
        config: when and how.
        include, exclude: narrow the moved tensors by name (predicate, regular expression or several).
        defer: do not run a stage inside ``optimizer.step()``; it waits for ``run_due_stage()``. For loops
            that call back later, when the gradients are freed.
        scheduler: the optimizer's scheduler or several, for ``learning_rate="auto"``, which moves their base
            learning rate; around it they keep their shape.

    Attributes:
        stages: list of ``Stage``, one per stage.
        alignment: cosine of the newest gradient and the last update; None where it is not known.
        learning_rate: with "auto", the largest group's base rate as it is now; else None.
        rising: with "auto", whether it is still rising from far below; no stage runs while it does.
        lr_scale: what "auto" has multiplied learning rates by. For loops that write ``group["lr"]`` at each
            step: they have to write their own times this, and to make the optimizer with the base rate.
        optimizer_steps: optimizer steps seen.
        ranks: the processes that run each stage together; None in a job of one.
        before_ranks: it was made before the job had a process group of several.
        active: False after as many stages in a row without a step as ``patience`` says, or after
            ``detach()``.
        on_stage_begins, on_stage: optional callables, called before each stage, and with it when it ended.

    Raises:
        ValueError: when no trainable parameter is left to move, or validation is missing or of another model.
        TypeError: when optimizer or model is not one.
        RuntimeError: when the optimizer already carries a FastForward, when the weights are spread over
            processes in a way that cannot be moved (DeepSpeed ZeRO, FSDP1, tensor parallelism), or when a
            graph executor that was asked for by name cannot run here.
        RanksDisagree, RankFailed: when the processes of a job have different settings, or another one failed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        validation: ValidationLoss | Any = None,
        config: FastForwardConfig | None = None,
        *,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
        defer: bool = False,
        scheduler: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if config is not None and not isinstance(config, FastForwardConfig):
            raise TypeError(f"config must be a FastForwardConfig, got {type(config).__name__}")
        self.model = model
        self.config = config or FastForwardConfig()
        self.defer = defer
        self.stages: list[Stage] = []
        self.optimizer_steps = 0
        self.on_stage: Callable[[Stage], None] | None = None
        self.on_stage_begins: Callable[[], None] | None = None
        self._executor: Ladder | RankExecutor | None = None
        self._armed = self._due_now = False
        self._checkpoint_seconds = 0.0
        self.before_ranks = not several_processes()
        given = isinstance(validation, ValidationLoss)
        self.ranks = validation.ranks if given else Ranks.present(model_device(model), training_group(model))
        with together(self.ranks):
            facts = self._prepare(optimizer, validation, include, exclude)
        if self.ranks is not None:
            self.ranks.agree(facts, "make the same FastForward on every rank")
        if self.config.learning_rate == "auto":
            self._decision.auto = AutoRate(self.optimizer, scheduler)
        self._hooks: list[Any] = [
            *on_step(self.optimizer, self._before_step, self._after_step),
            *self._decision.hooks,
            *StepWatch(self.optimizer, self._moved.parameters.values()).hooks,
        ]
        if self.validation is not None:
            self._hooks += self.validation.evaluator.listen(self.model)
        _attached[self.optimizer] = weakref.ref(self)

    def _prepare(
        self, optimizer: Any, validation: ValidationLoss | Any, *narrowed: NameFilter | None
    ) -> dict[str, Any]:
        """Find out what is moved, by what loss and how. Returns what must be the same on every rank."""
        if refused := why_refused(self.model, optimizer):
            raise RuntimeError(f"Fast Forward cannot move these weights: {refused}")
        self.optimizer = unwrap_optimizer(optimizer)
        if attached(self.optimizer) is not None:
            raise RuntimeError(
                "this optimizer already carries a FastForward; call its detach() before attaching another"
            )
        if self.config.interval is None:
            validation = None
        elif validation is None:
            raise ValueError(
                f"validation=None: stages every {self.config.interval} steps search by a validation loss; "
                "pass batches of some 32 examples that are not trained on, or a loss_fn(model). Without "
                'stages, FastForwardConfig(learning_rate="auto", interval=None) needs none'
            )
        elif not isinstance(validation, ValidationLoss):
            validation = ValidationLoss(self.model, validation)
        self.validation = validation
        refuse_late_ranks(validation or self)
        self._moved = MovedWeights(self.model, self.optimizer, *narrowed, impl=self.config.impl)
        if validation is not None:
            refuse_pulling_back(optimizer)
            require_same_model(validation, self._moved.parameters)
        sharded = self._moved.sharded
        self._decision = StageDecision(self.config, self.model, optimizer, validation, self.ranks, sharded)
        if validation is not None:
            arguments = self.config.executor, validation, self._moved.table.device
            alone = self.ranks is None
            self._executor = Ladder(*arguments) if alone else RankExecutor(*arguments, sharded=sharded)
        return {
            **{f"FastForwardConfig.{name}": value for name, value in self.config.to_dict().items()},
            "the trainable parameters (number, hash of names and shapes)": self._moved.fingerprint,
            "the optimizer": type(self.optimizer).__name__,
            "defer": self.defer,
        }

    @property
    def active(self) -> bool:
        return bool(self._hooks) and not self._decision.schedule.ended

    @property
    def lr_scale(self) -> float:
        return 1.0 if self._decision.auto is None else self._decision.auto.scale

    @property
    def learning_rate(self) -> float | None:
        return None if self._decision.auto is None else self._decision.auto.rate

    @property
    def rising(self) -> bool:
        return self._decision.auto is not None and self._decision.auto.rising

    @property
    def alignment(self) -> float | None:
        return None if self._decision.alignment is None else self._decision.alignment.last

    @property
    def trainable_numel(self) -> int:
        """Elements in all tensors that a stage moves."""
        return 0 if self._moved.table is None else self._moved.table.numel

    def detach(self) -> None:
        """Take the hooks off and free buffers and graphs; ``stages`` stays readable. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._armed = self._due_now = False
        if self._decision.auto is not None:
            self._decision.auto.release()
        self._moved.free()
        if attached(self.optimizer) is self:  # else another has been attached since
            del _attached[self.optimizer]
        self._let_go()

    def __enter__(self) -> FastForward:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a FastForward cannot be copied or pickled: it sits on one optimizer's hooks and holds buffers "
            "at fixed addresses; save state_dict(), and attach a new FastForward to the copied optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides model, optimizer and data: plain Python values, and in
        ``["alignment"]["before"]`` the weights before the last step, a list of tensors or None.

        Without those (a state that is JSON has no place for tensors) call ``forget_update()`` where it was
        taken, too: the run that goes on and the one that is resumed are then the same.
        """
        return {
            "version": STATE_VERSION,
            "config": self.config.to_dict(),
            "optimizer_steps": self.optimizer_steps,
            "stages": [stage.to_dict() for stage in self.stages],
            **self._decision.state_dict(self._moved.table),
        }

    def forget_update(self) -> None:
        """Take the next step for one whose alignment with the last update is not known."""
        self._decision.forget_update()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; bit-identical if model and optimizer are restored too."""
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            version = state.get("version") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"not a FastForward state of version {STATE_VERSION}: got {version!r}")
        missing = sorted(self.state_dict().keys() - state.keys() - {"alignment", "auto_rate"})
        if missing:
            raise ValueError(f"the FastForward state is incomplete: {', '.join(missing)} missing")
        self.config.warn_of_others(state["config"])
        self._armed = self._due_now = False
        self.optimizer_steps = int(state["optimizer_steps"])
        self._refresh()
        self._decision.load_state_dict(state, self._moved.table)
        self.stages = [Stage.from_dict(stage) for stage in state["stages"]]
        if self.ranks is None:  # there each draws together with the others, at its next stage
            draw_for_stage(self.validation, max(0, len(self.stages) - 1))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._armed = self._due_now = False
        due = self._decision.begin_step(self.optimizer_steps + 1, self._moved.table)
        if not due and self._decision.alignment is None:
            return
        closure = (args[1:2] or [kwargs.get("closure")])[0] is not None
        start = perf_counter()
        with telling(self.ranks if self._decision.exchanges else None):
            refuse_late_ranks(self.validation or self)
            if due or self._moved.is_stale(others=self.config.interval is None):
                self._refresh()
            name = type(self.optimizer).__name__ if closure else ""
            self._armed = self._decision.before_step(self._moved, name)
        self._checkpoint_seconds = perf_counter() - start

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.optimizer_steps += 1
        self._decision.after_step(self._moved.table)
        self._due_now, self._armed = self._armed and not self._decision.schedule.ended, False
        if not self.defer:
            self.run_due_stage()

    @property
    def stage_due(self) -> bool:
        """Whether a stage waits for ``run_due_stage()``."""
        return self._due_now

    def run_due_stage(self) -> Stage | None:
        """Run the stage that the last optimizer step made due and return it; None when none is due."""
        if not self._due_now:
            return None
        self._due_now = False
        self._run_stage()
        return self.stages[-1]

    def _refresh(self) -> None:
        if self._moved.refresh(self._let_go):
            self._decision.forget_update(others=True)

    def _let_go(self) -> None:
        if self._executor is not None:
            self._executor.close()

    def _run_stage(self) -> None:
        table, executor = self._moved.table, self._executor
        stage = Stage(self.optimizer_steps, executor=executor.name)
        self._decision.begin_stage(stage)
        search = make_search(self.config.search, self.config.max_tau, next_start(self.stages))
        program = StageProgram(table, self.validation, search)
        stage.draw = draw_for_stage(self.validation, len(self.stages))
        if self._decision.in_step(self.optimizer_steps, not self._moved.follow()):
            program.stopped_because = "the weights were replaced during the optimizer's step"
            return self._finish(stage, program)
        try:
            if self.on_stage_begins is not None:
                self.on_stage_begins()
            executor.run(program)
            self._decision.after_stage(stage, program.search)
            if self._decision.schedule.ended:
                executor.close()
        except BaseException as error:
            program.stopped_because = f"{INTERRUPTED} by {type(error).__name__}"
            raise
        finally:
            stage.executor, stage.executor_reason = executor.name, executor.reason
            self._finish(stage, program)

    def _finish(self, stage: Stage, program: StageProgram) -> None:
        program.write_into(stage, self._checkpoint_seconds)
        self._decision.watch.after_stage(stage.tau)
        # Recorded before its FLOPs: their first reading runs the validation and may be interrupted.
        self.stages.append(stage)
        try:
            stage.flops = program.flops()
        finally:
            if self.on_stage is not None:
                self.on_stage(stage)
