"""Every Triton kernel compiled for three GPU generations without a GPU, and its machine code read."""

import itertools
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

from ffkernels.ops.plan import DTYPE_CODES, GPU_CHUNK, SEGMENT

triton = pytest.importorskip("triton", reason="triton is not installed")

ARCHITECTURES = [80, 90, 100]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THREADS_OF_A_WARP = 32
# Unmasked 128-bit accesses per row: (loads, stores) of each operand that the code contains.
WIDE = {"checkpoint": (1, 1), "delta": (2, 2), "step": (3, 3)}
# What the kernels get beside the rows, and which of it the launcher aligns.
ARGUMENTS = {
    "step": {"accept_ptr": "*i32", "k_ptr": "*fp32", "minus_zero": "fp32"},
    "align": {
        **{"places": "*i64", "gradients": "*i64", "scratch": "*fp64", "tickets": "*i32", "out": "*fp64"},
        **{"count": "i32", "first": "i32"},
    },
}
ALIGNED = ["rows", "gradients", "scratch", "tickets"]


@dataclass
class Machine:
    """What a compiled kernel is made of."""

    ptx: str
    registers: int
    stack: int
    local: int
    instructions: list[str]  # as "LDG.E.128 R4, desc[UR6][R2.64]", predicates cut off
    open_calls: list[str]  # functions that the driver must fill in when it loads the kernel

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
    return Machine(ptx, registers, stack, local, instructions, undefined_functions(cubin))


def undefined_functions(elf: bytes) -> list[str]:
    """Names of the functions in the symbol table that no section defines."""
    (offset,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    (symbols,) = (section for section in sections if section[1] == 2)  # SHT_SYMTAB
    names, found = sections[symbols[6]][4], []
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", elf, at)
        if section == 0 and info & 15 == 2:  # STT_FUNC
            found.append(elf[names + name : elf.index(b"\0", names + name)].decode())
    return found


@pytest.fixture(scope="session")
def move(compiled, tmp_path_factory):
    """Compiles a weight move as its launcher would."""
    ops = compiled("triton_ops")

    @cache
    def build(name, architecture, dtype) -> Machine:
        arguments = {"rows": "*i64"} | ARGUMENTS.get(name, {})
        constants = {"DTYPE": ops._DTYPES[dtype], "BLOCK": GPU_CHUNK}
        if name == "align":
            constants |= {"CODE": DTYPE_CODES[dtype], "SEGMENT": SEGMENT}
        kernel = getattr(ops, f"_{name}_kernel")
        aligned = [argument for argument in ALIGNED if argument in arguments]
        return compile_for(kernel, architecture, arguments, constants, ops.WARPS, aligned=aligned)

    build.threads = ops.WARPS * THREADS_OF_A_WARP
    return build


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", WIDE)
def test_moves(move, name, architecture, dtype):
    code = move(name, architecture, dtype)
    each = GPU_CHUNK // move.threads // (16 // dtype.itemsize)
    assert (code.opcodes["LDG.E.128"], code.opcodes["STG.E.128"]) == tuple(n * each for n in WIDE[name])
    assert code.stack == code.local == code.count("LDL", "STL") == 0, "nothing spills"
    assert code.count("LD.", "ST.") == 0, "generic accesses look up which memory they are in"
    assert code.count("LDS", "STS") == 0, "no element needs another thread"
    assert code.registers <= 32, "65,536 registers for 2,048 threads: a multiprocessor can be full"
    narrow = "LDG.E" if dtype == torch.float32 else "LDG.E.U16"
    assert code.opcodes[narrow] > 0 < code.opcodes[narrow.replace("LDG", "STG")], "single elements"
    (block,) = re.findall(r"mov\.u32\s+(%r\d+), %ctaid\.x;", code.ptx)
    uses = re.findall(rf"^\s*([\w.]+)\s+.*, {block}\b", code.ptx, re.MULTILINE)
    assert uses and all(re.match(r"(mul|mad)\.wide|cvt\.[us]64", use) for use in uses), "64-bit addresses"


# Each takes a second: float16 and float64 on one architecture are enough.
ALIGN = [*itertools.product(ARCHITECTURES, DTYPES[:2]), (90, torch.float16), (90, torch.float64)]


@pytest.mark.parametrize(("architecture", "dtype"), ALIGN, ids=str)
def test_alignment(move, architecture, dtype):
    code = move("align", architecture, dtype)
    each = GPU_CHUNK // move.threads // (16 // dtype.itemsize)
    assert (code.opcodes["LDG.E.128"], code.opcodes["STG.E.128"]) == (3 * each, each)
    assert code.stack == code.local == code.count("LDL", "STL", "LD.", "ST.") == 0
    assert code.registers <= 64  # 1,024 threads on a multiprocessor, 96 KiB of loads on their way
    assert code.opcodes["DMUL"] == 3 * (GPU_CHUNK // move.threads + 2), "three products on either path"
    assert code.count("DFMA", "FFMA", "FMUL", "HFMA2", "HMUL2") == 0, "in float64, none contracted"
    # The last program sees what the others wrote: a barrier, all stores in sight of the GPU, the ticket, and
    # nothing stale left in the cache.
    wanted = ("BAR.SYNC", "MEMBAR", "ATOMG", "CCTL.IVALL")
    order = " ".join(name for line in code.instructions for name in wanted if line.startswith(name))
    assert order.count("BAR.SYNC MEMBAR ATOMG CCTL.IVALL") == order.count("ATOMG") == 2


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


STATE = {"begin": {"fresh": "*i64", "largest_ptr": "*fp32"}}
STATE["decide"] = dict.fromkeys(("loss_ptr", "sums", "best", "examples"), "*fp64")


@pytest.fixture(scope="session")
def search(compiled):
    """Compiles the begin of a search (where `parabolic` is None) or a decision as its launcher would."""
    decide = compiled("decide")

    @cache
    def build(architecture, parabolic, condition) -> Machine:
        name = "begin" if parabolic is None else "decide"
        signature = {"state": "*i64", **STATE[name], "handle": "i64"}
        constants = {"CONDITION": condition} | ({} if parabolic is None else {"PARABOLIC": parabolic})
        libraries = {"extern_libs": decide.CONDITION_LIBRARY} if condition else {}
        kernel = getattr(decide, f"_{name}_kernel")
        return compile_for(kernel, architecture, signature, constants, 1, **libraries)

    return build


@pytest.mark.parametrize("condition", [False, True], ids=["plain", "in a WHILE node"])
@pytest.mark.parametrize("parabolic", [False, True], ids=["linear", "parabolic"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decisions_compile_to_plain_float64(search, architecture, parabolic, condition, tmp_path):
    code = search(architecture, parabolic, condition)
    assert code.stack == code.local == 0 and code.registers <= 128
    assert code.count("LDL", "STL", "LD.", "ST.") == 0
    assert ("cudaGraphSetConditional" in code.ptx) is condition
    arithmetic = set(re.findall(r"\b(add|sub|mul|div|fma|min|max)((?:\.\w+)*\.f(?:16|32|64))", code.ptx))
    expected = {("add", ".rn.f64"), ("sub", ".rn.f64"), ("mul", ".rn.f64"), ("div", ".rn.f64")}
    assert arithmetic == (expected if parabolic else set()), "rounded, not contracted, never in float32"
    # A contracted sum would be missing from the machine code; where loops are unrolled, sums are there often.
    assert sums_in_float64(code) >= len(re.findall(r"\b(?:add|sub)\.rn\.f64", code.ptx))
    if parabolic:
        ptx = code.ptx.replace(".address_size 64\n", '.address_size 64\n.pragma "nounroll";\n')
        target = re.search(r"\.target sm_(\w+)", ptx).group(1)
        assert assemble(ptx, architecture, tmp_path, target).returncode == 0
        rolled = read((tmp_path / "kernel.cubin").read_bytes(), ptx)
        assert sums_in_float64(rolled) == len(re.findall(r"\b(?:add|sub)\.rn\.f64", ptx))


def sums_in_float64(code: Machine) -> int:
    """Those with RZ are absolute values."""
    return sum(line.startswith("DADD") and "RZ" not in line for line in code.instructions)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_constants_of_the_search_keep_their_64_bits(search, compiled, architecture):
    decide = compiled("decide")
    ptx = search(architecture, True, False).ptx
    for value in (decide.GOLDEN.value, decide.REFINE_TOLERANCE.value):
        assert "0d" + struct.pack(">d", value).hex().upper() in ptx


@pytest.mark.parametrize("condition", [False, True], ids=["plain", "for a WHILE node"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_search_begins_with_one_store(search, architecture, condition):
    code = search(architecture, None, condition)
    assert code.stack == code.local == 0
    assert code.count("LDL", "STL", "LD.", "ST.", "LDS", "STS") == 0
    assert code.count("STG") == 1


def sets_condition_once(code: Machine) -> None:
    """One call in all, which every thread but the first jumps over, and nothing else is left open."""
    assert code.open_calls == ["cudaGraphSetConditional"]
    # Calls within the kernel, as to its division, are relative.
    assert code.count("CALL.ABS") == code.ptx.count("call.uni") == 1
    threads = "|".join(re.findall(r"mov\.u32\s+(%r\d+), %tid\.x;", code.ptx))
    before, after = code.ptx.split("call.uni")
    guard = rf"setp\.ne\.b32\s+(%p\d+), (?:{threads}), 0;\s+@\1 bra\s+(\S+);"
    _, end = re.findall(guard, before)[-1]
    rest, _, _ = after.partition("ret;")
    assert f"{end}:" in rest and not re.search(r"\bbra\b", rest), "from the call straight to the end"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_thread_sets_the_condition_once(search, architecture):
    for parabolic in (None, False, True):
        sets_condition_once(search(architecture, parabolic, True))
    for parabolic in (None, True):
        assert search(architecture, parabolic, False).open_calls == []


def assemble(
    ptx: str, architecture: int, tmp_path: Path, target: str | None = None
) -> subprocess.CompletedProcess:
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(ptx)
    newer = architecture >= 100 or ".version 9" in ptx
    ptxas = tool("ptxas-blackwell" if newer else "ptxas")
    command = [ptxas, f"-arch=sm_{target or architecture}", str(source), "-o", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_beside_leaves_one_call_to_the_driver(architecture, tmp_path):
    from ffkernels.ops.condition import PTX

    assert assemble(PTX, architecture, tmp_path).returncode == 0
    code = read((tmp_path / "kernel.cubin").read_bytes(), PTX)
    assert code.open_calls == ["cudaGraphSetConditional"] and code.count("CALL.ABS") == 1
    # The assembler knows this name as one that the driver has; any other it wants to see defined.
    unknown = assemble(PTX.replace("cudaGraphSetConditional", "nobodyKnowsThis"), architecture, tmp_path)
    assert unknown.returncode != 0 and "nobodyKnowsThis" in unknown.stderr


class NoDriver:
    """Triton's driver for a GPU that is not there: everything up to the launch happens, which is recorded."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.launches, self.utils = GPUTarget("cuda", architecture, 32), [], self

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device) -> int:
        return 0

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": 1 << 16}

    def load_binary(self, name, cubin, shared, device) -> tuple:
        return object(), 0, 32, 0, 1024

    def unload_module(self, module) -> None:
        pass

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches.append((x * y * z, dict(source.signature), arguments))

        return launch


@pytest.fixture
def launched(compiled, monkeypatch):
    """The decisions as launched on a GPU, up to the driver: (programs, signature, arguments) of each."""
    from triton.runtime import driver

    decide, gpu = compiled("decide"), NoDriver(90)
    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(decide.condition, "inside", lambda device: True)
    for kernel in (decide._begin_kernel, decide._decide_kernel):
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    return decide, gpu


@pytest.mark.parametrize("name", ["linear", "parabolic"])
def test_what_was_prepared_is_all_that_is_launched(launched, name):
    """Whatever the handle: nothing is left to be compiled while a graph is captured."""
    decide, gpu = launched
    state = decide.DecideState(name, 8, "cpu", rows=5)
    before = state._memory.clone()

    def built() -> int:
        return sum(len(k.device_caches[0][0]) for k in (decide._begin_kernel, decide._decide_kernel))

    decide.prepare(state)
    assert built() == 2
    decide.prepare(state, with_condition=True)
    assert built() == 4
    assert {programs for programs, *_ in gpu.launches} == {0}, "prepared, not run"
    assert torch.equal(state._memory, before)
    gpu.launches.clear()

    largest, loss = torch.ones(3)[1], torch.ones(4, dtype=torch.float64)[3]  # other addresses than prepared
    sums = torch.ones(9, dtype=torch.float64)[3:8]
    handles = [None, 0, 1, 16, 1 << 31, 1 << 40, (1 << 63) + 5, (1 << 64) - 1]
    for handle in handles:
        decide.begin(state, largest, handle)
        decide.decide(state, loss, sums, handle)
    assert built() == 4
    assert {signature["handle"] for _, signature, _ in gpu.launches} == {"i64"}
    given = [handle for handle in handles for _ in range(2)]
    for (programs, signature, arguments), handle in zip(gpu.launches, given, strict=True):
        assert programs == 1
        passed = arguments[list(signature).index("handle")]
        assert passed % (1 << 64) == (handle or 0) and -(1 << 63) <= passed < 1 << 63
