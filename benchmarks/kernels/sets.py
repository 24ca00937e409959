"""The sets of adapter tensors that weight moves are measured on: shapes of real models, no weights needed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import prod

import torch

Shapes = tuple[tuple[int, ...], ...]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class AdapterSet:
    """Shapes of all trainable tensors, in the order in which a model has them."""

    name: str
    shapes: Shapes

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes))


def lora(
    name: str, layers: int, linears: dict[str, tuple[int, int]], rank: int, dora: bool = False
) -> AdapterSet:
    """A and B of every linear layer (in, out) in every block; DoRA adds a magnitude per output."""
    block: list[tuple[int, ...]] = []
    for inputs, outputs in linears.values():
        block += [(rank, inputs), (outputs, rank), *([(outputs,)] if dora else [])]
    return AdapterSet(name, tuple(block * layers))


PYTHIA, LLAMA = "Pythia-1.4B r=8", "Llama-3-8B r=64"
PYTHIA_1_4B = {"query_key_value": (2048, 6144)}
LLAMA_3_8B = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}


def small_tensors(count: int) -> AdapterSet:
    """Many tensors of at most a few hundred elements: all overhead, hardly any bytes."""
    draw = random.Random(0)
    return AdapterSet(f"{count:,} small tensors", tuple((draw.randint(1, 512),) for _ in range(count)))


def all_sets() -> list[AdapterSet]:
    return [
        lora(PYTHIA, 24, PYTHIA_1_4B, 8),
        lora("Pythia-1.4B r=64", 24, PYTHIA_1_4B, 64),
        lora("Llama-3-8B r=8", 32, LLAMA_3_8B, 8),
        lora(LLAMA, 32, LLAMA_3_8B, 64),
        lora("Llama-3-8B r=16 DoRA", 32, LLAMA_3_8B, 16, dora=True),
        small_tensors(10_000),
    ]


def dry_sets() -> list[AdapterSet]:
    """The same kinds in small, for a machine on which only the flow is looked at."""
    return [
        lora("LoRA, small", 2, {"q": (64, 64), "v": (64, 48)}, 4),
        lora("DoRA, small", 2, {"q": (64, 64)}, 4, dora=True),
        small_tensors(100),
    ]


def random_tensors(shapes: Shapes, seed: int = 0, device: torch.device = CPU) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]
