"""The CUDA library as nvcc builds it: found or not, loaded without a GPU, and what its machine code does."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffkernels.ops import build, dispatch, native_cuda

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# Threads that a multiprocessor holds at a time, by its 65,536 registers: a thread gets them in eights, and
# threads come in blocks of 128. docs/kernels.md has the same numbers.
THREADS = {"checkpoint_kernel": 2048, "delta_kernel": 1152, "step_kernel": 1280, "align_kernel": 896}

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc on PATH or in CUDA_HOME")


def find_cuobjdump() -> str | None:
    """Beside nvcc, on PATH, or the one that the triton package carries."""
    nvcc = build.find_nvcc()
    places = [str(nvcc.resolve().parent)] if nvcc else []
    if os.environ.get("CUDA_HOME"):
        places.append(str(Path(os.environ["CUDA_HOME"]) / "bin"))
    places.append(os.environ.get("PATH", ""))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump (CUDA or triton)")


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """Puts a shell script into CUDA_HOME."""

    def write(script: str) -> Path:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return nvcc

    return write


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("cuda") / build.CUDA_LIBRARY
    build.compile_cuda_library(CSRC, target)
    return target


INSTRUCTION = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?"  # what stands before its name


def functions(text: str) -> dict[str, str]:
    """cuobjdump's listing by function."""
    parts = re.split(r"^\s*(?:Function\s*:\s*|Function )(\S+?):?\s*$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def machine_code(library) -> dict[tuple[str, str], tuple[str, str]]:
    """(architecture, kernel) → (instructions, resource usage)"""
    found = {}
    for arch in ARCHITECTURES:
        listings = []
        for what in ("--dump-sass", "--dump-resource-usage"):
            command = [find_cuobjdump(), what, "--gpu-architecture", arch, str(library)]
            listings.append(functions(subprocess.run(command, capture_output=True, text=True).stdout))
        for name, code in listings[0].items():
            found[arch, name] = (code, listings[1][name])
    return found


@pytest.mark.slow
@needs_nvcc
@needs_cuobjdump
def test_every_kernel_is_there_for_every_architecture(machine_code):
    for arch in ARCHITECTURES:
        names = [name for a, name in machine_code if a == arch]
        counts = {"checkpoint_kernel": 2, "delta_kernel": 3, "step_kernel": 3, "align_kernel": 4}
        assert {kernel: sum(kernel in name for name in names) for kernel in counts} == counts
        assert len(names) == sum(counts.values()), (arch, names)


@needs_nvcc
@needs_cuobjdump
def test_machine_code_is_wide_and_stays_in_registers(machine_code):
    assert machine_code
    for where, (code, usage) in machine_code.items():
        opcodes = re.findall(INSTRUCTION + r"([A-Z][A-Z0-9_.]+)", code, flags=re.M)
        assert len(opcodes) > 50, where
        loads = [op for op in opcodes if op.startswith("LDG")]
        stores = [op for op in opcodes if op.startswith("STG")]
        # Two 128-bit loads fetch the row itself; the rest move tensors.
        assert sum(".128" in op for op in loads if "CONSTANT" not in op) >= 1, where
        assert sum(".128" in op for op in stores) >= 1, where
        assert any(".128" not in op for op in loads), f"{where}: no path for misaligned tensors"
        assert any(".EF" in op for op in stores), f"{where}: best is not marked to leave the cache first"
        stray = [op for op in opcodes if re.match(r"(LDL|STL|LD|ST|ATOM|RED)(\.|$)", op)]
        assert not stray, f"{where}: local or generic memory: {stray}"
        assert not [op for op in opcodes if re.match("[FD]FMA", op)], f"{where}: contraction"
        registers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        assert registers, usage
        used, stack, shared, local = map(int, registers.groups())
        assert stack == local == 0, (where, usage)
        assert (shared > 0) == ("align" in where[1]), f"{where}: only sums pass from warp to warp, {usage}"
        (least,) = (threads for kernel, threads in THREADS.items() if kernel in where[1])
        assert 65536 // (-(-used // 8) * 8 * 128) * 128 >= least, (where, used)


@needs_nvcc
@needs_cuobjdump
def test_the_last_block_sees_what_the_others_wrote(machine_code):
    """Twice: all writes in sight of the GPU, the ticket, a barrier, and the sums not from the first cache."""
    for (arch, name), (code, _) in machine_code.items():
        if "align_kernel" in name:
            wanted = r"(MEMBAR\.SC\.GPU|ATOMG|BAR\.SYNC)"
            order = " ".join(re.findall(INSTRUCTION + wanted, code, flags=re.M))
            assert order.count("MEMBAR.SC.GPU ATOMG BAR.SYNC") == order.count("ATOMG") == 2, (arch, name)
            assert len(re.findall(r"LDG\.E\.64\.STRONG\.GPU", code)) >= 6


@needs_nvcc
@needs_cuobjdump
def test_loads_of_a_round_come_before_its_stores(machine_code):
    """All wide loads of a step are on their way before its first wide store waits for one of them."""
    for (arch, name), (code, _) in machine_code.items():
        if "step_kernel" not in name and "align_kernel" not in name:
            continue
        wide = re.findall(r"(LDG|STG)\.E(?:\.EF)?\.128 ", code)
        longest = max(len(run) for run in re.findall(r"L+", "".join(op[0] for op in wide)))
        units = 4 if "Float32" in name else 2
        assert longest >= units * (3 if "align" in name else 2), (arch, name, longest)


@needs_nvcc
def test_newer_gpus_find_portable_code(library):
    if find_cuobjdump() is None:
        pytest.skip("needs cuobjdump (CUDA or triton)")
    listed = subprocess.run([find_cuobjdump(), "--list-ptx", str(library)], capture_output=True, text=True)
    assert "sm_100" in listed.stdout


@needs_nvcc
def test_the_library_loads_without_a_gpu(library, fresh_native):
    fresh_native.setenv("FFKERNELS_CUDA_LIBRARY", str(library))
    loaded = native_cuda.load()
    assert loaded.library is not None and loaded.path == library
    assert "dtype" in loaded.library.ffk_cuda_error_string(-1).decode()
    # Nothing here stands in for a GPU: either the kernels load on device 0, or the driver says why not.
    fresh_native.setattr(torch.cuda, "current_device", lambda: 0)
    refused = native_cuda.usable(0)
    if not os.path.exists("/dev/nvidia0"):
        assert refused is not None and str(library) in refused and "code" in refused


@needs_nvcc
@pytest.mark.skipif(sys.platform != "linux", reason="readelf's view of an ELF file")
def test_the_library_brings_its_runtime_along(library):
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    listed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", listed.stdout)
    assert needed and not [name for name in needed if re.match(r"lib(cuda|cudart|torch|c10)", name)], needed


@pytest.mark.slow
@needs_nvcc
def test_build_cuda_fills_the_cache(tmp_path, fresh_native):
    fresh_native.setenv("FFKERNELS_CACHE", str(tmp_path))
    fresh_native.delenv("FFKERNELS_CUDA_LIBRARY", raising=False)
    fresh_native.setattr(native_cuda.RECIPE, "packaged", tmp_path / "absent.so")
    fresh_native.setattr(build, "CUDA_ARCHITECTURES", (80,))
    path = native_cuda.build_cuda()
    assert path.is_relative_to(tmp_path)
    assert native_cuda.load().path == path
    compiled = []
    fresh_native.setattr(native_cuda.RECIPE, "compile", lambda *places: compiled.append(places))
    assert native_cuda.build_cuda() == path and not compiled, "it is there and opens"
    assert native_cuda.build_cuda(again=True) == path and compiled == [(CSRC, path)]
    fresh_native.setattr(build, "CUDA_FLAGS", (*build.CUDA_FLAGS, "-DFFK_OTHER"))
    assert native_cuda.RECIPE.cached() != path


def test_architectures_are_compiled_side_by_side(tmp_path, fake_nvcc):
    """By nvcc's own threads, as many as there are cores."""
    said = tmp_path / "said"
    nvcc = fake_nvcc(
        '[ "$1" = --list-gpu-code ] && echo sm_80 sm_90 && exit\n'
        f'echo "$@" > {said}\nfor last; do :; done\ntouch "$last"'
    )
    command = build.compile_cuda_library(CSRC, tmp_path / "x.so")
    assert "--threads=0" in said.read_text().split() and command[0] == str(nvcc)
    assert sum(part.startswith("-gencode") for part in command) == 3


@pytest.mark.slow
@needs_nvcc
def test_a_library_of_other_sources_is_refused(tmp_path, fresh_native):
    other = tmp_path / "csrc"
    shutil.copytree(CSRC, other)
    with open(other / "step_cuda.cu", "a", encoding="utf-8") as source:
        source.write("// changed\n")
    fresh_native.setattr(build, "CUDA_ARCHITECTURES", (80,))
    build.compile_cuda_library(other, tmp_path / "other.so")
    fresh_native.setenv("FFKERNELS_CUDA_LIBRARY", str(tmp_path / "other.so"))
    assert native_cuda.load().library is None
    assert "other sources" in native_cuda.load().reason


@needs_nvcc
def test_a_compile_error_is_shown(tmp_path, monkeypatch):
    broken = tmp_path / "csrc"
    shutil.copytree(CSRC, broken)
    (broken / "step_cuda.cu").write_text("#error not today\n", encoding="utf-8")
    monkeypatch.setattr(build, "CUDA_ARCHITECTURES", (80,))
    with pytest.raises(build.BuildError, match="not today"):
        build.compile_cuda_library(broken, tmp_path / "broken.so")
    assert not (tmp_path / "broken.so").exists() and not list(tmp_path.glob(".build-*"))


def test_without_nvcc_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"CUDA_HOME=.*has no bin/nvcc"):
        build.compile_cuda_library(CSRC, tmp_path / "x.so")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="install a CUDA toolkit"):
        build.compile_cuda_library(CSRC, tmp_path / "x.so")


def test_an_nvcc_too_old_is_named(tmp_path, fake_nvcc):
    fake_nvcc("echo sm_52\necho sm_60")
    with pytest.raises(build.BuildError, match="makes none of sm_80, sm_90, sm_100"):
        build.compile_cuda_library(CSRC, tmp_path / "x.so")


def test_targets_follow_what_nvcc_knows(fake_nvcc):
    nvcc = fake_nvcc("printf 'sm_75\\nsm_80\\nsm_90\\n'")
    assert build._cuda_targets(nvcc) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize(
    ("value", "wanted"), [("0", False), ("1", True), ("auto", None), ("", None), (None, None)]
)
def test_the_switch(monkeypatch, value, wanted):
    monkeypatch.delenv("FFKERNELS_BUILD_CUDA", raising=False)
    if value is not None:
        monkeypatch.setenv("FFKERNELS_BUILD_CUDA", value)
    assert build.cuda_wanted() is wanted


def test_a_bad_switch_is_refused(monkeypatch):
    monkeypatch.setenv("FFKERNELS_BUILD_CUDA", "yes")
    with pytest.raises(build.BuildError, match="must be 0, 1 or auto"):
        build.cuda_wanted()


def test_named_on_the_wrong_device():
    with pytest.raises(ValueError, match="impl='cuda' runs on a GPU, the tensors are on cpu"):
        dispatch.resolve("cuda", "cpu")
