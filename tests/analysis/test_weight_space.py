import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ffkernels.analysis import weight_space
from ffkernels.analysis.weight_space import (
    Plane,
    cosines,
    flat,
    flat_gradient,
    gradients_of,
    inner_products,
    losses_at,
    plane_through,
    spans,
)
from ffkernels.training.session import open_session


def test_flat_copies_in_order():
    tensors = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, torch.tensor(5.0, dtype=torch.bfloat16)]
    vector = flat(tensors)
    assert vector.tolist() == [1.0, 3.0, 2.0, 4.0, 5.0] and vector.dtype == torch.float32
    vector.zero_()
    assert tensors[0][0, 0] == 1.0


def test_a_weight_without_gradient_counts_as_zero():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    (2.0 * weights[1]).sum().backward()
    assert flat_gradient(weights).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("slice_", [7, 1 << 20])
def test_cosines_are_torchs_in_float64(monkeypatch, slice_):
    monkeypatch.setattr(weight_space, "_SLICE", slice_)
    torch.manual_seed(0)
    rows = torch.randn(5, 101) + 0.5
    expected = F.cosine_similarity(rows.double()[:, None], rows.double()[None], dim=-1)
    torch.testing.assert_close(cosines(rows), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(inner_products(rows, rows[:2]), rows.double() @ rows[:2].double().T)


def test_products_are_accumulated_in_float64():
    ones = torch.ones(1, 100_000)
    ones[0, 0] = 2.0**26  # float32 would lose every 1 that is added to its square
    assert float(inner_products(ones, ones)) == 2.0**52 + 99_999


def test_a_zero_vector_has_no_cosine():
    assert torch.isnan(cosines(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))[0]).all()


def test_the_gradient_is_a_training_steps_and_leaves_no_trace(run_of):
    config = run_of(dropout=0.5, micro_batch_size=3)
    with open_session(config) as session:
        random = torch.get_rng_state()
        gradient, again = gradients_of(session, [session.load(0)] * 2)
        assert not torch.equal(gradient, again)  # another draw of dropout
        assert torch.equal(torch.get_rng_state(), random)
        assert all(w.grad is None for w in session.trainable)
        session.backward(session.load(0))
        assert torch.equal(flat_gradient(session.trainable), gradient)


@pytest.fixture
def points():
    torch.manual_seed(0)
    start = torch.randn(53)
    return start, start + torch.randn(53), start + torch.randn(53)


def test_the_axes_are_orthonormal_and_the_points_are_where_they_project(points):
    plane = plane_through(*points)
    axes = torch.stack([plane.u, plane.v])
    torch.testing.assert_close(axes @ axes.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-15)
    start, sgd, ff = (p.double() for p in points)
    assert plane.at(start) == (0.0, 0.0)
    x, y = plane.at(sgd)
    assert x == pytest.approx(float((sgd - start).norm())) and y == pytest.approx(0, abs=1e-14)
    for point in (sgd, ff):
        torch.testing.assert_close(plane.weights(*plane.at(point)), point, rtol=0, atol=1e-14)
    assert plane.at(ff)[1] > 0


def test_a_point_off_the_plane_projects_to_the_nearest_one(points):
    plane = plane_through(*points)
    away = torch.randn(53, dtype=torch.float64)
    away -= (away @ plane.u) * plane.u + (away @ plane.v) * plane.v
    assert plane.at(plane.weights(0.3, -1.7) + away) == pytest.approx((0.3, -1.7))


def test_points_that_nearly_lie_on_a_line_still_get_an_orthogonal_axis():
    torch.manual_seed(1)
    along, across = torch.randn(2, 1000, dtype=torch.float64)
    plane = plane_through(torch.zeros(1000), along, 3 * along + 1e-3 * across)
    assert abs(float(plane.u @ plane.v)) < 1e-15


@pytest.mark.parametrize(
    ("sgd", "ff", "axis", "said"),
    [
        ([2.0, 0.0], [5.0, 0.0], [1.0, 0.0], "W_FF lies on the line"),
        ([2.0, 0.0], [-1.0, 0.0], [1.0, 0.0], "W_FF lies on the line"),
        ([0.0, 2.0], [0.0, 2.0], [0.0, 1.0], "W_FF lies on the line"),
        ([0.0, 2.0], [0.0, 0.0], [0.0, 1.0], "W_FF lies on the line"),
        ([0.0, 0.0], [0.0, 3.0], [0.0, 1.0], "W_SGD is where training started"),
        ([2.0, 0.0], [5.0, 1e-5], [1.0, 0.0], "W_FF lies on the line"),
    ],
)
def test_three_points_on_a_line_give_a_line_and_say_so(monkeypatch, sgd, ff, axis, said):
    told = []
    monkeypatch.setattr(weight_space, "announce_once", lambda key, message: told.append(message))
    plane = plane_through(torch.zeros(2), torch.tensor(sgd), torch.tensor(ff))
    assert plane.v is None and plane.u.tolist() == axis
    assert len(told) == 1 and said in told[0]
    assert plane.at(torch.tensor([3.0, 4.0])) == (3.0 if axis[0] else 4.0, 0.0)
    assert plane.weights(-2.0).tolist() == [-2.0 * a for a in axis]


def test_weights_that_never_moved_are_an_error():
    same = torch.ones(4)
    with pytest.raises(ValueError, match="the runs did not move"):
        plane_through(same, same.clone(), same.clone())


def test_the_losses_of_a_quadratic_are_its_closed_form():
    """L(W) = ½ (W − c)ᵀ H (W − c) on two tensors of odd shapes, in float64."""
    torch.manual_seed(2)
    weights = [nn.Parameter(torch.randn(3, 5).double()), nn.Parameter(torch.randn(7).double())]
    size = 22
    root = torch.randn(size, size, dtype=torch.float64)
    hessian, centre = root @ root.T, torch.randn(size, dtype=torch.float64)

    def loss_at(vector):
        return float(0.5 * (vector - centre) @ hessian @ (vector - centre))

    def loss():
        return loss_at(torch.cat([w.detach().reshape(-1) for w in weights]))

    before = [w.detach().clone() for w in weights]
    vectors = list(torch.randn(3, size, dtype=torch.float64))
    measured = losses_at(iter(vectors), weights, loss)
    assert measured == pytest.approx([loss_at(vector) for vector in vectors], rel=1e-12)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_weights_of_16_bits_are_rounded_once():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    plane = Plane(torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1e-3, 1.0, 0.0]).double(), None)
    vectors, seen = [plane.weights(x) for x in (1.0, 2.0)], []
    losses_at(vectors, [weight], lambda: seen.append(weight.tolist()) or 0.0)
    assert seen == [vector.bfloat16().tolist() for vector in vectors]


def test_weights_come_back_after_an_error():
    weights = [nn.Parameter(torch.tensor([math.pi, -0.0])), nn.Parameter(torch.tensor([[1e-45]]))]
    before = [w.detach().clone().view(torch.int32) for w in weights]

    def fails():
        assert weights[0].tolist() == [1.0, 2.0] and weights[1].tolist() == [[3.0]]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        losses_at([torch.tensor([1.0, 2.0, 3.0])], weights, fails)
    assert all(torch.equal(w.detach().view(torch.int32), b) for w, b in zip(weights, before, strict=True))


def test_spans_reach_beyond_all_points_and_no_axis_is_thin():
    xs, ys = spans([(0.0, 0.0), (4.0, 0.1), (1.0, -0.1)], grid=5, margin=0.25)
    assert xs == [-1.0, 0.5, 2.0, 3.5, 5.0]
    assert ys == pytest.approx([-1.8, -0.9, 0.0, 0.9, 1.8])  # 0.6 of the half width, 3
