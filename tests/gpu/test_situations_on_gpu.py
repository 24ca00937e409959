"""What users bring captured stages into, on a GPU; `tests/graphs` has the same over a stand-in for CUDA."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import DataLoader

from ffkernels.training.models import add_adapter, load_model

pytestmark = pytest.mark.gpu

# A dry run is to see that these tests are right, for which one is enough.
DRY = os.environ.get("FFK_DRY") == "1"
BOTH = pytest.mark.parametrize("name", ["stage_graph"] if DRY else ["step_graph", "stage_graph"])


@pytest.fixture
def spot(place, situations, padded_batch, monkeypatch):
    def build():
        model, _ = load_model("tiny", device=str(place))
        return add_adapter(model, rank=4, seed=0)

    return situations.Place(place, build, padded_batch, monkeypatch, exact=place.type == "cpu")


@BOTH
def test_other_examples_for_every_stage(name, situations, spot):
    situations.other_examples_for_every_stage(spot, name)


@BOTH
def test_exchanged_examples(name, situations, spot):
    situations.exchanged_examples(spot, name)


@BOTH
def test_autocast_around_the_forward(name, situations, spot):
    situations.autocast_around_the_forward(spot, name)


@BOTH
def test_autocast_between_stages(name, situations, spot):
    situations.autocast_between_stages(spot, name)


@BOTH
def test_mixed_precision_of_accelerate(name, situations, spot):
    situations.mixed_precision_of_accelerate(spot, name)


@BOTH
def test_training_on_another_stream(name, situations, spot):
    def slow():
        if spot.device.type == "cuda":
            torch.cuda._sleep(100_000_000)  # about 50 ms, in which the weights are not updated yet

    situations.training_on_another_stream(spot, name, slow)


@BOTH
def test_a_loader_that_pins_memory_during_a_capture(name, situations, spot):
    """A recording in any other mode is spoilt by an allocation or a question that another thread has."""
    held, size, cuda = [], 1 << 20, spot.device.type == "cuda"

    def work():
        if not cuda:
            return float(torch.ones(size).sum())
        held.append(torch.ones(size).pin_memory())  # held, so that the next is another piece of memory
        with torch.cuda.stream(stream):
            there = held[-1].to(spot.device, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            while not done.query():
                pass
            return float(there.sum())

    stream = torch.cuda.Stream(spot.device) if cuda else None
    assert work() == size  # and its kernels are loaded
    batches = [spot.batch(4, 12, seed=seed) for seed in range(4)]
    loader = DataLoader(batches, batch_size=None, num_workers=1, pin_memory=cuda)
    situations.another_thread_during_a_capture(spot, name, work, size, loader)


@BOTH
@pytest.mark.parametrize("rows", [33] if DRY else [33, 70])
def test_many_examples(rows, name, situations, spot):
    # On a CPU that takes seconds.
    dtype = torch.bfloat16 if spot.device.type == "cuda" else torch.float32
    situations.many_examples(spot, name, rows, dtype)


@BOTH
@pytest.mark.parametrize("switch", ["all"] if DRY else ["allow_tf32", "all"])
def test_tf32_between_stages(switch, name, situations, spot, default_precision):
    situations.tf32_between_stages(spot, name, situations.TF32[switch])


def test_two_models(situations, spot):
    situations.two_models(spot)
