"""Building, finding and refusing the compiled library."""

import subprocess
import warnings

import pytest
import torch

from ffkernels import ops
from ffkernels.ops import build, native

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_a_machine_with_a_compiler_has_the_library():
    """Otherwise every comparison with the C++ ops in this suite would skip unseen."""
    found = ops.available()["cpp"]
    assert found.ok, f"{found.reason}; reinstall the package (`make install`) after changing csrc"


@needs_compiler
def test_build_native_fills_the_cache_and_loads_it(fresh_native, tmp_path):
    fresh_native.setenv("FFKERNELS_CACHE", str(tmp_path))
    fresh_native.setattr(native.RECIPE, "packaged", tmp_path / "absent.so")
    assert not ops.available()["cpp"].ok
    path = ops.build_native()
    assert path.is_relative_to(tmp_path) and native.load().path == path
    table = ops.TensorTable([torch.ones(3)])
    assert table.impl == "cpp"
    assert [p.name for p in path.parent.iterdir()] == [build.LIBRARY]


@needs_compiler
def test_what_is_built_is_not_compiled_again(fresh_native, tmp_path):
    """Counted at the compiler. A file that does not open is compiled over, and so is one of other flags."""
    calls, compiler = tmp_path / "calls", tmp_path / "compiler"
    real = " ".join(build.find_compiler())
    compiler.write_text(f'#!/bin/sh\necho >> {calls}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    fresh_native.setenv("CXX", str(compiler))
    fresh_native.setenv("FFKERNELS_CACHE", str(tmp_path / "cache"))
    fresh_native.setattr(native.RECIPE, "packaged", tmp_path / "absent.so")
    fresh_native.setattr(build, "FLAGS", tuple(flag for flag in build.FLAGS if flag != "-O3"))
    broken = native.RECIPE.cached()
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\x7fELF, but not really")

    def compiled() -> int:
        return len(calls.read_text().splitlines())

    assert ops.build_native() == broken
    once = compiled()
    assert once in (1, 2), "twice where OpenMP is missing"
    assert ops.build_native() == broken and native.load().path == broken and compiled() == once
    assert ops.build_native(again=True) == broken and compiled() == 2 * once
    fresh_native.setattr(build, "FLAGS", (*build.FLAGS, "-DFFK_OTHER"))
    native.load.cache_clear()
    assert native.load().library is None, "a library of other flags was taken"
    assert ops.build_native() != broken and compiled() == 3 * once


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HOME": "home"}, "home/.cache/ffkernels"),
        ({"HOME": "home", "XDG_CACHE_HOME": "xdg"}, "xdg/ffkernels"),
        ({"XDG_CACHE_HOME": "xdg", "FFKERNELS_CACHE": "own"}, "own"),
    ],
)
def test_cache_directory(monkeypatch, tmp_path, variables, expected):
    for name in ("FFKERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert native.cache_dir() == tmp_path / expected


def test_a_broken_library_falls_back_and_says_so_once(fresh_native, tmp_path):
    broken = tmp_path / build.LIBRARY
    broken.write_bytes(b"\x7fELF, but not really")
    fresh_native.setenv("FFKERNELS_LIBRARY", str(broken))
    with pytest.warns(ops.FFKernelsNotice, match="plain torch ops.*was refused.*doctor --build") as caught:
        table = ops.TensorTable([torch.ones(3)])
    assert caught[0].filename == __file__
    assert table.impl == "torch"
    table.deltas[0].fill_(1.0)
    ops.step_(table, True, 1)
    assert table.weights[0].tolist() == [2.0, 2.0, 2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.TensorTable([torch.ones(3)])
        ops.checkpoint_([torch.ones(3)], [torch.ones(3)])
    with pytest.raises(RuntimeError, match=r"impl='cpp' is not available.*was refused"):
        ops.TensorTable([torch.ones(3)], impl="cpp")


@needs_compiler
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("int ffk_abi(void) { return 99; }", f"it has ABI 99, this ffkernels needs {native.ABI}"),
        (
            f'int ffk_abi(void) {{ return {native.ABI}; }} const char* ffk_source_id(void) {{ return "x"; }}',
            "built from other sources",
        ),
        ("int other;", "undefined symbol"),
    ],
)
def test_a_foreign_library_is_refused(fresh_native, tmp_path, body, reason):
    source, library = tmp_path / "foreign.cpp", tmp_path / "foreign.so"
    source.write_text(f'extern "C" {{ {body} }}')
    subprocess.run([*build.find_compiler(), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    fresh_native.setenv("FFKERNELS_LIBRARY", str(library))
    found = ops.available()["cpp"]
    assert not found.ok and reason in found.reason and found.cure


def test_no_compiler_is_a_clear_error(fresh_native, tmp_path):
    fresh_native.delenv("CXX", raising=False)
    fresh_native.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler on PATH.*install one or set CXX"):
        build.compile_library(native.RECIPE.source_dir(), tmp_path / build.LIBRARY)
    fresh_native.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(build.BuildError, match="CXX='no-such-compiler -m64' is not an executable"):
        build.compile_library(native.RECIPE.source_dir(), tmp_path / build.LIBRARY)


@needs_compiler
def test_sources_that_do_not_compile_leave_nothing_behind(fresh_native, tmp_path):
    for name in (*build.HEADERS, *build.SOURCES):
        (tmp_path / name).write_text("this is not C++")
    with pytest.raises(build.BuildError, match=r"failed on .*step_cpu\.cpp"):
        build.compile_library(tmp_path, tmp_path / "out" / build.LIBRARY)
    assert list((tmp_path / "out").iterdir()) == []


def test_resolve(fresh_native):
    assert ops.resolve("torch", "cpu") == ("torch", "asked for")
    with pytest.raises(ValueError, match="impl='fast' is unknown; allowed are 'auto', 'torch', 'cpp'"):
        ops.resolve("fast", "cpu")
    with pytest.raises(ValueError, match="impl='cpp' runs on the CPU, the tensors are on cuda"):
        ops.resolve("cpp", "cuda")
    assert ops.resolve("auto", "xpu") == ("torch", "there is no compiled kernel for xpu")
    if not torch.cuda.is_available():
        assert ops.resolve("auto", "cuda") == ("torch", "this torch sees no GPU")
    assert ops.available()["torch"].ok


def test_threads_are_torch_s(cpp, fresh_native):
    seen = []
    library = native.load().library

    class Spy:
        def __getattr__(self, name):
            def call(*arguments):
                seen.append((name, arguments[-1]))
                return getattr(library, name)(*arguments)

            return call

    fresh_native.setattr(native, "load", lambda: native.NativeLibrary(Spy(), None, ""))
    table = ops.TensorTable([torch.ones(3)], impl="torch")
    table.impl = table.plan.impl = "cpp"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ops.checkpoint_(table)
        ops.step_(table, True, 1)
    assert seen == [
        ("ffk_cpu_checkpoint", 1),
        ("ffk_cpu_step", 1),
        ("ffk_cpu_checkpoint", 2),
        ("ffk_cpu_step", 2),
    ]
