"""A validation loss that raises at weights that a search tried is as one that is NaN there."""

import math
import subprocess
import warnings

import numpy
import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig, ValidationLoss
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.ranks.trial import comes_of_weights
from ffkernels.search.search import BASELINE_NOT_FINITE


def divide_by_zero():
    with numpy.errstate(divide="raise"):
        return numpy.float64(1.0) / numpy.float64(0.0)


class NotPositiveDefinite(Exception):
    """As gpytorch's NotPSDError: of no narrower kind."""


def check_a_matrix():
    raise NotPositiveDefinite("after 3 attempts")


RAISING = {
    "ValueError": lambda: math.log(-1.0),
    "LinAlgError": lambda: torch.linalg.cholesky(-torch.eye(2)),
    "NumPy's LinAlgError": lambda: numpy.linalg.cholesky(-numpy.eye(2)),
    "FloatingPointError": divide_by_zero,
    "OverflowError": lambda: math.exp(1e4),
    "RuntimeError": lambda: torch.multinomial(torch.tensor([math.nan, 1.0]), 1),
    "an Exception of a package's own, NotPositiveDefinite": check_a_matrix,
    "IndexError": lambda: torch.zeros(2)[7],
}


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self):
        return ((self.w - torch.tensor([2.0, -1.0, 0.5, 4.0])) ** 2).sum()


def run(validation, steps=6, search="parabolic", **config):
    model = Slope()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = FastForwardConfig(interval=2, search=search, max_tau=64, patience=None, **config)
    ff = FastForward(model, optimizer, validation, settings) if validation else None
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    stages = ff.stages if ff else []
    return model.w.tolist(), [(s.tau, [(tau, repr(loss)) for tau, loss in s.losses]) for s in stages]


def beyond(otherwise, limit=0.02):
    return lambda model: otherwise() if float(model.w.detach().abs().max()) > limit else model()


@pytest.mark.parametrize("kind", RAISING)
def test_a_trial_that_raises_counts_as_nan_and_training_goes_on(kind):
    expected = run(beyond(lambda: math.nan), search="linear")
    with pytest.warns(FFKernelsNotice, match=f"raised {kind.split()[-1]} .*count as a loss of NaN") as said:
        found = run(beyond(RAISING[kind]), search="linear")
    assert found == expected
    assert found[1][0][0] == 18 and "nan" in str(found[1])
    assert len([w for w in said if issubclass(w.category, FFKernelsNotice)]) == 1


@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
@pytest.mark.parametrize(("limit", "taus"), [(0.02, [0, 1, 2, 4, 8, 16, 32]), (0.0038, [0, 1, 2])])
def test_a_parabolic_search_stays_half_way_from_where_it_raised(limit, taus):
    """At τ the weights are 0.002 + 0.001·τ from 0, and the loss falls on to 0.5."""
    _, stages = run(beyond(RAISING["LinAlgError"], limit), steps=2)
    tau, losses = stages[0]
    assert [at for at, _ in losses][: len(taus)] == taus and losses[len(taus) - 1][1] == "nan"
    assert tau == taus[-1] // 2 and all(at <= tau for at, _ in losses if at != taus[-1])


def test_training_does_not_go_over_where_a_search_went_half_way():
    """A learnt width, of which the training loss needs a root too, 200 steps from 0."""

    def train(ff):
        width = nn.Parameter(torch.tensor(1.0))
        model = nn.ParameterList([width])
        optimizer = torch.optim.Adam([width], lr=5e-3)

        def loss(_=None):
            math.sqrt(width.detach())
            return width * 1.0

        if ff:
            ff = FastForward(model, optimizer, loss, FastForwardConfig(interval=6, patience=None))
        for _ in range(20):
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(width.detach()), ff

    plain, _ = train(False)
    with pytest.warns(FFKernelsNotice, match="ValueError"):
        found, ff = train(True)
    assert plain == pytest.approx(0.9) and found == pytest.approx(0.02, abs=1e-5)
    assert [stage.tau for stage in ff.stages] == [128, 32, 16]


def test_a_first_validation_that_raises_is_the_losses_own_fault():
    with pytest.raises(ValueError, match="math domain"):
        run(lambda model: math.log(-1.0))


def test_a_later_baseline_that_raises_leaves_the_plain_runs_weights():
    """The loss works at the first stage's baseline, 0.002 from 0, and nowhere beyond."""

    def validation(model):
        far = float(model.w.detach().abs().max())
        return torch.linalg.cholesky(torch.eye(2) * (0.0025 - far)).sum() * 0 + far

    with pytest.warns(FFKernelsNotice, match="LinAlgError"):
        weights, stages = run(validation)
    assert weights == run(None)[0]
    assert [tau for tau, _ in stages] == [0, 0, 0]
    assert [[tau for tau, _ in losses] for _, losses in stages] == [[0, 1], [0], [0]]
    assert [losses[-1][1] for _, losses in stages] == ["nan"] * 3


def test_after_a_stage_without_a_baseline_the_next_one_searches():
    """The second stage begins at weights of which the loss cannot be computed, the third beyond them."""

    def validation(model):
        far = float(model.w.detach().abs().max())
        if 0.0025 < far < 0.0045:
            raise FloatingPointError("underflow")
        return far if far < 0.0025 else model()

    with pytest.warns(FFKernelsNotice, match="FloatingPointError"):
        _, stages = run(validation)
    assert [tau for tau, _ in stages][:2] == [0, 0] and stages[2][0] > 3


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        *([torch.AcceleratorError("an illegal memory access")] if hasattr(torch, "AcceleratorError") else []),
        TypeError("loss_fn() missing 1 required positional argument"),
        KeyError("labels"),
        OSError("Too many open files"),
        subprocess.CalledProcessError(1, "gcc"),
        type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})("shared memory"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}",
)
def test_machines_and_mistakes_end_the_stage(error):
    assert not comes_of_weights(error)
    calls = []

    def validation(model):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return model()

    with pytest.raises(type(error)), warnings.catch_warnings():
        warnings.simplefilter("error", FFKernelsNotice)
        run(validation)


@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_a_forward_that_raises_on_the_fast_path_has_no_sums_by_example(tiny_model, padded_batch):
    """A search that compares losses by example gets none where the forward raised."""

    def stage(raises):
        model = tiny_model("gpt_neox").requires_grad_(False)
        weight = model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.requires_grad_()
        start = weight.detach().clone()

        def check(module, inputs, output):
            if float((weight.detach() - start).abs().max()) > 0.02:
                return RAISING["ValueError"]() if raises else output * math.nan

        validation = ValidationLoss(model, [padded_batch(8, 16)])
        model.gpt_neox.layers[1].mlp.register_forward_hook(check)
        optimizer = torch.optim.SGD([weight], lr=1e-3)
        ff = FastForward(model, optimizer, validation, FastForwardConfig(interval=1, patience=None))
        model.eval()
        model(**padded_batch(8, 16)).loss.backward()
        optimizer.step()
        assert validation.example_counts is not None
        return weight.tolist(), ff.stages[0].tau, ff.stages[0].losses

    (_, kept, losses), expected = stage(raises=True), stage(raises=False)
    nan = losses.index(next(pair for pair in losses if math.isnan(pair[1])))
    assert repr(losses[: nan + 1]) == repr(expected[2][: nan + 1]) and nan > 1
    assert 0 < kept <= max(tau for tau, _ in losses[:nan])


@pytest.mark.parametrize("who", [[1], [0, 1]])
def test_all_ranks_take_it_alike(in_ranks, who):
    nan, raising = (
        [answer["value"] for answer in in_ranks(2, "slope_beyond", seconds=60, who=who, how=how)]
        for how in ("nan", "raise")
    )
    for rank in raising:
        assert "error" not in rank and rank == raising[0] == {**nan[0], "losses": rank["losses"]}
        assert repr(rank["losses"]) == repr(nan[0]["losses"]) and "nan" in repr(rank["losses"])
        assert rank["taus"][0] > 3 and rank["stopped"][1:] == [BASELINE_NOT_FINITE] * 2
