from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ffkernels.analysis.weight_plane import Plane, losses_on, plane_through, spans, weights_put_back


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
    from ffkernels.analysis import weight_plane

    told = []
    monkeypatch.setattr(weight_plane, "announce_once", lambda key, message: told.append(message))
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

    plane = plane_through(*torch.randn(3, size, dtype=torch.float64))
    before = [w.detach().clone() for w in weights]
    xs, ys = [-1.0, 0.25, 3.0], [0.0, -2.0]
    measured = losses_on(plane, xs, ys, weights, loss)
    expected = [[loss_at(plane.origin + x * plane.u + y * plane.v) for x in xs] for y in ys]
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(expected), rtol=1e-12, atol=0)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_weights_of_16_bits_are_rounded_once():
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    plane = Plane(torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1e-3, 1.0, 0.0]).double(), None)
    seen = []
    losses_on(plane, [1.0, 2.0], [0.0], [weight], lambda: seen.append(weight.detach().clone()) or 0.0)
    assert [s.tolist() for s in seen] == [plane.weights(x).bfloat16().tolist() for x in (1.0, 2.0)]


def test_weights_come_back_after_an_error():
    weights = [nn.Parameter(torch.tensor([math.pi, -0.0])), nn.Parameter(torch.tensor([[1e-45]]))]
    before = [w.detach().clone().view(torch.int32) for w in weights]

    def fails():
        raise RuntimeError("in the middle")

    plane = Plane(torch.zeros(3).double(), torch.ones(3).double(), None)
    with pytest.raises(RuntimeError, match="in the middle"):
        losses_on(plane, [1.0], [0.0], weights, fails)
    assert all(torch.equal(w.detach().view(torch.int32), b) for w, b in zip(weights, before, strict=True))
    with weights_put_back(weights) as write:
        write(torch.tensor([1.0, 2.0, 3.0]))
        assert weights[0].tolist() == [1.0, 2.0] and weights[1].tolist() == [[3.0]]
    assert torch.equal(weights[0].detach().view(torch.int32), before[0])


def test_spans_reach_beyond_all_points_and_no_axis_is_thin():
    xs, ys = spans([(0.0, 0.0), (4.0, 0.1), (1.0, -0.1)], grid=5, margin=0.25)
    assert xs == [-1.0, 0.5, 2.0, 3.5, 5.0]
    assert ys == pytest.approx([-1.8, -0.9, 0.0, 0.9, 1.8])  # 0.6 of the half width, 3
