from dataclasses import replace
from functools import partial

from ffkernels.analysis.full_rank import VARIANTS, draw, full_rank

CONFIG = dict(stages=dict(interval=3), steps=12, lr=3e-4)
ANALYSIS = partial(full_rank, full_lr=2e-4)


def test_what_trains_in_each_variant(data):
    assert [run["variant"] for run in data["runs"]] == list(VARIANTS)
    assert [run["name"] for run in data["runs"]] == ["lora r=4", "lora r=32", "full-attention", "full"]
    assert [run["lr"] for run in data["runs"]] == [3e-4, 3e-4, 2e-4, 2e-4]
    low, high, attention, full = (run["trainable"] for run in data["runs"])
    assert (low, high) == (2 * 192 * 4, 2 * 192 * 32)
    # query_key_value 32 → 96 and dense 32 → 32 of two layers; with or without their biases.
    weights, biases = 2 * (32 * 96 + 32 * 32), 2 * (96 + 32)
    assert attention in (weights, weights + biases)
    # The embedding and the head, both 258 × 32, and the MLPs on top.
    assert full > attention + 2 * 258 * 32 + 2 * 2 * 32 * 64


def test_what_the_stages_took_is_counted(data):
    for run in data["runs"]:
        taus = [stage["tau"] for stage in run["ff"]["stages"]]
        assert run["ff_steps"] == sum(taus) and run["stages_without_a_step"] == taus.count(0)
        assert taus and run["ff"]["optimizer_steps"] <= 12
        steps = [stage["optimizer_step"] for stage in run["ff"]["stages"]]
        assert steps == list(range(3, 3 * len(taus) + 1, 3))


def test_the_picture(data, drawn):
    missed = [*data["runs"][:3], {**data["runs"][3], "ff": {**data["runs"][3]["ff"], "saved": None}}]
    taus, saved = drawn(draw, {**data, "runs": missed})
    for line, run in zip(taus.lines, data["runs"], strict=True):
        assert line.get_label() == run["name"]
        assert list(line.get_ydata()) == [stage["tau"] for stage in run["ff"]["stages"]]
    measured = [100 * run["ff"]["saved"]["measured"] for run in data["runs"][:3]]
    assert [bar.get_height() for bar in saved.patches[:4]] == [*measured, 0]
    assert [text.get_text() for text in saved.texts].count("–") == 2


def test_a_run_without_stages(config, drawn):
    data = full_rank(replace(config, steps=2))
    assert [run["ff"]["stages"] for run in data["runs"]] == [[]] * 4
    assert [run["ff_steps"] for run in data["runs"]] == [0] * 4
    drawn(draw, data)  # nothing to show is no error
