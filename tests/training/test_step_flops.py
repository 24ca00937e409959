"""FLOPs of batches counted while they train, and the fit beyond what was counted."""

from __future__ import annotations

import pytest
import torch

from ffkernels.reporting.flops import FlopMeter
from ffkernels.training import step_flops
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.step_flops import StepFlops


@pytest.fixture(scope="module")
def model(small):
    return add_adapter(load_model(small["model"])[0], rank=4, seed=0).train()


def batch(rows, length):
    ids = torch.arange(rows * length).reshape(rows, length) % 256
    return {"input_ids": ids, "labels": ids}


def step(costs, model, inputs):
    with costs.batch(model, inputs) as cost:
        model(**inputs).loss.backward()
    return cost[0]


def exact(model, inputs):
    return FlopMeter(0).training_step(model, inputs)


def test_a_batch_costs_what_the_meter_says(model):
    costs = StepFlops()
    inputs = batch(3, 11)
    assert step(costs, model, inputs) == exact(model, inputs)
    costs.counted[3, 11] = "known"
    assert step(costs, model, inputs) == "known"  # not counted twice


def test_beyond_the_counted_shapes_a_fit_says_it_to_the_flop(model):
    costs = StepFlops()
    for n in range(step_flops.SHAPES):
        step(costs, model, batch(1 + n % 3, 4 + 5 * n))
    for shape in [(5, 17), (1, 60), (7, 3)]:
        assert step(costs, model, batch(*shape)) == exact(model, batch(*shape))
    assert len(costs.counted) == step_flops.SHAPES


def test_gradients_are_those_of_an_uncounted_step(model):
    gradients = []
    for around in (StepFlops(), None):
        model.zero_grad()
        if around is None:
            model(**batch(2, 9)).loss.backward()
        else:
            step(around, model, batch(2, 9))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_step_that_raises_is_not_counted_and_leaves_no_hook(model):
    costs, hooks = StepFlops(), len(model._forward_hooks)
    with pytest.raises(RuntimeError, match="out of memory"), costs.batch(model, batch(2, 9)):
        raise RuntimeError("out of memory")
    assert costs.counted == {} and len(model._forward_hooks) == hooks


@pytest.mark.parametrize(
    "inputs, shape",
    [
        ({"labels": torch.zeros(2), "input_ids": torch.zeros(2, 5)}, (2, 5)),
        ({"labels": torch.zeros(3), "pixels": torch.zeros(3, 4, 5)}, (3, 20)),
        (torch.zeros(4, 6), (4, 6)),
        ({"x": torch.zeros(7)}, (7, 1)),
        (object(), (0, 1)),
    ],
)
def test_the_shape_of_a_batch(inputs, shape):
    assert step_flops._shape(inputs) == shape
