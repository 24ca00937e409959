"""The embedded model on a few short lines: a training step and a validation take milliseconds."""

from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture(scope="session")
def short(tmp_path_factory):
    """TrainConfig arguments."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.set_num_threads(1)
    data = tmp_path_factory.mktemp("short") / "sums.jsonl"
    pairs = [
        {"prompt": f"{a}+{b}=", "response": f"{a + b}" + "!" * (a % 4)} for a in range(9) for b in range(9)
    ]
    data.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return {
        "data": str(data),
        "lr": 1e-3,
        "warmup_steps": 0,
        "batch_size": 4,
        "max_length": 12,
        "rank": 2,
        "test_examples": 8,
        "validation_examples": 16,
        "evaluate_every": 0,
        "device": "cpu",
    }


@pytest.fixture()
def opened(short):
    """``opened(attach, **changes)``: a session of these settings, closed when the test ends."""
    from ffkernels.training.config import TrainConfig
    from ffkernels.training.session import open_session

    sessions = []

    def make(attach=None, **changes):
        sessions.append(open_session(TrainConfig(**{**short, **changes}), attach=attach))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()
