"""What FastForwardCallback logs arrives at the report_to backends, at the right global step."""

import json
import os
import sqlite3
import tempfile
from functools import partial

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from ffkernels import FastForwardCallback, FastForwardConfig
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.tasks import collate, load_file

# trackio reads it when it is imported.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="ffkernels-trackio-"))

STAGE = {"ff/tau", "ff/val_loss_before", "ff/val_loss_after", "ff/seconds", "ff/flops_share", "ff/executor"}
TOTALS = {"ff/stages", "ff/flops_measured", "ff/flops_paper", "ff/stage_flops_measured"}


@pytest.fixture
def train(small, arguments):
    """Seven steps with stages after the third and sixth; the callback comes last, behind the backends'."""

    def train(*callbacks, **options):
        model, tokenizer = load_model(small["model"])
        task = load_file(small["data"], tokenizer, max_length=16, test_examples=16, validation_examples=8)
        callback = FastForwardCallback(config=FastForwardConfig(interval=3, max_tau=16))
        Trainer(
            model=add_adapter(model, rank=4, seed=0),
            args=TrainingArguments(**{**arguments, "logging_steps": 2, **options}),
            train_dataset=task.train,
            eval_dataset=task.validation,
            data_collator=partial(collate, pad_token_id=256),
            callbacks=[*callbacks, callback],
        ).train()
        return callback

    return train


def expected(callback):
    """τ by the global step of its stage."""
    taus = {stage.optimizer_step: stage.tau for stage in callback.stages}
    assert list(taus) == [3, 6] and taus[3] > 0
    return taus


def test_any_callback_before_it_sees_every_metric(train):
    seen = []

    class Backend(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, dict(logs)))

    callback = train(Backend())
    assert {step: logs["ff/tau"] for step, logs in seen if "ff/tau" in logs} == expected(callback)
    assert all(logs.keys() >= STAGE for _, logs in seen if "ff/tau" in logs)
    (last,) = [(step, logs) for step, logs in seen if "ff/stages" in logs]
    assert last[0] == 7 and last[1].keys() >= TOTALS and last[1]["ff/stages"] == 2
    assert all(isinstance(value, (int, float)) for _, logs in seen for value in logs.values())


def test_tensorboard(train, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = train(report_to=["tensorboard"])
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/{name}" for name in STAGE | TOTALS} <= tags
    assert {e.step: e.value for e in events.Scalars("train/ff/tau")} == expected(callback)
    losses = {e.step: e.value for e in events.Scalars("train/ff/val_loss_after")}
    assert losses == {s.optimizer_step: pytest.approx(s.loss_after) for s in callback.stages}
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    (total,) = events.Scalars("train/ff/flops_measured")
    assert total.step == 7 and total.value == pytest.approx(callback.flops["measured"])


def test_trackio(train, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("trackio")
    from trackio.utils import TRACKIO_DIR

    project = f"ffkernels-{os.getpid()}"
    callback = train(report_to=["trackio"], project=project, run_name="run")
    database = next(TRACKIO_DIR.glob(f"{project}*.db"))
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("select metrics from metrics")]
    stages = [row for row in rows if "train/ff/tau" in row]
    assert {row["train/global_step"]: row["train/ff/tau"] for row in stages} == expected(callback)
    assert all(row.keys() >= {f"train/{name}" for name in STAGE} for row in stages)
    (totals,) = [row for row in rows if "train/ff/stages" in row]
    assert totals["train/global_step"] == 7
    assert totals["train/ff/flops_paper"] == callback.flops["paper"]
