from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("name", "more", "shown"),
    [
        ("gradients", ["--batches", "3"], ["consistency before", "Gradients of different batches agree"]),
        ("similarity", ["--window", "4"], ["all earlier steps", "A gradient's mean cosine"]),
        ("plane", ["--grid", "3", "--examples", "4"], ["W_FF", "the straight line from W_SGD to W_FF"]),
    ],
)
def test_a_command_prints_what_was_seen_and_writes_data_and_picture(analyze, name, more, shown):
    words, data = analyze(name, "--interval", "3", "--max-tau", "20", *more)
    for text in (*shown, f"{name}.json", f"{name}.png"):
        assert text in words
    assert data["config"]["steps"] == 8 and data["config"]["fast_forward"]["interval"] == 3
