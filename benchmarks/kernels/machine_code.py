"""What the Triton kernels compile to, and what they would with other choices: no GPU is needed.

    python -m benchmarks.kernels.machine_code --out benchmarks/results     writes a dated JSON, prints a table

Every variant is the shipped `ops/triton_ops.py` with one thing changed, compiled for three GPU generations.
Counts are of instructions in the machine code, not of instructions executed: a kernel holds its wide path
(full aligned rows) and its narrow path (masked single elements) side by side.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import ROOT, record, tables

sys.path.insert(0, str(ROOT / "tests" / "ops"))

import test_aot as aot  # reads machine code
import torch
import triton

from ffkernels.ops.plan import GPU_CHUNK


@dataclass(frozen=True)
class Variant:
    """The shipped kernels with another size, or with a piece of their source replaced."""

    name: str
    block: int = GPU_CHUNK
    warps: int = 8
    replace: tuple[tuple[str, str], ...] = ()
    kernels: tuple[str, ...] = ("step",)
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16))


VARIANTS = [
    Variant("shipped", kernels=("checkpoint", "delta", "step"), dtypes=tuple(aot.DTYPES)),
    *(
        Variant(f"block {block}, {warps} warps", block, warps)
        for block in (1024, 2048, 4096)
        for warps in (4, 8)
        if (block, warps) != (GPU_CHUNK, 8)
    ),
    Variant("one shape for both paths", replace=(("tl.constexpr(512)", f"tl.constexpr({GPU_CHUNK})"),)),
    Variant("the wide path masked too", replace=(("None if WIDE else i < n", "i < n"),)),
    Variant(
        "no promise of alignment", replace=(("tl.multiple_of(pointer, 16) if WIDE else pointer", "pointer"),)
    ),
    Variant("k·Δ as a plain product", replace=(("tl.fma(change, k, minus_zero)", "k * change"),)),
]


def load(variant: Variant, folder: Path):
    """The kernels' module with the variant's changes, from a file of its own (Triton reads its source)."""
    source = (ROOT / "ffkernels" / "ops" / "triton_ops.py").read_text(encoding="utf-8")
    for old, new in variant.replace:
        if old not in source:
            raise SystemExit(f"variant {variant.name!r}: {old!r} is not in triton_ops.py any more")
        source = source.replace(old, new)
    path = folder / f"kernels_{re.sub(r'[^a-z0-9]+', '_', variant.name)}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(variant: Variant, folder: Path) -> list[dict]:
    ops, found = load(variant, folder), []
    for kernel in variant.kernels:
        for architecture in aot.ARCHITECTURES:
            for dtype in variant.dtypes:
                code = aot.compile_for(
                    getattr(ops, f"_{kernel}_kernel"),
                    architecture,
                    {"rows": "*i64"} | aot.ARGUMENTS.get(kernel, {}),
                    {"DTYPE": ops._DTYPES[dtype], "BLOCK": variant.block},
                    variant.warps,
                    aligned=["rows"],
                )
                narrow = "" if dtype == torch.float32 else ".U16"
                found.append(
                    {
                        **{"variant": variant.name, "kernel": kernel, "architecture": f"sm_{architecture}"},
                        "dtype": str(dtype).removeprefix("torch."),
                        **{"block": variant.block, "warps": variant.warps},
                        "registers": code.registers,
                        "spills": code.count("LDL", "STL"),
                        "instructions": len(code.instructions),
                        "loads_128": code.opcodes["LDG.E.128"],
                        "stores_128": code.opcodes["STG.E.128"],
                        "loads_single": code.opcodes["LDG.E" + narrow],
                        "shared": code.count("LDS", "STS"),
                        "products": aot.singles_and_pairs(code, "FMUL", "FFMA"),
                        "sums": aot.singles_and_pairs(code, "FADD", "FHADD"),
                    }
                )
    return found


def assembler(name: str) -> str:
    text = subprocess.run([aot.tool(name), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V[\d.]+", text).group()


def main() -> None:
    module, name = "kernels.machine_code", "machine_code"
    options = record.parser(module, __doc__, name=f"{name}_triton_{triton.__version__}").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for variant in VARIANTS for row in measure(variant, Path(folder))]
    columns = [key for key in rows[0] if key not in ("block", "warps")]
    print(tables.aligned(columns, [[str(row[key]) for key in columns] for row in rows], len(columns)))
    if options.out:
        result = {**record.provenance(module), "kernels": rows}
        result["versions"] |= {
            "ptxas (sm_80, sm_90)": assembler("ptxas"),
            "ptxas (sm_100)": assembler("ptxas-blackwell"),
        }
        print(record.write(result, options.out, f"{name}_triton_{triton.__version__}"))


if __name__ == "__main__":
    main()
