"""Pretrain the embedded model: a byte-level GPT-NeoX (d=128, 4 layers, 4 heads) on plain English.

    python -m tools.pretrain_tiny --fetch build/corpus     # Debian: apt-get download, unpack; no install
    python -m tools.pretrain_tiny --corpus build/corpus    # train; writes ffkernels/data/tiny/

All it reads is text from Debian packages (bookworm's versions made the embedded weights) that is free to use:

    package              text                                      licence of the text
    r-cran-janeaustenr   Jane Austen's six novels                  public domain (the package: MIT)
    dict-jargon          the Jargon File 4.4.7                     public domain
    dict-devil           Ambrose Bierce, The Devil's Dictionary    public domain
    wordnet-base         WordNet 3.0, definitions and examples     WordNet licence (permissive),
                                                                   (c) 2006 Princeton University

    usr/lib/R/site-library/janeaustenr/data/Rdata.rdb      usr/share/dictd/jargon.dict.dz
    usr/share/wordnet/data.{adj,adv,noun,verb}             usr/share/dictd/devil.dict.dz

--corpus may also name a root where they are installed (`/`). None of this text is stored in this repository,
only weights. No Python source is among it: the model meets the fine-tuning task when it is fine-tuned.

Documents (novel chapters, dictionary entries, runs of 40 definitions) are shuffled with the seed, joined by
the end token and cut into blocks; one block in a hundred is held out for the loss that is reported. The same
seed, thread count, torch version and kind of CPU give the same weights.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import re
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks import ROOT
from ffkernels.training.tokenizer import ByteTokenizer

PACKAGES = ("r-cran-janeaustenr", "dict-jargon", "dict-devil", "wordnet-base")
AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
JARGON = "usr/share/dictd/jargon.dict.dz"
DEVIL = "usr/share/dictd/devil.dict.dz"
WORDNET = "usr/share/wordnet"


def fetch(directory: Path) -> None:
    """Download the packages with apt and unpack them below ``directory``; nothing is installed."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} is not here; on another system unpack {', '.join(PACKAGES)} (Debian) by hand."
            )
    packages = directory / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
    for package in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(package), str(directory)], check=True)
        print(f"unpacked {package.name}")


def r_text_vectors(path: Path) -> Iterator[list[str]]:
    """The character vectors in an R lazy-load database: zlib-compressed objects, each after its length."""
    data = path.read_bytes()
    while data:
        decoder = zlib.decompressobj()
        record = decoder.decompress(data[4:])
        data = decoder.unused_data
        # "X\n" (XDR), format version 3, the writer's and oldest reader's version, encoding, the object.
        if record[:6] != b"X\n\0\0\0\x03":
            raise ValueError(f"{path} holds a record that is not R's XDR serialisation, version 3.")
        at = 18 + struct.unpack_from(">i", record, 14)[0]
        kind, count = struct.unpack_from(">ii", record, at)
        if kind & 0xFF != 16:
            continue
        at, lines = at + 8, []
        for _ in range(count):
            _flags, length = struct.unpack_from(">ii", record, at)
            at += 8
            lines.append(record[at : at + max(length, 0)].decode("utf-8"))
            at += max(length, 0)
        yield lines


def novels(root: Path) -> list[str]:
    """Chapters."""
    chapters = []
    for lines in r_text_vectors(root / AUSTEN):
        text = "\n".join(line.rstrip() for line in lines)
        chapters += re.split(r"(?im)^(?=(?:volume|chapter) [ivxlc\d]+\b)", text)
    return [chapter.strip() for chapter in chapters if len(chapter) > 500]


def dictionary(path: Path) -> list[str]:
    """Entries: paragraphs joined to their headword, which alone starts at the margin."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    entries = re.split(r"\n(?=\S)", text)
    return [re.sub(r"(?m)^ {4}", "", entry).strip() for entry in entries if len(entry) > 40]


def definitions(root: Path, rng: random.Random) -> list[str]:
    """Runs of 40 lines "word, synonym: definition; example"."""
    lines = []
    for part in ("adj", "adv", "noun", "verb"):
        for line in (root / WORDNET / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or "|" not in line:  # the licence at the top of the file
                continue
            fields, gloss = line.split("|", 1)
            fields = fields.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            words = [re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in words]
            lines.append(f"{', '.join(words)}: {gloss.strip()}.")
    rng.shuffle(lines)
    lines = lines[: len(lines) * 2 // 5]  # so that running prose is the larger part of the corpus
    return ["\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]


def read_corpus(root: Path, seed: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(training blocks, held-out blocks), int16 of shape (blocks, block + 1)."""
    needed = (AUSTEN, JARGON, DEVIL, f"{WORDNET}/data.noun")
    missing = [name for name in needed if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"--corpus {root} lacks {', '.join(missing)}; run with --fetch DIR first, then --corpus DIR."
        )
    rng = random.Random(seed)
    parts = {
        "novels": novels(root),
        "jargon": dictionary(root / JARGON),
        "devil": dictionary(root / DEVIL),
        "definitions": definitions(root, rng),
    }
    for name, documents in parts.items():
        print(f"{name:12} {len(documents):6} documents {sum(map(len, documents)):10} characters")
    documents = [document for part in parts.values() for document in part]
    rng.shuffle(documents)
    tokenizer = ByteTokenizer()
    tokens = (tokenizer.encode(document, add_special_tokens=True) for document in documents)
    stream = torch.tensor([token for document in tokens for token in document], dtype=torch.int16)
    blocks = stream[: len(stream) // (block + 1) * (block + 1)].view(-1, block + 1)
    held_out = torch.arange(len(blocks)) % 100 == 99
    return blocks[~held_out], blocks[held_out]


def configuration(context: int) -> GPTNeoXConfig:
    tokenizer = ByteTokenizer()
    return GPTNeoXConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=context,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )


def nats_per_token(model: GPTNeoXForCausalLM, blocks: torch.Tensor) -> torch.Tensor:
    blocks = blocks.long()
    logits = model(input_ids=blocks[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPTNeoXForCausalLM, blocks: torch.Tensor) -> float:
    losses = [nats_per_token(model, part) * len(part) for part in blocks.split(64)]
    return float(sum(losses)) / len(blocks)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train, held_out = read_corpus(args.corpus, args.seed, args.context)
    model = GPTNeoXForCausalLM(configuration(args.context))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {train.numel()} training tokens")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    order = torch.Generator().manual_seed(args.seed)
    queue = torch.empty(0, dtype=torch.long)
    start, loss = time.perf_counter(), float("nan")
    for step in range(args.steps):
        if len(queue) < args.batch:  # an epoch visits every block once; the odd rest starts the next one
            queue = torch.cat([queue, torch.randperm(len(train), generator=order)])
        batch, queue = train[queue[: args.batch]], queue[args.batch :]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        loss = nats_per_token(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step == 0:
            seconds = time.perf_counter() - start
            print(f"step {step + 1:5} train {loss.item():.4f} {seconds:6.0f} s", flush=True)
        if step % 500 == 499:
            print(f"step {step + 1:5} held-out {held_out_loss(model, held_out):.4f} nats/byte", flush=True)
    save(model, args.out, held_out_loss(model, held_out))


def save(model: GPTNeoXForCausalLM, directory: Path, loss: float) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)  # nothing in it but the end token's number
    (directory / "model.safetensors").chmod(0o644)
    config = json.loads((directory / "config.json").read_text())
    config.pop("transformers_version", None)  # the weights load in every version the package allows
    config["tokenizer_class"] = ByteTokenizer.__name__  # what load_model() recognises a copy by
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = (directory / "model.safetensors").stat().st_size
    if size > 4 * 2**20:
        raise RuntimeError(f"model.safetensors has {size} bytes; the package allows 4 MiB.")
    print(f"held-out loss {loss:.4f} nats/byte; {size} bytes in {directory}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--fetch", type=Path, metavar="DIR", help="download and unpack the corpus packages, then stop")
    add("--corpus", type=Path, default=Path("/"), metavar="DIR", help="root below which they lie [/]")
    add("--out", type=Path, default=ROOT / "ffkernels/data/tiny", metavar="DIR")
    for name, default, what in (
        ("steps", 2400, "optimizer steps"),
        ("batch", 16, "blocks per step"),
        ("context", 256, "tokens per block, and the model's context"),
        ("lr", 3e-3, "peak learning rate"),
        ("warmup", 100, "warm-up steps"),
        ("weight-decay", 0.1, "on matrices"),
        ("threads", 2, "torch threads"),
        ("seed", 0, "of the weights and of the order"),
    ):
        add(f"--{name}", type=type(default), default=default, help=f"{what} [%(default)s]")
    args = parser.parse_args()
    if args.fetch is not None:
        fetch(args.fetch)
    else:
        pretrain(args)


if __name__ == "__main__":
    main()
