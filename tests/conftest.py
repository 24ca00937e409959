"""What every test may rely on."""

from __future__ import annotations

import importlib
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


@pytest.fixture()
def default_precision():
    """PyTorch's precision of float32 products, as it is at the start, before and after the test.

    The old and the new interface keep states of their own: setting the old one back sets the new one too.
    """
    torch = pytest.importorskip("torch")

    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        for holder in (
            torch.backends,
            torch.backends.cudnn,
            torch.backends.cuda.matmul,
            torch.backends.mkldnn,
            torch.backends.mkldnn.matmul,
        ):
            holder.fp32_precision = "none"

    reset()
    yield
    reset()


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


def _batch(rows: int = 5, length: int = 24, *, left: bool = False, seed: int = 0, prompt: int = 2):
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        kept = int(torch.randint(prompt + 2, length + 1, (), generator=generator))
        padding = slice(0, length - kept) if left else slice(kept, length)
        first = length - kept if left else 0
        mask[row, padding] = 0
        ids[row, padding] = 0
        labels[row, padding] = -100
        labels[row, first : first + prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def padded_batch():
    """`padded_batch(rows, length, left=, seed=, prompt=)`: random rows, the prompt's labels −100.

    Token numbers are below 97, which all models of the tests have.
    """
    return _batch


@pytest.fixture(scope="session")
def situations():
    """The module `tests/engine/situations.py`; its assertions show what they compared, as a test's do."""
    pytest.register_assert_rewrite("eager_twins", "situations")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tests" / "engine"))
        yield importlib.import_module("situations")
