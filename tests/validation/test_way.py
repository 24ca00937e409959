"""The way of a batch: the files that it passes, and that none calls back one that waits for it."""

import sys
from collections.abc import Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest

import ffkernels
from ffkernels import ValidationLoss
from ffkernels.validation.batches import Example, Given
from ffkernels.validation.evaluator import Loss
from ffkernels.validation.micro_batches import MicroBatch

PACKAGE = str(Path(ffkernels.__file__).parent)


def holds_a_batch(value):
    """Whether it is a batch, what was made of one, or what runs that."""
    value = getattr(value, "__self__", value)  # of a bound method
    if isinstance(value, (list, tuple)):
        return any(map(holds_a_batch, value[:1]))
    batch = isinstance(value, Mapping) and "input_ids" in value
    return batch or isinstance(value, (Example, Given, Loss, MicroBatch))


@contextmanager
def followed():
    """(files that are handed a batch, in this order; of each call, the files on its way to the last one)."""
    passed, ways = {}, set()

    def look(frame, event, argument):
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if any(map(holds_a_batch, frame.f_locals.values())):
            passed[Path(frame.f_code.co_filename).stem] = True
        files = []
        while frame is not None:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        ours = (Path(file).stem for file in reversed(files) if file.startswith(PACKAGE))
        ways.add(tuple(name for name, _ in groupby(ours)))

    sys.setprofile(look)
    try:
        yield passed, ways
    finally:
        sys.setprofile(None)


def coming_back(ways):
    """Those on which a file comes twice."""
    return [way for way in ways if len(set(way)) < len(way)]


def test_a_batch_passes_seven_files_and_comes_back_to_none(tiny_model, padded_batch):
    model = tiny_model("llama")
    with followed() as (passed, ways):
        validation = ValidationLoss(model, [padded_batch(5, 24)])
        loss, flops = validation(), validation.flops
        assert float(validation.measure()[0]) == float(loss) and flops > 0
        assert validation.swap_batch([padded_batch(4, 20)])
    assert [*passed] == ["loss", "batches", "choice", "generic", "fast", "micro_batches", "evaluator"]
    assert not coming_back(ways)
    assert ("loss", "evaluator", "fast") in ways


@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
@pytest.mark.parametrize("way", ["generic", "callable"])
def test_each_way_is_run_as_the_others(way, tiny_model, padded_batch):
    model, batch = tiny_model("granite"), padded_batch(3, 12)
    validation = ValidationLoss(model, [batch] if way == "generic" else lambda model: model(**batch).loss)
    with followed() as (_, ways):
        loss = float(validation())
        assert validation.measure() == (loss, None) and validation.flops > 0
    assert validation.path == way
    assert not coming_back(ways)
    assert ("loss", "evaluator", "generic") in ways
