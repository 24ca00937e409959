"""Fast Forward in a Hugging Face ``Trainer`` or TRL's ``SFTTrainer``: one callback.

What happens in an optimizer step of the Trainer, and where Fast Forward comes in:

    clip → optimizer.step() → scheduler → zero_grad → on_step_end → log, evaluate, save
           └ checkpoint before, on the                └ the stage: gradients are freed, and what is
             interval's last step                       logged, evaluated or saved has its weights

The checkpoint is taken by the optimizer's own hook, so a step that fp16's loss scaling skips neither counts
nor starts a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ffkernels.engine.config import FastForwardConfig
from ffkernels.engine.fast_forward import FastForward, Stage
from ffkernels.ops.notices import announce_once
from ffkernels.reporting.flops import FlopMeter, Flops
from ffkernels.stage.weights import NameFilter
from ffkernels.training import trainer_access
from ffkernels.training.rules import Rule, check, one_of, whole
from ffkernels.training.step_flops import StepFlops
from ffkernels.training.trainer_loss import LOSSES, make_validation
from ffkernels.validation.batches import is_loss_function
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.restore import keep_random_state

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
    from transformers.trainer_utils import set_seed
except ImportError as error:
    raise ImportError("FastForwardCallback needs transformers: pip install 'ffkernels[hf]'") from error

__all__ = ["EXECUTOR_NUMBERS", "FastForwardCallback"]

# ``ff/executor`` is a number because some backends drop text.
EXECUTOR_NUMBERS = {"eager": 0, "step_graph": 1, "stage_graph": 2}


class FastForwardCallback(TrainerCallback, ExportableState):
    """Run a Fast Forward stage every ``config.interval`` optimizer steps of a ``Trainer``.

    By default as long as stages pay, and more seldom where they do not (``config.patience``).

    Args:
        validation: where the validation loss comes from. None: the first ``examples`` of the Trainer's
            ``eval_dataset``. Or a dataset or list of examples (all, batched as the Trainer evaluates), a
            list or DataLoader of batches, a callable ``loss_fn(model)``, a ``ValidationLoss``.
        config: when stages run and how they search. With ``interval=None`` there are none, and nothing to
            validate on is needed.
        examples: how many examples are taken of ``eval_dataset``.
        pool: draw the ``examples`` anew before each stage (``ValidationPool``), from the first so many of
            ``eval_dataset`` or of the dataset that ``validation`` is; None validates on the same in each.
        loss: by which loss those are judged: ``"model"``, the model's own; ``"trainer"``, what the Trainer's
            evaluation reports as ``eval_loss``; ``"auto"``, the model's own where the Trainer trains by it,
            else the Trainer's, which is said once. Of a Trainer whose evaluation has no labels (preferences,
            generated text) "trainer" has to be asked for.
        include, exclude: narrow the moved tensors by name, as in ``FastForward``.
        trainer: the Trainer; found by itself when not given.
        from_checkpoint: set by the Trainer when it restores callbacks; not for users.

    After each stage and at the end of training it logs ``ff/…`` metrics; docs/integrations.md says which.

    Its state is saved with every checkpoint and restored with it, whatever
    ``restore_callback_states_from_checkpoint`` says.

    Attributes:
        ff: the ``FastForward`` at work; None outside of training.
        stages: every ``Stage`` so far; stays readable after training.
        flops: ``{"paper": …, "measured": …}`` of the run so far, stages included.
        stage_flops: the stages' part of it.

    Raises (when training begins):
        ValueError: when there is nothing to validate on, or no loss for it.
        RuntimeError: when no Trainer is found, or ``FastForward`` refuses its model or optimizer.
    """

    def __new__(cls, *args: Any, from_checkpoint: bool = False, **kwargs: Any) -> FastForwardCallback:
        # The Trainer restores a callback by making a new one of JSON values and dropping the old. But the old
        # one knows the validation examples, and it is the one that the user holds: give that back.
        if from_checkpoint:
            trainer = trainer_access.calling_trainer()
            for callback in trainer.callback_handler.callbacks if trainer is not None else ():
                if type(callback) is cls:
                    return callback
        return super().__new__(cls)

    def __init__(
        self,
        validation: Any = None,
        config: FastForwardConfig | None = None,
        *,
        examples: int = 32,
        pool: int | None = None,
        loss: str = "auto",
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
        trainer: Any = None,
        from_checkpoint: bool = False,
    ) -> None:
        if from_checkpoint and hasattr(self, "config"):
            return
        if config is not None and not isinstance(config, FastForwardConfig):
            raise TypeError(f"config must be a FastForwardConfig, got {type(config).__name__}")
        check("examples", examples, whole(1))
        enough = Rule(whole(examples).or_none.holds, f"an integer of at least examples={examples}, or None")
        check("pool", pool, enough)
        check("loss", loss, one_of(LOSSES))
        if pool is not None and (isinstance(validation, ValidationLoss) or is_loss_function(validation)):
            kind = type(validation).__name__
            raise ValueError(f"pool={pool}: a {kind} has no examples to draw from; pass a dataset or batches")
        self.validation, self.config = validation, config or FastForwardConfig()
        self.examples, self.pool, self.loss = examples, pool, loss
        self.include, self.exclude, self.trainer = include, exclude, trainer
        self.ff: FastForward | None = None
        self.stages: list[Stage] = []
        self.stage_flops = {"paper": 0, "measured": 0}
        self.saved: dict[str, Any] = {}
        self._trainer: Any = None
        self._meter = FlopMeter(0)
        self._steps_charged = 0
        self._step_flops = StepFlops()
        self._unwrap: Callable[[], object] = lambda: None

    @property
    def flops(self) -> dict[str, int]:
        return self._meter.totals

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint: JSON values."""
        if self.ff is not None:
            # JSON has no place for the weights before the last step: neither this run nor a resumed one has
            # them.
            self.ff.forget_update()
            self.saved = {"fast_forward": self.ff.state_dict(), "flops": self.flops}
            self.saved["stage_flops"] = dict(self.stage_flops)
        return {"args": {"from_checkpoint": True}, "attributes": {"saved": self.saved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()  # a training that was interrupted, or begins anew with a smaller batch
        trainer = self.trainer or trainer_access.calling_trainer()
        if trainer is None:
            raise RuntimeError(
                "FastForwardCallback was called by no transformers.Trainer; give it one: "
                "FastForwardCallback(..., trainer=trainer)"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        stages, keep = self.config.interval is not None, self.config.learning_rate == "keep"
        validation = self._make_validation(trainer, model, args.seed) if stages else None
        moved = {"include": self.include, "exclude": self.exclude, "defer": True}
        scheduler = None if keep else kwargs.get("lr_scheduler")
        self.ff = FastForward(model, optimizer, validation, self.config, scheduler=scheduler, **moved)
        if self.ff.learning_rate is not None and args.save_strategy == "steps" and state.save_steps == 1:
            announce_once(
                "auto-rate-saved-at-each-step",
                "learning_rate='auto' compares each step with the one before, which a Trainer's checkpoint "
                "has no place for: with save_steps=1 there is nothing to compare, and the rate stays far "
                "below any that trains; save more seldom",
            )
        self.stages = self.ff.stages
        self._meter = FlopMeter(self.ff.trainable_numel)
        self.stage_flops = {"paper": 0, "measured": 0}
        self._restore(state)
        self._steps_charged = self.ff.optimizer_steps
        self._step_flops = StepFlops()
        self._unwrap = trainer_access.wrap_training_step(trainer, self._count_batch)
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ff is None:
            return
        if self.ff.optimizer_steps > self._steps_charged:  # else loss scaling skipped it
            self._steps_charged = self.ff.optimizer_steps
            self._meter.optimizer_step()
        stage = self.ff.run_due_stage()
        if stage is None:
            if control.should_log and (moved := self._rate_metrics()):
                trainer_access.log(self._trainer, moved)
            return
        self._meter.trainable_numel = self.ff.trainable_numel  # another adapter may be active by now
        for convention, flops in self._meter.stage(stage)._asdict().items():
            self.stage_flops[convention] += flops
        trainer_access.log(self._trainer, self._stage_metrics(stage))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        # Of all logs only the training's last has the Trainer's total in the history; in `logs` itself a
        # callback before this one may have taken it out.
        last = state.log_history[-1] if state.log_history else {}
        if self.ff is None or "total_flos" not in last or "ff/stages" in last:
            return
        totals = self._totals()
        last.update(totals)
        logs.update(totals)  # TrainOutput.metrics
        # The backends have seen this log already: they get the totals in another.
        self._trainer.callback_handler.on_log(args, state, control, dict(totals))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state()
        self.detach()

    def detach(self) -> None:
        """Let go of model, optimizer and Trainer. Training's end does it; after an exception, you may."""
        self._unwrap()
        self._unwrap = lambda: None
        if self.ff is not None:
            self.ff.detach()
        self.ff = self._trainer = None

    def _make_validation(self, trainer: Any, model: torch.nn.Module, seed: int) -> ValidationLoss:
        given = self.validation
        if isinstance(given, ValidationLoss):
            return given
        if given is None and trainer.eval_dataset is None:
            raise ValueError(
                "FastForwardCallback has nothing to validate on: pass validation= (about 32 examples "
                "that are not trained on) or give the Trainer an eval_dataset"
            )
        # The same examples and masks after a resume as before it, and no trace in the training's randomness.
        with keep_random_state(next(model.parameters()).device):
            set_seed(seed)
            if is_loss_function(given):
                return ValidationLoss(model, given)
            taken = {"examples": self.examples, "pool": self.pool, "loss": self.loss}
            return make_validation(trainer, model, given, seed=seed, **taken)

    def _restore(self, state: Any) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name) or {}
        saved = saved[-1] if isinstance(saved, list) else saved
        # A checkpoint made without this callback has no place for it, and the Trainer's next save needs one.
        state.stateful_callbacks[name] = self.state()
        if state.global_step == 0:
            return  # a fresh run; what is saved is of one before it
        saved = saved.get("attributes", {}).get("saved")
        if not saved:
            self.ff.optimizer_steps = state.global_step
            announce_once(
                f"no-callback-state-{id(self)}",
                f"training resumes at step {state.global_step} from a checkpoint without a Fast Forward "
                "state: its earlier stages, FLOPs and failures are not known and begin anew. "
                "Train with the callback from the beginning to have it saved",
            )
            return
        self.ff.load_state_dict(saved["fast_forward"])
        self.stages = self.ff.stages
        self._meter.load_state_dict(saved["flops"])
        self.stage_flops = dict(saved["stage_flops"])

    @contextmanager
    def _count_batch(self, model: torch.nn.Module, inputs: Any) -> Iterator[None]:
        beside = trainer_access.other_models(self._trainer, model)
        with self._step_flops.batch(model, inputs, beside) as cost:
            yield
        self._meter.add(Flops(*cost[0]))

    def _stage_metrics(self, stage: Stage) -> dict[str, float]:
        metrics = {
            "ff/tau": stage.tau,
            "ff/val_loss_before": stage.loss_before,
            "ff/val_loss_after": stage.loss_after,
            "ff/seconds": stage.seconds,
            "ff/flops_share": self._share(),
            "ff/executor": EXECUTOR_NUMBERS.get(stage.executor, math.nan),
            **self._rate_metrics(),
        }
        return {name: value for name, value in metrics.items() if not math.isnan(value)}

    def _rate_metrics(self) -> dict[str, float]:
        """What "auto" goes by, as far as it is known, and where it is."""
        rate, c = self.ff.learning_rate, self.ff.alignment
        known = {} if c is None else {"ff/alignment": c}
        return {} if rate is None else {"ff/learning_rate": rate, **known}

    def _totals(self) -> dict[str, float]:
        totals = {"ff/stages": len(self.stages), "ff/flops_share": self._share()}
        for convention in ("measured", "paper"):
            totals[f"ff/flops_{convention}"] = float(self.flops[convention])
            totals[f"ff/stage_flops_{convention}"] = float(self.stage_flops[convention])
        return totals

    def _share(self) -> float:
        return self.stage_flops["measured"] / max(1, self.flops["measured"])
