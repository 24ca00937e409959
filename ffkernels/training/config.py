"""What a user may set about a training run: each setting's default, what it is, and what it may be."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ffkernels.engine.config import FastForwardConfig
from ffkernels.training.rules import ABOVE_0, FRACTION, Rule, at_least, check, number, one_of, whole

ADAPTERS = ("lora", "dora")
METHODS = (*ADAPTERS, "full", "full-attention")
SOURCES = ("offline", "hub")
CHAT_LOSSES = ("all", "assistant")

# A resumed run may differ in these and is still the continuation of the same run.
_FREE_ON_RESUME = {"name", "out", "evaluate_every", "checkpoint_every", "target_loss", "threads", "epochs"}

_TEXT = Rule(lambda value: isinstance(value, str | os.PathLike) and str(value), "a text")
_FILE_NAME = Rule(
    lambda name: isinstance(name, str) and name and not set(name) & set('/\\:*?"<>|') and name[0] != ".",
    'a file name without / \\ : * ? " < > | and without a leading dot',
)
_MODULES = Rule(
    lambda names: (
        names is None
        or (isinstance(names, list | tuple) and names and all(isinstance(n, str) and n for n in names))
    ),
    "module names, or None",
)
_STAGES = Rule(
    lambda value: value is None or isinstance(value, FastForwardConfig), "a FastForwardConfig or None"
)


def _setting(default: Any, rule: Rule, help: str) -> Any:
    """A field; ``help`` is also the help of its option on the command line."""
    return field(default=default, metadata={"rule": rule, "help": help})


@dataclass(frozen=True)
class TrainConfig:
    """One training run: what is trained on what, for how long, and where its files go.

    Each field's help says what it is; None, where it may be, means what stands in brackets.
    ``fast_forward`` is when and how to Fast Forward; None trains with the plain optimizer. With its
    ``interval=None`` and ``learning_rate="auto"`` it is the plain optimizer at a rate that is found, and
    ``lr`` says nothing. The gradient is the mean over a batch's labelled tokens, whatever
    ``micro_batch_size`` is; a test loss is measured right after every Fast Forward stage as well.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """

    name: str = _setting("run", _FILE_NAME, "The run's name.")
    out: str = _setting("runs", _TEXT, "Folder of the runs.")
    model: str = _setting(
        "tiny", _TEXT, "'tiny' (embedded), 'smollm2-135m', a folder, or a Hugging Face hub id."
    )
    attn: str | None = _setting(
        None,
        one_of(("sdpa", "eager", "flash_attention_2", None)),
        "Attention: sdpa, eager or flash_attention_2 (default: transformers' choice).",
    )
    task: str = _setting("instruction", _TEXT, "Data set: instruction, medical or chat.")
    source: str = _setting(
        "offline",
        one_of(SOURCES),
        "Where a task's data come from: offline (embedded, or a PyPI package) or hub.",
    )
    chat_loss: str = _setting(
        "all",
        one_of(CHAT_LOSSES),
        "What counts of the chat task: all tokens, or what the assistant says.",
    )
    data: str | None = _setting(
        None,
        _TEXT.or_none,
        "File of JSON lines, instead of --task: text; prompt and response or completion; messages; "
        "ShareGPT's conversations; Alpaca's instruction, input, output.",
    )
    test_data: str | None = _setting(
        None,
        _TEXT.or_none,
        "With --data: the file that is tested on, --test-examples of it at most.",
    )
    method: str = _setting(
        "lora",
        one_of(METHODS),
        "What trains: a lora or dora adapter; full: every weight; full-attention: the weights of the "
        "attention projections.",
    )
    rank: int = _setting(8, whole(1), "Rank of the adapter.")
    alpha: float = _setting(16.0, ABOVE_0, "Scale of the adapter; it acts times alpha/rank.")
    dropout: float = _setting(0.0, FRACTION, "Dropout on the adapter's input.")
    targets: tuple[str, ...] | None = _setting(
        None,
        _MODULES,
        "Modules that train, comma-separated (default: attention projections).",
    )
    lr: float = _setting(1e-4, ABOVE_0, "Learning rate after warm-up.")
    optimizer: str = _setting(
        "adamw",
        one_of(("adamw", "lora-plus")),
        "adamw, or lora-plus: a higher learning rate for the adapters' B matrices.",
    )
    lora_plus_ratio: float = _setting(16.0, at_least(1), "LoRA+: how many times as high that one is.")
    weight_decay: float = _setting(0.0, at_least(0), "AdamW's weight decay.")
    beta1: float = _setting(0.9, FRACTION, "AdamW's decay of the mean gradient.")
    beta2: float = _setting(0.999, FRACTION, "AdamW's decay of the mean squared gradient.")
    max_grad_norm: float | None = _setting(None, ABOVE_0.or_none, "Clip the gradient's norm (default: no).")
    schedule: str = _setting(
        "constant",
        one_of(("constant", "linear", "cosine")),
        "Learning rate over the steps: constant, linear or cosine (to 0).",
    )
    warmup_steps: int = _setting(8, whole(0), "Optimizer steps over which the learning rate rises.")
    batch_size: int = _setting(64, whole(1), "Examples per optimizer step.")
    micro_batch_size: int | None = _setting(
        None,
        whole(1).or_none,
        "Examples per forward and backward pass (default: the whole batch).",
    )
    steps: int = _setting(120, whole(1), "Optimizer steps.")
    epochs: float | None = _setting(
        None, ABOVE_0.or_none, "Passes over the training data, instead of --steps."
    )
    max_length: int = _setting(64, whole(4), "Tokens per example at most.")
    eval_tokens: int | None = _setting(
        None,
        whole(1).or_none,
        "Padded tokens per forward of validation and test losses at most; changes memory and time, not "
        "the losses (default: 2048 on a CPU, 16384 elsewhere).",
    )
    test_examples: int = _setting(
        1000, whole(0), "Held-out examples for the test loss, which is charged to nobody; 0: none."
    )
    validation_examples: int = _setting(32, whole(1), "Held-out examples Fast Forward searches with.")
    resample_validation: int | None = _setting(
        None,
        whole(1).or_none,
        "Draw the --validation-examples anew before each Fast Forward stage, from so many held out "
        "instead (default: the same in every stage).",
    )
    evaluate_every: int = _setting(10, whole(0), "Optimizer steps between test losses; 0: at both ends.")
    target_loss: float | None = _setting(None, number().or_none, "Stop at this test loss (default: no).")
    checkpoint_every: int = _setting(0, whole(0), "Optimizer steps between checkpoints; 0: at the end.")
    fast_forward: FastForwardConfig | None = None
    seed: int = _setting(0, whole(0), "Of data split and order, adapter and dropout.")
    device: str = _setting("auto", _TEXT, "auto, cpu, cuda, cuda:1, …")
    dtype: str = _setting(
        "float32",
        one_of(("float32", "bfloat16", "float16")),
        "Of the frozen base model: float32, bfloat16 or float16; what trains is float32.",
    )
    threads: int | None = _setting(None, whole(1).or_none, "CPU threads (default: torch's choice).")

    def __post_init__(self) -> None:
        for one in fields(self):
            check(one.name, getattr(self, one.name), one.metadata.get("rule", _STAGES))
        least, untested = self.validation_examples, self.test_examples == 0
        self._require(
            "resample_validation",
            f"an integer of at least validation_examples={least}, or None",
            self.resample_validation is None or self.resample_validation >= least,
        )
        if self.data is None or untested:
            self._require(
                "test_data", "None without data, and where test_examples is 0", self.test_data is None
            )
        if untested:
            self._require("target_loss", "None where test_examples is 0", self.target_loss is None)
        if self.method not in ADAPTERS:
            trained = f"with method={self.method!r}, which trains the model's own weights"
            self._require("dtype", f"'float32' {trained}", self.dtype == "float32")
            self._require("optimizer", f"'adamw' {trained}: no B matrices", self.optimizer == "adamw")
        if self.targets is not None:
            object.__setattr__(self, "targets", tuple(self.targets))

    def _require(self, name: str, allowed: str, good: bool) -> None:
        check(name, getattr(self, name), Rule(lambda value: good, allowed))

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
        mine = dict(self.to_dict(), steps=steps)
        free = _FREE_ON_RESUME | ({"steps"} if self.schedule == "constant" else set())
        differing = sorted(k for k in mine.keys() - free if mine[k] != saved[k])
        if differing:
            given = ", ".join(f"{k}={mine[k]!r} (saved: {saved[k]!r})" for k in differing)
            raise ValueError(
                f"cannot resume run {self.name!r} with other settings: {given}; "
                "use the saved ones, or start a run of another name"
            )
