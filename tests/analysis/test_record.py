from __future__ import annotations

import json
import re

from ffkernels.analysis.record import save


def draw(figure, data):
    figure.add_subplot().plot(data["x"], data["y"])


def test_data_and_picture_with_where_they_come_from(tmp_path):
    data = {"x": (1, 2, 3), "y": [0.5, float("nan"), float("inf")], "config": {"lr": 1e-4}}
    written, picture = save("sweep", data, draw, tmp_path / "new", "ffkernels analyze sweep")
    assert (written.name, picture.name) == ("sweep.json", "sweep.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    record = json.loads(written.read_text(encoding="utf-8"))
    assert list(record) == ["analysis", "command", "date", "machine", "versions", "data"]
    assert record["analysis"] == "sweep" and record["command"] == "ffkernels analyze sweep"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ", record["date"])
    assert record["data"] == {"x": [1, 2, 3], "y": [0.5, None, None], "config": {"lr": 1e-4}}
    assert record["machine"]["cores"] >= 1 and record["versions"]["torch"]


def test_older_files_are_replaced(tmp_path):
    for x in ((1, 2), (3, 4)):
        written, _ = save("sweep", {"x": x, "y": x}, draw, tmp_path, "")
    assert json.loads(written.read_text(encoding="utf-8"))["data"]["x"] == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json", "sweep.png"]
