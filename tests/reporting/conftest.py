"""Run logs with known numbers: an optimizer step costs 100 measured FLOPs, 150 in the paper's, and 2 s."""

import pytest

from ffkernels.reporting.recorder import Recorder, RunLog, read_run

STEP = {"paper": 150, "measured": 100}
SECONDS = 2.0


@pytest.fixture
def write_log(tmp_path):
    """Writes a run through the recorder and reads it back.

    ``losses`` maps an optimizer step to the test loss there; ``stages`` one to (τ*, [(τ, loss), …]), each of
    whose validations costs 10 FLOPs in both conventions and 0.25 seconds. A run with ``alignments``, one per
    step, is one with no learning rate given.
    """

    def write(
        name: str,
        losses: dict[int, float],
        *,
        steps: int | None = None,
        stages: dict[int, tuple[int, list[tuple[int, float]]]] | None = None,
        end: bool = True,
        machine: dict | None = None,
        alignments: list[float | None] | None = None,
        **config,
    ) -> RunLog:
        stages = stages or {}
        steps = max(losses) if steps is None else steps
        done = validations = 0

        def so_far() -> dict:
            forwards = 10 * validations
            train, validate = done * SECONDS, 0.25 * validations
            seconds = {"train": train, "validate": validate, "move": 0.0, "other": 0.0}
            seconds["total"] = train + validate
            return {
                "flops": {kind: done * cost + forwards for kind, cost in STEP.items()},
                "seconds": seconds,
            }

        with Recorder(tmp_path / f"{name}.jsonl") as recorder:
            versions, machine = {"torch": "2", "git_commit": "abc"}, machine or {"cpu": "toy", "threads": 1}
            config = {"lr": 1e-4, "batch_size": 8, **config}
            if alignments is not None:
                config.setdefault("fast_forward", {"interval": None, "learning_rate": "auto"})
            searches = [{"search": search} for search in ("linear", "parabolic") if search in name]
            config.setdefault("fast_forward", *searches or [None])
            recorder.write("run", name=name, config=config, machine=machine, versions=versions)
            for step in range(steps + 1):
                done = step
                if step:
                    more = {} if alignments is None else {"alignment": alignments[step - 1]}
                    losses_of = {"train_loss": 4.0 - 0.01 * step, "lr": 1e-4 * step}
                    recorder.write("step", optimizer_step=step, **losses_of, **more, **so_far())
                if step in stages:
                    tau, tried = stages[step]
                    validations += len(tried)
                    totals = {f"run_{key}": value for key, value in so_far().items()}
                    recorder.write("stage", optimizer_step=step, tau=tau, losses=tried, flops=1, **totals)
                if step in losses:
                    recorder.write("test", optimizer_step=step, loss=losses[step], **so_far())
            if end:
                recorder.write(
                    "end",
                    optimizer_steps=steps,
                    test_loss=losses[max(losses)],
                    validation_forwards=validations,
                    stages=len(stages),
                    stopped_because="all steps done",
                    reached_target=None,
                    **so_far(),
                )
        return read_run(tmp_path / f"{name}.jsonl")

    return write
