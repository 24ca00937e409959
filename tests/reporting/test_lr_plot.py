"""The picture of a learning rate that was found: its two curves, and that it is written."""

import pytest

from ffkernels import Finding
from ffkernels.reporting.lr_plot import draw_finding, plot_finding

FOUND = Finding(
    lr=9e-3, lr_before=1e-4, rates=[1e-6, 4e-6, 1e-2, 9e-3], alignments=[None, -0.6, None, 0.1], rising=False
)


def test_rates_and_alignments_are_drawn_over_the_steps():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes, twin = draw_finding(FOUND, figure.add_subplot())
    (rates,), points = axes.lines, twin.lines[-1]
    assert list(rates.get_xdata()) == [1, 2, 3, 4] and list(rates.get_ydata()) == FOUND.rates
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([2, 4], [-0.6, 0.1])
    assert axes.get_yscale() == "log" and twin.get_yscale() == "linear"
    assert axes.get_legend().get_texts()[0].get_text() == "learning rate: 0.009"
    rising = Finding(4e-6, 1e-4, True, [1e-6, 4e-6], [None, -0.6])
    axes, _ = draw_finding(rising, figure.add_subplot())
    assert axes.get_legend().get_texts()[0].get_text() == "learning rate: 4e-06, still rising"


def test_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_finding(FOUND, tmp_path / "lr.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
