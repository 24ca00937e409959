"""The picture of a learning rate search: its points, what it marks, and what it leaves out."""

import math

import pytest

from ffkernels import Finding
from ffkernels.reporting.lr_plot import draw_finding, plot_finding

CURVE = [
    (0.0, 3.5),
    (1e-3, 3.2),
    (2e-3, 3.0),
    (4e-3, 2.8),
    (8e-3, 3.1),
    (16e-3, 9.0),
    (32e-3, math.inf),
    (5e-3, 2.7),
]


def finding(**values):
    return Finding(**{"lr": 5e-3, "tau": 4.0, "curve": CURVE, "evaluations": 9, **values})


def axes():
    return pytest.importorskip("matplotlib.figure").Figure().add_subplot()


def test_the_points_are_drawn_by_rising_learning_rate():
    drawn = draw_finding(finding(), axes())
    curve = next(line for line in drawn.lines if line.get_label() == "9 validation losses")
    assert list(curve.get_xdata()) == [1e-3, 2e-3, 4e-3, 5e-3, 8e-3]
    assert list(curve.get_ydata()) == [3.2, 3.0, 2.8, 2.7, 3.1]
    beyond = next(line for line in drawn.lines if line.get_label() == "off the scale")
    assert list(beyond.get_xdata()) == [16e-3, 32e-3]
    assert drawn.get_xscale() == "log"
    low, high = drawn.get_ylim()
    assert low < 2.7 and 3.5 < high < 4
    assert next(line for line in drawn.lines if line.get_label() == "found: 0.005").get_xdata() == [5e-3]


def test_a_warm_ups_step_and_the_base_rate_are_told_apart():
    labels = [line.get_label() for line in draw_finding(finding(lr=2e-2), axes()).lines]
    assert "found: 0.02 (the step's best: 0.005)" in labels


def test_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_finding(finding(), tmp_path / "lr.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no curve"):
        draw_finding(finding(curve=[(0.0, 3.5)]), axes())


def test_a_curve_that_never_falls_has_no_place_found():
    drawn = draw_finding(finding(curve=[(0.0, 3.5), (1e-3, 9.0), (5e-4, 8.0), (2e-4, math.inf)]), axes())
    labels = [line.get_label() for line in drawn.lines]
    assert "none lowers the loss: left at 0.005" in labels and not any("found" in x for x in labels)
    low, high = drawn.get_ylim()
    assert low < 3.5 < high
