"""What the tests of the weight moves share: implementations, kernels in each form, dtypes, comparisons."""

import ctypes
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from ffkernels import ops
from ffkernels.ops import build, native, native_cuda, reference
from ffkernels.ops.align import Gradients
from ffkernels.ops.native import NativeLibrary
from ffkernels.ops.plan import DTYPE_CODES, DTYPES, GPU_CHUNK, make_plan

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
INTEGERS = {4: torch.int32, 2: torch.int16}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits, with every NaN made the same: the payload of a computed NaN is nobody's promise."""
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).clone()
    bits[tensor.detach().isnan()] = -1
    return bits


@pytest.fixture
def assert_same_bits():
    def check(found, expected):
        assert len(found) == len(expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape
            differing = int((_bits(a) != _bits(b)).sum())
            assert differing == 0, f"tensor {i} ({a.dtype}, {tuple(a.shape)}): {differing} elements differ"

    return check


@pytest.fixture(scope="session")
def assert_sums():
    """Sums of an alignment, within 2⁻⁴⁶·Σ|terms| of those that are rounded once; best as it was before."""

    def check(sums, weights, grads, best):
        assert sums.dtype == torch.float64 and sums.shape == (3,)
        found = [torch.zeros(3, 0)]
        for weight, grad, base in zip(weights, grads, best, strict=True):
            exact = torch.promote_types(weight.dtype, torch.float32)
            d = (weight.detach().to(exact) - base.to(exact)).double().flatten()
            g = torch.zeros_like(d) if grad is None else grad.detach().double().flatten()
            found.append(torch.stack([g * d, g * g, d * d]))
        for value, terms in zip(sums.tolist(), torch.cat(found, 1).tolist(), strict=True):
            assert abs(value - math.fsum(terms)) <= 2.0**-46 * math.fsum(map(abs, terms))

    return check


@pytest.fixture
def cpp():
    """The name "cpp", where the library is there to be tested."""
    found = ops.available()["cpp"]
    if not found.ok:
        pytest.skip(found.reason)
    return "cpp"


@pytest.fixture(params=["torch", "cpp"])
def impl(request):
    if request.param == "cpp":
        request.getfixturevalue("cpp")
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def isa_restored():
    library = native.load().library
    before = library.ffk_cpu_isa(-1) if library is not None else -1
    yield
    if library is not None:
        library.ffk_cpu_isa(before)


@pytest.fixture
def fresh_native(monkeypatch):
    """Both libraries are looked for anew inside the test, and again after it; notices start afresh."""
    found = (native.load, native_cuda.load, native_cuda.usable)
    monkeypatch.setattr("ffkernels.ops.notices._announced", set())
    for kept in found:
        kept.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for kept in found:
        kept.cache_clear()


def _load(name: str, interpret: bool) -> ModuleType:
    """A copy of its own of `ffkernels.ops.name`: Triton chooses when a kernel is defined."""
    spec = importlib.util.find_spec(f"ffkernels.ops.{name}")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        patch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled():
    """Loads a kernel module for the compiler, whatever the environment says."""
    pytest.importorskip("triton", reason="triton is not installed")
    return lambda name: _load(name, interpret=False)


@pytest.fixture(scope="session")
def interpreted():
    """Loads a kernel module for the interpreter, in which bfloat16 rounds as on a GPU.

    Reductions go by halves, in the interpreter's own they go element by element, which takes a minute.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(values, source, target, mode):  # the interpreter's own truncates to bfloat16
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(values.astype(np.float32).reshape(-1)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.astype(np.uint32) << 16
        return convert(values, source, target, mode)

    def by_halves(self, tensors):
        while (half := tensors[0].handle.data.size // 2) > 0:
            parts = [t.handle.data[part] for part in (slice(half), slice(half, None)) for t in tensors]
            types = [t.dtype.scalar for t in tensors] * 2
            tensors = self.combine_fn.fn(*map(self.to_tensor, parts, types))
        return [self.to_tensor(t.handle.data.item(), t.dtype.scalar) for t in tensors]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.ReduceOps, "generic_reduce", by_halves)
        patch.setattr(interpreter, "_convert_float", exact)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are part of the tests
            yield lambda name: _load(name, interpret=True)


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory) -> ctypes.CDLL:
    """The CUDA library of csrc, compiled by the C++ compiler to run on the CPU."""
    compiler = build.find_compiler()
    if compiler is None or not shutil.which(compiler[0]):
        pytest.skip("needs a C++ compiler")
    folder, launches = tmp_path_factory.mktemp("cuda_on_host"), {}
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    includes = [f"-I{HERE / 'cuda_on_host'}", f"-I{CSRC}"]
    for name in build.CUDA_SOURCES:
        source = (CSRC / name).read_text(encoding="utf-8")
        rewritten, launches[name] = re.subn(
            r"(\w+<\w+>)<<<(\w+), (\w+), 0, on>>>(\([^;]*\));", r"ON_HOST(\2, \3, (\1\4));", source
        )
        assert "<<<" not in rewritten
        (folder / f"{name}.cpp").write_text(rewritten, encoding="utf-8")
        # Checked when compiled, not when linked: the stand-in for the checks' runtime is in the header.
        command = [*compiler, *flags, "-fsanitize=alignment", *includes, "-c", f"{name}.cpp"]
        subprocess.run([*command, "-o", f"{name}.o"], cwd=folder, check=True)
    assert launches == {"align_cuda.cu": 4, "step_cuda.cu": 8}
    objects = [f"{name}.o" for name in build.CUDA_SOURCES]
    subprocess.run([*compiler, "-shared", *objects, "-o", "kernels.so"], cwd=folder, check=True)
    opened = ctypes.CDLL(str(folder / "kernels.so"))
    opened.ffk_misaligned_accesses.restype = ctypes.c_int64
    opened.ffk_cuda_error_string.restype = ctypes.c_char_p
    for name, arguments in native_cuda.RECIPE.signatures.items():
        getattr(opened, f"ffk_cuda_{name}").argtypes = arguments
    return opened


@pytest.fixture
def on_host(cuda_on_host, monkeypatch):
    """native_cuda with that library in the place of the real one, and no GPU's stream to ask for."""
    monkeypatch.setattr(native_cuda, "load", lambda: NativeLibrary(cuda_on_host, Path("on_host"), "loaded"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of the CPU
    before = cuda_on_host.ffk_misaligned_accesses()
    yield native_cuda
    assert cuda_on_host.ffk_misaligned_accesses() == before


@pytest.fixture
def streams(monkeypatch):
    """A GPU's current stream and whether it is captured, both to set, and what was recorded on which."""
    state = SimpleNamespace(capturing=False, stream="main", recorded=[])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    record = lambda tensor, stream: state.recorded.append((tensor.data_ptr(), stream))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    return state


class Kernels:
    """One implementation, called with a plan and the sides (W, Δ, best) that it is of."""

    def __init__(self, name: str, module: ModuleType) -> None:
        self.name, self.module = name, module

    def checkpoint(self, plan, sides) -> None:
        arguments = (sides[0], sides[2]) if self.name == "torch" else (plan,)
        self.module.checkpoint_(*arguments)

    def delta(self, plan, sides) -> None:
        self.module.delta_(*(sides if self.name == "torch" else (plan,)))

    def step(self, plan, sides, accept, k, by_device=False) -> None:
        """`by_device`: with scalars that only the device knows, as Triton's kernels take all."""
        k = ctypes.c_float(k).value
        step_ = self.module.step_
        if self.name == "triton" or (by_device and self.name != "cpp"):
            accept, k = torch.tensor([accept], dtype=torch.int32), torch.tensor([k])
            step_ = reference.step_by_device_ if self.name == "torch" else step_
        step_(*(sides if self.name == "torch" else (plan,)), accept, k)

    def align(self, plan, weights, grads, best) -> torch.Tensor:
        plan.impl = self.name
        plan.gradients = plan.gradients or Gradients(plan)
        found = plan.gradients.find(None, weights, grads)
        out = torch.full((3,), math.nan, dtype=torch.float64)
        self.module.align_(*((weights, found, best) if self.name == "torch" else (plan,)), out)
        assert not plan.gradients.tickets.any(), "ready for the next launch"
        return out


@pytest.fixture(params=["torch", "cpp", "triton", "cuda"])
def kernels(request):
    """Every implementation; those for GPUs on the CPU, by Triton's interpreter and the C++ compiler."""
    if request.param == "triton":
        return Kernels("triton", request.getfixturevalue("interpreted")("triton_ops"))
    if request.param == "cuda":
        return Kernels("cuda", request.getfixturevalue("on_host"))
    if request.param == "cpp":
        request.getfixturevalue("cpp")
        return Kernels("cpp", native)
    return Kernels("torch", reference)


class Sides:
    """W, Δ, best and gradients of `sizes`, each in memory that is NaN around it.

    `skips` says by how many elements each of them begins off a boundary of 128 bytes.
    """

    def __init__(self, dtype, sizes, skips=(0, 0, 0, 0), grad_dtype=None):
        generator = torch.Generator().manual_seed(len(sizes))
        self.memory, self.all = [], []
        for skip, kind in zip(skips, (dtype, dtype, dtype, grad_dtype or dtype), strict=True):
            self.all.append([self._placed(n, kind, skip, generator) for n in sizes])
        self.weights, self.deltas, self.best, self.grads = self.all
        self.moved = tuple(self.all[:3])
        self.before = [[tensor.clone() for tensor in side] for side in self.moved]

    def _placed(self, n, dtype, skip, generator):
        memory = torch.full((n + 200,), math.nan, dtype=dtype)
        first = -memory.data_ptr() % 128 // dtype.itemsize + skip
        self.memory.append((memory, first, first + n))
        memory[first : first + n] = torch.randn(n, generator=generator)
        return memory[first : first + n]

    def plan(self, deltas=True, dtypes=tuple(DTYPE_CODES)):
        return make_plan(
            self.weights, self.deltas if deltas else None, self.best, chunk=GPU_CHUNK, dtypes=dtypes
        )

    def unharmed(self) -> bool:
        parts = [part for memory, *ends in self.memory for part in memory.tensor_split(ends)[::2]]
        return all(bool(part.isnan().all()) for part in parts)


@pytest.fixture(scope="session")
def make_sides():
    return Sides
