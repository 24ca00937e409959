import json
import re
from types import SimpleNamespace

import pytest

from ffkernels.analysis.show import finish, than_adam
from ffkernels.reporting.numbers import percent


def analysis(cell=None, seen=()):
    def draw(figure, data):
        figure.add_subplot().plot(data["x"], data["y"])

    return SimpleNamespace(
        table=lambda data: (["one", "two"], [["row", cell]]), what_was_seen=lambda data: seen, draw=draw
    )


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
def test_a_cell_of_the_table(cell, text, tmp_path, capsys):
    finish("x", {"x": [], "y": []}, analysis(cell), tmp_path)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("row"))
    assert row.split(maxsplit=1)[1].strip() == text


def test_a_minus_stands_before_a_number_alone(tmp_path, capsys):
    finish("x", {"x": [], "y": []}, analysis(seen=["It is -0.25: raise --steps."]), tmp_path)
    assert "It is −0.25: raise --steps." in capsys.readouterr().out


def test_data_and_picture_with_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ffkernels", "analyze", "sweep"])
    data = {"x": (1, 2, 3), "y": [0.5, float("nan"), float("inf")], "config": {"lr": 1e-4}}
    finish("sweep", data, analysis(), tmp_path / "new")
    written, picture = sorted((tmp_path / "new").iterdir())
    assert (written.name, picture.name) == ("sweep.json", "sweep.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    record = json.loads(written.read_text(encoding="utf-8"))
    assert list(record) == ["analysis", "command", "date", "machine", "versions", "data"]
    assert record["analysis"] == "sweep" and record["command"] == "ffkernels analyze sweep"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ", record["date"])
    assert record["data"] == {"x": [1, 2, 3], "y": [0.5, None, None], "config": {"lr": 1e-4}}
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"]
    finish("sweep", {"x": (3, 4), "y": (3, 4)}, analysis(), tmp_path / "new")  # older files are replaced
    assert json.loads(written.read_text(encoding="utf-8"))["data"]["x"] == [3, 4]
    assert len(list((tmp_path / "new").iterdir())) == 2
