from __future__ import annotations

import pytest

from ffkernels.analysis import record
from ffkernels.analysis.show import finish, percent, than_adam


def test_shares():
    assert percent(0.425) == "42 %" and percent(-0.06) == "−6 %"
    assert than_adam(0.54) == "54 % fewer FLOPs than Adam (measured)"
    assert than_adam(-0.06) == "6 % more FLOPs than Adam (measured)"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (3, "3"),
        ("a [b]", "a [b]"),
        (0.000312345, "0.0003123"),
        (2e-7, "2e-7"),
    ],
)
def test_a_cell_of_the_table(cell, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "save", lambda *arguments: ("data", "picture"))
    finish("x", {}, lambda *_: None, {"out": tmp_path}, header=["one", "two"], rows=[["row", cell]], seen=[])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("row"))
    assert row.split(maxsplit=1)[1].strip() == text
