"""Fine-tune: one linear loop, with or without Fast Forward, measured in FLOPs and in seconds.

What a run is charged for: collating, forward, backward, the optimizer, and everything Fast Forward does
(validation losses, search, weight moves). Making the model, the validation loss's one comparison with the
model's own (two forwards of at most four or five examples) and Fast Forward's buffers, counting FLOPs, test
losses, logging and checkpoints are outside the clock. ``total`` is the sum of ``train``, ``validate``,
``move`` and ``other``.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ffkernels.reporting.machine import machine_info, version_info
from ffkernels.reporting.recorder import Recorder
from ffkernels.stage.record import Stage
from ffkernels.training import checkpoint
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import Attach, open_session

ALL_STEPS = "all steps done"
TARGET_REACHED = "target loss reached"
NOT_FINITE = "training loss is not finite"
INTERRUPTED = "interrupted"
SPLIT = ("train", "validate", "move", "other")


@dataclass
class RunResult:
    """How a run ended. ``test_loss`` is of the final weights; after Ctrl-C, the last that was measured. What
    all test losses took, ``test_seconds``, is charged to nobody: it is not in ``seconds``.
    ``ctrl_c`` says that Ctrl-C came, also in the last step, when there was nothing left to interrupt.
    """

    name: str
    optimizer_steps: int
    test_loss: float
    flops: dict[str, int]
    seconds: dict[str, float]
    validation_forwards: int
    stages: list[Stage]
    stopped_because: str
    reached_target: bool | None
    log: Path
    folder: Path
    ctrl_c: bool = False
    test_seconds: float = 0.0

    @property
    def interrupted(self) -> bool:
        return self.stopped_because == INTERRUPTED


@dataclass
class Progress:
    """What a run has counted so far; saved and restored with it."""

    optimizer_steps: int = 0
    test_loss: float = math.nan
    tested_at: int = -1
    validation_forwards: int = 0
    test_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPLIT, 0.0))

    def charge(self, **seconds: float) -> None:
        for part, value in seconds.items():
            self.seconds[part] += value

    def clock(self) -> dict[str, float]:
        return {**self.seconds, "total": sum(self.seconds.values())}


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_event: Callable[[dict[str, Any]], bool | None] | None = None,
    save: bool = True,
    attach: Attach | None = None,
) -> RunResult:
    """Run ``config`` from its beginning, or with ``resume`` from where its last checkpoint stands.

    Writes the run log as it goes, and at the end what was trained and a checkpoint (not with ``save=False``).
    Ctrl-C ends the run after the present step, saved; so does a file that cannot be written any more.
    ``attach`` makes what runs the stages instead of FastForward (see ``session.open_session``).

    ``on_event`` gets every log event as a dict, and two that are not logged: ``stage_begins`` with the
    ``optimizer_step``, and at the first Ctrl-C, from inside its handler, ``interrupt`` with ``in_stage`` and
    ``save``. Where it returns True the run ends after the present step; a KeyboardInterrupt that it raises
    counts as Ctrl-C.

    Raises:
        ValueError: when there is nothing to resume, the checkpoint was made under other settings, or the run
            would write into the folder of the model that it trains.
        RuntimeError: when another run of this name is going on.
        OSError: when a file cannot be written; it says which, and what the run can go on from.
    """
    log, folder = Path(config.out) / f"{config.name}.jsonl", Path(config.out) / config.name
    if Path(config.model).is_dir() and folder.resolve() == Path(config.model).resolve():
        raise ValueError(
            f"name={config.name!r}: the run's files would replace the model {str(config.model)!r} that it "
            "starts from; take another name"
        )
    progress, stopped = Progress(), None

    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(log, append=resume))  # first: nobody else writes here now
        saved = checkpoint.load_state(folder) if resume else None
        session = stack.enter_context(open_session(config, attach=attach))
        device, meter, ff, steps = session.device, session.meter, session.ff, session.steps
        peer = getattr(ff, "name", type(ff).__name__) if attach is not None and ff is not None else None
        described = {**config.to_dict(), **({"peer": peer} if peer else {}), "steps": steps}
        if saved is not None:
            _check_peer(peer, saved["config"].pop("peer", None), ff)
            config.check_continues(saved["config"], steps)
            checkpoint.restore(saved, session.model, session.optimizer, device)
            progress = Progress(**saved["progress"])
            meter.load_state_dict(saved["meter"])
            if ff is not None:
                ff.load_state_dict(saved["fast_forward"])
        else:
            checkpoint.discard(folder)  # only now, when model, data and settings have proved to be good
        interrupt = stack.enter_context(_Interrupt())
        unwritten: list[OSError] = []

        def tell(event: str, **fields: Any) -> None:
            if on_event is not None:
                try:
                    interrupt.ending |= on_event({"event": event, **fields}) is True
                except KeyboardInterrupt:
                    interrupt.wanted = True

        def emit(event: str, **fields: Any) -> None:
            if not unwritten:
                try:
                    recorder.write(event, **fields)
                except OSError as error:
                    unwritten.append(error)  # the weights are worth more than their log: they are saved first
            tell(event, **fields)

        def stage_begins() -> None:
            interrupt.in_stage = True
            tell("stage_begins", optimizer_step=progress.optimizer_steps + 1)

        interrupt.tell = lambda: tell("interrupt", in_stage=interrupt.in_stage, save=save)
        if hasattr(ff, "on_stage_begins"):
            ff.on_stage_begins = stage_begins

        def spent() -> dict[str, Any]:
            return {"flops": meter.totals, "seconds": progress.clock()}

        def measure_test_loss() -> None:
            if session.test is None:
                return
            begin = perf_counter()
            progress.test_loss = session.test_loss()
            progress.test_seconds += perf_counter() - begin
            progress.tested_at = progress.optimizer_steps
            emit("test", optimizer_step=progress.optimizer_steps, loss=progress.test_loss, **spent())

        def refuse_unwritten() -> None:
            if unwritten:
                kept = checkpoint.on_disk(folder) if save else "Start it again where there is space."
                raise OSError(f"{unwritten[0]}. {kept}") from unwritten[0]

        def reached_target() -> bool:
            tested = progress.tested_at == progress.optimizer_steps
            return config.target_loss is not None and tested and progress.test_loss <= config.target_loss

        def save_checkpoint() -> None:
            counted = {"progress": vars(progress), "meter": meter.state_dict()}
            counted["fast_forward"] = ff.state_dict() if hasattr(ff, "state_dict") else None
            model, optimizer = session.model, session.optimizer
            for save_part in (
                lambda: checkpoint.save_state(folder, model, optimizer, device, config=described, **counted),
                lambda: checkpoint.save_model(model, folder, session.tokenizer),
            ):
                try:
                    save_part()
                except OSError as error:  # the other may fit
                    unwritten.append(error)

        resumed = {"resumed_from": progress.optimizer_steps} if saved is not None else {}
        emit(
            "run",
            name=config.name,
            config=described,
            machine=machine_info(),
            versions=version_info(),
            tokens=session.task.statistics(),
            remarks=session.remarks,
            **resumed,
        )
        if saved is None:
            measure_test_loss()
        if reached_target():
            stopped = TARGET_REACHED

        while progress.optimizer_steps < steps and stopped is None:
            if interrupt.wanted or interrupt.ending or unwritten:
                stopped = INTERRUPTED
                break
            step = progress.optimizer_steps
            start = _now(device)
            batch = session.load(step)
            collated = _now(device)
            for micro_batch in batch.micro_batches:
                # A batch shape's first time runs the model: outside the clock.
                meter.training_step(session.model, micro_batch)

            begin = _now(device)
            stages_before = len(ff.stages) if ff is not None else 0
            loss = session.backward(batch)
            session.update(step)
            train_loss = loss.item()  # the step's one wait for the device
            end = _now(device)
            interrupt.in_stage = False

            progress.optimizer_steps += 1
            stage = ff.stages[-1] if ff is not None and len(ff.stages) > stages_before else None
            staged = stage.seconds if stage is not None else 0.0
            progress.charge(train=end - begin - staged, other=collated - start)
            meter.optimizer_step()
            rate = {"alignment": ff.alignment} if getattr(ff, "learning_rate", None) is not None else {}
            seen = {"optimizer_step": progress.optimizer_steps, "train_loss": train_loss, "lr": session.lr}
            emit("step", **seen, **rate, **spent())
            if stage is not None:
                rest = stage.seconds - stage.validate_seconds - stage.move_seconds
                progress.charge(validate=stage.validate_seconds, move=stage.move_seconds, other=rest)
                progress.validation_forwards += stage.evaluations
                meter.stage(stage, moved=getattr(ff, "moved", None))
                emit("stage", **stage.to_dict(), run_flops=meter.totals, run_seconds=progress.clock())
            due = config.evaluate_every and progress.optimizer_steps % config.evaluate_every == 0
            if stage is not None or due or progress.optimizer_steps == steps:
                measure_test_loss()

            if reached_target():
                stopped = TARGET_REACHED
            elif not math.isfinite(train_loss):
                stopped = NOT_FINITE
            elif save and config.checkpoint_every and progress.optimizer_steps % config.checkpoint_every == 0:
                save_checkpoint()

        if progress.tested_at != progress.optimizer_steps and stopped != INTERRUPTED:
            measure_test_loss()
        if save and stopped != NOT_FINITE:  # weights that are lost must not replace the last good ones
            save_checkpoint()
        refuse_unwritten()
        ended = {
            "optimizer_steps": progress.optimizer_steps,
            "test_loss": progress.test_loss,
            **spent(),
            "validation_forwards": progress.validation_forwards,
            "stages": list(ff.stages) if ff is not None else [],
            "stopped_because": stopped or ALL_STEPS,
            "reached_target": None if config.target_loss is None else reached_target(),
            "test_seconds": progress.test_seconds,
        }
        result = RunResult(config.name, log=log, folder=folder, ctrl_c=interrupt.wanted, **ended)
        emit("end", **{**ended, "stages": len(result.stages)})
        refuse_unwritten()
    return result


def _check_peer(peer: str | None, saved: str | None, ff: Any) -> None:
    """Raise ValueError where a run would go on with another loop than it was saved with, or cannot."""
    if ff is not None and not hasattr(ff, "load_state_dict"):
        raise ValueError(f"a run with {type(ff).__name__} cannot be resumed; start it without resume")
    if peer != saved:
        raise ValueError(
            f"cannot resume with attach of {peer!r}: the run was saved with {saved!r}; go on with that, or "
            "start a run of another name"
        )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


class _Interrupt:
    """The first Ctrl-C asks for an end after the present step, the second ends at once; a context manager."""

    wanted = in_stage = ending = False
    tell: Callable[[], None] | None = None
    _before: Any = None

    def __call__(self, *signal_and_frame: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        if self.tell is not None:
            self.tell()

    def __enter__(self) -> _Interrupt:
        # Signals arrive in the main thread only; a process started with SIGINT ignored keeps ignoring it.
        ours = threading.current_thread() is threading.main_thread()
        if ours and callable(signal.getsignal(signal.SIGINT)):
            self._before = signal.signal(signal.SIGINT, self)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
