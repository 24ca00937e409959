"""What every test may rely on."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def scripts_in(monkeypatch: pytest.MonkeyPatch, *folders: str) -> Iterator[Callable[[str], Any]]:
    """The modules in these folders of the checkout by name; they import each other as scripts do."""
    paths = tuple(str(ROOT / folder) for folder in folders)
    before = set(sys.modules)
    for path in paths:
        monkeypatch.syspath_prepend(path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # they put themselves there as well
    yield __import__
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(paths):
            del sys.modules[name]


@pytest.fixture()
def benchmarks(monkeypatch):
    """The modules in benchmarks/ by name."""
    with scripts_in(monkeypatch, "benchmarks") as load:
        yield load


@pytest.fixture()
def tool(monkeypatch):
    """The modules in tools/ by name, and those in benchmarks/, which they import."""
    with scripts_in(monkeypatch, "benchmarks", "tools") as load:
        yield load


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_arrives():
    """A job that a shell put into the background starts with SIGINT ignored; tests of Ctrl-C need it back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def same_environment():
    """Libraries set variables for good (PEFT's BOFT chooses a compiler); the next test shall not see them."""
    before = dict(os.environ)
    yield
    added = os.environ.keys() - before.keys() - {"PYTEST_CURRENT_TEST"}
    for name in added:
        del os.environ[name]
    for name, value in before.items():
        if os.environ.get(name) != value and name != "PYTEST_CURRENT_TEST":
            os.environ[name] = value


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """TrainConfig arguments: a random two-layer GPT-NeoX over bytes, and 120 lines of arithmetic.

    A model and a task so small that a training step takes milliseconds.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("small")
    config = transformers.GPTNeoXConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=257,
        eos_token_id=257,
        tokenizer_class="ByteTokenizer",
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder / "model")
    pairs = [{"prompt": f"{a}+{b}=", "response": f"{a + b}."} for a in range(12) for b in range(10)]
    data = folder / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return {
        "model": str(folder / "model"),
        "data": str(data),
        "lr": 1e-3,
        "warmup_steps": 2,
        "batch_size": 8,
        "steps": 10,
        "max_length": 16,
        "rank": 4,
        "test_examples": 16,
        "validation_examples": 8,
        "evaluate_every": 0,
        "device": "cpu",
    }
