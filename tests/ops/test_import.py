"""`import ffkernels` is nearly free and gives every public name."""

import json
import subprocess
import sys

import pytest

import ffkernels

SCRIPT = """
import json, sys, time
import torch
start = time.perf_counter()
import ffkernels
took = time.perf_counter() - start
print(json.dumps({"seconds": took, "modules": sorted(sys.modules)}))
"""


def test_import_costs_little_and_loads_neither_triton_nor_transformers():
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    found = json.loads(output)
    assert found["seconds"] < 0.2
    loaded = {name.partition(".")[0] for name in found["modules"]}
    assert not loaded & {"triton", "transformers", "peft", "accelerate", "matplotlib"}
    assert "ffkernels.ops" not in found["modules"]


@pytest.mark.parametrize("name", [name for name in ffkernels.__all__ if name != "__version__"])
def test_every_public_name_resolves(name):
    assert getattr(ffkernels, name).__name__.rpartition(".")[2] == name
    assert name in dir(ffkernels)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'ffkernels' has no attribute 'FastFoward'"):
        ffkernels.FastFoward  # noqa: B018
