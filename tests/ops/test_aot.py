"""Every Triton kernel compiled for three GPU generations without a GPU, and its machine code read."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
import torch

from ffkernels.ops.table import GPU_CHUNK

triton = pytest.importorskip("triton", reason="triton is not installed")

ARCHITECTURES = [80, 90, 100]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THREADS_OF_A_WARP = 32
# Unmasked 128-bit accesses per row: (loads, stores) of each operand that the code contains.
WIDE = {"checkpoint": (1, 1), "delta": (2, 2), "step": (3, 3)}


@dataclass
class Machine:
    """What a compiled kernel is made of."""

    ptx: str
    registers: int
    stack: int
    local: int
    instructions: list[str]  # as "LDG.E.128 R4, desc[UR6][R2.64]", predicates cut off

    @cached_property
    def opcodes(self) -> Counter:
        return Counter(line.split()[0] for line in self.instructions)

    def count(self, *prefixes: str) -> int:
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefixes))


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_for(kernel, architecture, signature, constants, warps, aligned=(), **options) -> Machine:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options |= {"num_warps": warps, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return read(built.asm["cubin"], built.asm["ptx"])


def read(cubin: bytes, ptx: str) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack, local = (
        int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL")
    )
    # As in "        /*0040*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;"
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", sass, re.MULTILINE)
    return Machine(ptx, registers, stack, local, instructions)


@pytest.fixture(scope="session")
def move(compiled, tmp_path_factory):
    """Compiles a weight move as its launcher would."""
    ops = compiled("triton_ops")

    @cache
    def build(name, architecture, dtype) -> Machine:
        arguments = {"rows": "*i64"}
        if name == "step":
            arguments |= {"accept_ptr": "*i32", "k_ptr": "*fp32", "minus_zero": "fp32"}
        return compile_for(
            getattr(ops, f"_{name}_kernel"),
            architecture,
            arguments,
            {"DTYPE": ops._DTYPES[dtype], "BLOCK": GPU_CHUNK},
            ops.WARPS,
            aligned=["rows"],
        )

    build.threads = ops.WARPS * THREADS_OF_A_WARP
    return build


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", WIDE)
class TestMoves:
    def test_full_rows_move_in_128_bit_accesses(self, move, name, architecture, dtype):
        code = move(name, architecture, dtype)
        each = GPU_CHUNK // move.threads // (16 // dtype.itemsize)
        loads, stores = WIDE[name]
        assert code.opcodes["LDG.E.128"] == loads * each
        assert code.opcodes["STG.E.128"] == stores * each

    def test_nothing_spills_and_every_address_is_global(self, move, name, architecture, dtype):
        code = move(name, architecture, dtype)
        assert code.stack == code.local == 0
        assert code.count("LDL", "STL") == 0
        assert code.count("LD.", "ST.") == 0, "generic accesses look up which memory they are in"
        assert code.count("LDS", "STS") == 0, "no element needs another thread"

    def test_a_multiprocessor_can_be_full_of_threads(self, move, name, architecture, dtype):
        assert move(name, architecture, dtype).registers <= 32  # 65,536 registers for 2,048 threads

    def test_narrow_rows_move_single_elements(self, move, name, architecture, dtype):
        code = move(name, architecture, dtype)
        width = "LDG.E" if dtype == torch.float32 else "LDG.E.U16"
        assert code.opcodes[width] > 0
        assert code.opcodes[width.replace("LDG", "STG")] > 0

    def test_row_addresses_are_64_bit(self, move, name, architecture, dtype):
        ptx = move(name, architecture, dtype).ptx
        (block,) = re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.x;", ptx)
        uses = re.findall(rf"^\s*([\w.]+)\s+.*, {block}\b", ptx, re.MULTILINE)
        assert uses and all(re.match(r"(mul|mad)\.wide|cvt\.[us]64", use) for use in uses)


def singles_and_pairs(code: Machine, *names: str) -> int:
    """Arithmetic on elements: packed instructions (the 2 of FADD2) work on two."""
    return sum(
        n * (2 if re.match(r"\w+2(\.|$)", op) else 1)
        for op, n in code.opcodes.items()
        if op.startswith(names)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_product_of_a_step_is_rounded_before_its_sum(move, architecture, dtype):
    """Contracted, a product and its sum would be one instruction, and the sums fewer than the products."""
    code = move("step", architecture, dtype)
    products = singles_and_pairs(code, "FMUL", "FFMA")
    sums = singles_and_pairs(code, "FADD", "FHADD")
    assert products == sums >= GPU_CHUNK // move.threads


@pytest.fixture(scope="session")
def search(compiled):
    """Compiles the decision as its launcher would."""
    decide = compiled("decide")

    @cache
    def build(architecture, parabolic, condition) -> Machine:
        return compile_for(
            decide._decide_kernel,
            architecture,
            {"state": "*i64", "loss_ptr": "*fp64", "handle": "i64"},
            {"PARABOLIC": parabolic, "CONDITION": condition},
            1,
            **({"extern_libs": decide.CONDITION_LIBRARY} if condition else {}),
        )

    return build


@pytest.mark.parametrize("condition", [False, True], ids=["plain", "in a WHILE node"])
@pytest.mark.parametrize("parabolic", [False, True], ids=["linear", "parabolic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decisions_compile_to_plain_float64(search, architecture, parabolic, condition):
    code = search(architecture, parabolic, condition)
    assert code.stack == code.local == 0 and code.registers <= 128
    assert code.count("LDL", "STL", "LD.", "ST.") == 0
    assert ("cudaGraphSetConditional" in code.ptx) is condition
    arithmetic = set(re.findall(r"\b(add|sub|mul|div|fma|min|max)((?:\.\w+)*\.f(?:16|32|64))", code.ptx))
    expected = {("add", ".rn.f64"), ("sub", ".rn.f64"), ("mul", ".rn.f64"), ("div", ".rn.f64")}
    assert arithmetic == (expected if parabolic else set()), "rounded, not contracted, never in float32"
    # A contracted sum would be missing from the machine code. Sums with RZ are absolute values.
    sums = [line for line in code.instructions if line.startswith("DADD") and "RZ" not in line]
    assert len(sums) == len(re.findall(r"\b(?:add|sub)\.rn\.f64", code.ptx))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_constants_of_the_search_keep_their_64_bits(search, compiled, architecture):
    decide = compiled("decide")
    ptx = search(architecture, True, False).ptx
    for value in (decide.GOLDEN.value, decide.REFINE_TOLERANCE.value):
        assert "0d" + struct.pack(">d", value).hex().upper() in ptx
