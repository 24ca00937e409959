"""Situations that users bring captured stages into: once over the stand-in for CUDA, once on a GPU.

Each is a function of a `Place` and of the executor's name, in which every captured stage is compared with its
eager twin (`eager_twins`).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
import torch
from eager_twins import MAX_TAU, Place, Training, compare, nothing_said
from torch import nn
from torch.utils.data import DataLoader

from ffkernels import ValidationLoss, ValidationPool
from ffkernels.graphs import driver as graph_driver
from ffkernels.graphs.check import loss_tolerance
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.search import significance
from ffkernels.stage.record import next_start


def addresses(validation: ValidationLoss) -> list[tuple]:
    tensors = [tensor for batch in validation.labelled.micro_batches for tensor in vars(batch).values()]
    return [(tensor.data_ptr(), tensor.shape) for tensor in [*tensors, validation.example_tokens]]


def once(values: list) -> list:
    """Without repeats in a row."""
    return [value for value, _ in groupby(values)]


def other_examples_for_every_stage(place: Place, name: str) -> None:
    """A pool draws before each: the same places hold other lengths, and searches begin elsewhere."""
    model = place.build()
    pool = ValidationPool(model, [place.batch(12, 24, seed=seed) for seed in range(2)], size=8)
    places, counts = addresses(pool), []
    with nothing_said(), Training(place, name, model, pool) as training:
        for _ in range(4):
            training.stage()
            counts.append(list(pool.example_counts))
        stages = training.ff.stages
        assert training.captures == 1
    assert [stage.draw for stage in stages] == [0, 1, 2, 3]
    assert addresses(pool) == places
    assert place.told == counts and len(set(map(tuple, counts))) == 4
    starts = [min(next_start(stages[:i]), MAX_TAU) for i in range(4)]
    assert len(set(starts)) > 1
    assert [stage.losses[1][0] for stage in stages] == starts
    assert once(place.starts) == once([1, *starts])  # the first is from the making of the state


def exchanged_examples(place: Place, name: str) -> None:
    """`swap_batch` between stages: fewer examples in place, then more, for which all is made anew."""
    model = place.build()
    sets = [place.batch(9, 24, seed=1), place.batch(6, 20, seed=8), place.batch(12, 30, seed=3)]
    validation = ValidationLoss(model, sets[:1])
    with Training(place, name, model, validation) as training:
        for index, (batch, captures) in enumerate(zip(sets, (1, 1, 2), strict=True)):
            before = addresses(validation)
            if index:
                assert validation.swap_batch([batch]) is (index == 1)
            assert (addresses(validation) == before) is (index < 2)
            again = pytest.warns(FFKernelsNotice, match="captured again: the validation set's buffers")
            with again if index == 2 else nothing_said():
                training.stage()
            assert training.captures == captures
            assert place.told[-1] == validation.example_counts and len(place.told) == index + 1
            assert sorted(place.told[-1])[: 9 - 6].count(0) == (3 if index == 1 else 0)
            fresh = float(ValidationLoss(model, [batch])())
            assert training.ff.stages[-1].loss_after == pytest.approx(fresh, rel=1e-5)


@contextmanager
def dtypes_of_the_head(model: nn.Module) -> Iterator[dict[bool, set[torch.dtype]]]:
    """What the head gave, by whether it was being captured."""
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def look(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen[graph_driver.cuda.is_capturing()].add(output.dtype)

    handle = model.get_output_embeddings().register_forward_hook(look)
    yield seen
    handle.remove()


def autocast_around_the_forward(place: Place, name: str) -> None:
    """As in the usual loop: the step is outside of it; the stage validates under it, captured or not."""
    model = place.build()
    with dtypes_of_the_head(model) as seen:
        validation = ValidationLoss(model, [place.batch(6, 16, seed=1)])
        with nothing_said(), Training(place, name, model, validation) as training:
            for _ in range(2):
                training.stage(lambda: torch.autocast(place.device.type, dtype=torch.bfloat16))
            assert training.captures == 1
    # Float32 is what the validation was checked with when it was made.
    assert seen == {True: {torch.bfloat16}, False: {torch.float32, torch.bfloat16}}


def autocast_between_stages(place: Place, name: str) -> None:
    """Around the step it is around the stage: recorded anew whenever it changes, which is said."""
    model = place.build()
    validation = ValidationLoss(model, [place.batch(6, 16, seed=1)])
    told = {True: r"autocast \(None → torch.bfloat16\)", False: r"autocast \(torch.bfloat16 → None\)"}
    with dtypes_of_the_head(model) as seen, Training(place, name, model, validation, 1) as training:
        for enabled, recorded in ((False, True), (True, True), (True, False), (False, True)):
            again = recorded and bool(training.ff.stages)
            said = pytest.warns(FFKernelsNotice, match=f"captured again: {told[enabled]}$")
            autocast = torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=enabled)
            with said if again else nothing_said(), autocast:
                training.stage()
            dtype = torch.bfloat16 if enabled else torch.float32
            assert seen == {True: {dtype} if recorded else set(), False: {dtype}}
            for dtypes in seen.values():
                dtypes.clear()
        assert training.captures == 3


def mixed_precision_of_accelerate(place: Place, name: str) -> None:
    """Its wrapper around `forward` casts although the stage runs outside of any autocast."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        cpu = place.device.type == "cpu"
        model = accelerate.Accelerator(cpu=cpu, mixed_precision="bf16").prepare_model(place.build())
        with dtypes_of_the_head(model) as seen:
            validation = ValidationLoss(model, [place.batch(6, 16, seed=1)])
            assert validation.path == "fast", validation.reason
            with nothing_said(), Training(place, name, model, validation) as training:
                for _ in range(2):
                    training.stage()
                assert training.captures == 1
        assert seen == {True: {torch.bfloat16}, False: {torch.bfloat16}}
        with torch.no_grad():
            own = model(**{k: v.to(place.device) for k, v in place.batch(6, 16, seed=1).items()}).loss.item()
        assert training.ff.stages[-1].loss_after == pytest.approx(own, rel=2e-2)
    finally:
        AcceleratorState._reset_state(True)


def training_on_another_stream(place: Place, name: str, slow: Callable[[], None] = lambda: None) -> Any:
    """The stage waits for the optimizer, which `slow()` holds up, and what comes later for the stage."""
    cuda, device = graph_driver.cuda, place.device
    outer, user = cuda.current_stream(device), cuda.new_stream(device)
    model, later = place.build(), []
    cuda.wait(user, outer)
    with cuda.on_stream(user), nothing_said():
        validation = ValidationLoss(model, [place.batch(6, 16, seed=1)])
        with Training(place, name, model, validation) as training:
            training.optimizer.register_step_pre_hook(lambda *_: slow())
            for _ in range(3):
                training.stage()
                later.append([weight.detach().clone() for weight in training.weights])
            assert training.captures == 1
    cuda.wait(outer, user)
    cuda.synchronize(device)
    for weights, (captured, _) in zip(later, place.pairs, strict=True):
        assert all(map(torch.equal, weights, captured["weights"]))
    assert max(captured["found"][0] for captured, _ in place.pairs) > 0
    return user


def another_thread_during_a_capture(
    place: Place, name: str, work: Callable[[], float], expected: float, loader: DataLoader
) -> None:
    """Between a recording's begin and its end another thread does `work`, as a loader's would."""
    record, results = graph_driver.cuda.work, []

    def beside(graph: Any, fn: Callable[[], Any]) -> Any:
        value = record(graph, fn)
        with ThreadPoolExecutor(1) as other:
            results.append(other.submit(work).result(timeout=60))
        return value

    model = place.build()
    validation = ValidationLoss(model, [place.batch(6, 16, seed=1)])
    with nothing_said(), Training(place, name, model, validation) as training:
        place.patch.setattr(graph_driver.cuda, "work", beside)
        for batch in loader:
            assert batch["input_ids"].is_pinned() is (place.device.type == "cuda")
            training.step(batch)
        assert [stage.executor for stage in training.ff.stages] == [name] * 2
        assert training.captures == 1
    assert results == [expected] * (2 if name == "stage_graph" else 1)
    assert len(place.pairs) == 2


def many_examples(place: Place, name: str, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """More than the 32 that a warp takes at once: the device holds the sums of all, and judges by all.

    In bfloat16 some rises are noise, and some are not.
    """
    place.patch.setattr(significance, "LEVEL", 0.9)  # of random examples little is proved
    model = place.build().to(dtype)
    validation = ValidationLoss(model, [place.batch(rows, 12, seed=1)])
    assert validation.examples == rows
    with nothing_said(), Training(place, name, model, validation) as training:
        for _ in range(3):
            training.stage()
            executor = training.ff._executor._graph
            assert executor._state.rows == rows
            # The best loss was the last that was measured at these very weights.
            sums = validation.measure()[1]
            tolerance = 0.0 if place.exact else loss_tolerance(validation, place.device)
            torch.testing.assert_close(executor._state._best, sums, rtol=tolerance, atol=0.0)
        assert training.captures == 1
    assert place.told == [validation.example_counts]


def _products(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def _all(precision: str) -> None:
    torch.backends.fp32_precision = precision


def _allow() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


# By torch's old interface, and by its new one, after which the old cannot be read.
TF32 = {
    "allow_tf32": _allow,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "all": lambda: _all("tf32"),
    "products": lambda: _products("tf32"),
}


def tf32_between_stages(place: Place, name: str, switch_on: Callable[[], None]) -> None:
    """Recorded anew, which is said, and not given up. The caller puts the switch back."""
    model, examples = place.build(), [place.batch(6, 16, seed=1)]
    validation = ValidationLoss(model, examples)
    with Training(place, name, model, validation) as training:
        with nothing_said():
            training.stage()
        switch_on()
        with pytest.warns(FFKernelsNotice, match=r"captured again: a precision or .* float32 → TF32\)$"):
            training.stage()
        with nothing_said():
            training.stage()
            made_now = ValidationLoss(model, examples)
        assert training.captures == 2
        assert made_now.path == "fast", made_now.reason
        assert training.ff.stages[-1].loss_after == pytest.approx(float(made_now()), rel=1e-4)


def two_models(place: Place) -> None:
    """Both with graphs of their own, in turns; the one goes on when the other is closed."""
    models, examples = [place.build(), place.build()], [place.batch(6, 16, seed=1)]
    one, other = (
        Training(place, name, model, ValidationLoss(model, examples), 1)
        for name, model in zip(("step_graph", "stage_graph"), models, strict=True)
    )
    with nothing_said(), other:
        with one:
            for _ in range(2):
                one.stage()
                other.stage()
        other.stage()
        assert other.captures == 1
    first, second, third, fourth, _ = (captured for captured, _ in place.pairs)
    if place.exact:  # the same model, data and optimizer: what one left to the other would show
        compare(first, second, 0.0)
        compare(third, fourth, 0.0)
