"""A training run on disk: adapter or model for its users, and one state file from which the run continues.

    <out>/<name>.jsonl          the run log
    <out>/<name>/adapter_*      what ``PeftModel.from_pretrained`` loads; or, where the model's own weights
                                train, the whole model with its tokenizer for ``from_pretrained``
    <out>/<name>/state.pt       trainable weights, optimizer, random generators, Fast Forward, counters, clock

Every file is written beside its place and then moved there, so that an interruption leaves the old one or
the new one. ``state.pt`` holds tensors and plain values only and is read with ``weights_only=True``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffkernels.reporting.written import written

STATE_VERSION = 1
TRAINED = ("adapter_*", "model*.safetensors*")  # weights, and what belongs to them


def state_path(folder: Path) -> Path:
    return folder / "state.pt"


def save_model(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write a PEFT model's adapter files into ``folder``; of another model the whole, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = hasattr(model, "peft_config")
    with written(folder, Exception), tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as writing:
        if adapter:
            model.save_pretrained(writing)
        else:
            before, model.config.use_cache = model.config.use_cache, True  # switched off for training alone
            try:
                model.save_pretrained(writing)
            finally:
                model.config.use_cache = before
            if hasattr(tokenizer, "save_pretrained"):  # the embedded model's bytes are in its config
                tokenizer.save_pretrained(writing)
        for path in sorted(Path(writing).glob("**/adapter_*" if adapter else "*")):
            target = folder / path.relative_to(writing)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def save_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, **plain: Any
) -> Path:
    """Write ``state.pt``: everything that continues the run bit for bit; ``plain`` are the caller's own
    values."""
    state = {
        "version": STATE_VERSION,
        "weights": {name: p.detach().cpu().clone() for name, p in _training(model).items()},
        "optimizer": optimizer.state_dict(),
        "random": {
            "cpu": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
        **plain,
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = state_path(folder)
    writing = target.with_suffix(".pt.writing")
    try:
        with written(target, Exception), open(writing, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, target)
    finally:
        writing.unlink(missing_ok=True)
    return target


def on_disk(folder: Path) -> str:
    """What a run that has ended too early can go on from, in a sentence."""
    try:
        state = torch.load(state_path(folder), map_location="cpu", weights_only=True, mmap=True)
        step = state["progress"]["optimizer_steps"]
    except Exception:  # none, or one that ``load_state`` will complain about
        files = sorted(path for kind in TRAINED for path in folder.glob(kind))
        kept = f" What it trained is in {folder}." if files else ""
        return f"Nothing is saved that this run could go on from.{kept}"
    return f"The state after step {step} is in {folder}: go on with the same command and --resume."


def load_state(folder: Path) -> dict[str, Any]:
    """Read ``state.pt``.

    Raises:
        ValueError: when there is none, or it is not one of this version.
    """
    path = state_path(folder)
    if not path.is_file():
        raise ValueError(f"nothing to resume: {path} does not exist; start the run without resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it and start the run again") from error
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        raise ValueError(f"{path} was not written by this version; delete it and start the run again")
    return state


def _training(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def restore(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """Put weights, optimizer and random generators back. The counters in ``state`` are the caller's."""
    weights = _training(model)
    if weights.keys() != state["weights"].keys():
        odd = sorted(weights.keys() ^ state["weights"].keys())
        raise ValueError(f"the saved run trained other tensors: {odd[0]!r} and {len(odd) - 1} more differ")
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"]["cpu"])
    if device.type == "cuda" and state["random"]["device"] is not None:
        torch.cuda.set_rng_state(state["random"]["device"], device)


def discard(folder: Path) -> None:
    """Delete an earlier run's files, so that nobody resumes it by mistake."""
    state_path(folder).unlink(missing_ok=True)
    for pattern in ("config.json", "adapter_config.json", *TRAINED):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
