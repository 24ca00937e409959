import json

import pytest
import torch
import torch.nn.functional as F

from ffkernels.analysis.gradient_similarity import (
    CosineHistory,
    draw,
    gradient_similarity,
    summary,
    what_was_seen,
)
from ffkernels.analysis.weight_space import flat, flat_gradient
from ffkernels.training.session import open_session, waiting_stages


@pytest.mark.parametrize("window", [1, 3, 7, 20])
def test_history_is_the_cosine_matrix(window):
    torch.manual_seed(0)
    vectors = torch.randn(9, 41)
    history = CosineHistory(window)
    rows = [history.add(v) for v in vectors]
    v = vectors.double()
    for t, row in enumerate(rows):
        earlier = range(max(0, t - window), t)
        assert row == pytest.approx(
            [float(F.cosine_similarity(v[t], v[s], dim=0)) for s in earlier], abs=1e-14
        )
    assert history.nbytes == min(window, 9) * 41 * 4


def test_a_zero_vector_has_no_cosine():
    history = CosineHistory(2)
    history.add(torch.zeros(3))
    assert history.add(torch.ones(3)) == [None]
    assert history.add(torch.zeros(3)) == [None, None]
    assert history.add(-torch.ones(3)) == [pytest.approx(-1.0), None]


def test_summary_tells_across_a_stage_from_within():
    rows = [[], [0.9], [0.1, 0.3], [0.2, 0.4, 0.8], [None, None, None, None]]
    found = summary(rows, [[2, 5], [3, 0]])
    assert found == {
        "previous": pytest.approx((0.9 + 0.3 + 0.8) / 3),
        "earlier": pytest.approx((0.9 + 0.1 + 0.3 + 0.2 + 0.4 + 0.8) / 6),
        "across": pytest.approx(0.3),  # rows[2]: the first after the stage that followed step 2
        "within": pytest.approx((0.9 + 0.8) / 2),
    }
    assert summary([[]], []) == {"previous": None, "earlier": None, "across": None, "within": None}


CONFIG = dict(stages=dict(interval=3, max_tau=30), steps=8)
ANALYSIS = gradient_similarity


def test_rows_are_cosines_of_the_runs_own_gradients_and_updates(config, data):
    gradients, updates = [], []
    with open_session(config, attach=waiting_stages) as session:
        for step in range(8):
            session.backward(session.load(step))
            gradients.append(flat_gradient(session.trainable).double())
            before = flat(session.trainable)
            session.update(step)
            updates.append((flat(session.trainable) - before).double())
            session.ff.run_due_stage()
        taus = [[stage.optimizer_step, stage.tau] for stage in session.ff.stages]
    run = data["fast_forward"]
    assert run["stages"] == taus and [step for step, _ in taus] == [3, 6] and taus[0][1] > 0
    for rows, vectors in ((run["gradients"], gradients), (run["updates"], updates)):
        for t, row in enumerate(rows):
            expected = [float(F.cosine_similarity(vectors[t], vectors[s], dim=0)) for s in range(t)]
            assert row == pytest.approx(expected, abs=1e-12)


def test_the_runs_part_at_the_first_stage_and_not_before(data):
    adam, ff = data["adam"], data["fast_forward"]
    assert adam["stages"] == [] and adam["across"] is None
    assert adam["losses"][:3] == ff["losses"][:3] and adam["losses"][3] != ff["losses"][3]
    assert adam["gradients"][:3] == ff["gradients"][:3] and adam["updates"][:3] == ff["updates"][:3]
    assert adam["gradients"][3] != ff["gradients"][3]
    assert ff["across"] < ff["within"]
    assert data["config"]["fast_forward"]["interval"] == 3
    json.dumps(data, allow_nan=False)


def test_a_window_keeps_less_and_changes_nothing_else(config, data):
    narrow = gradient_similarity(config, window=2)
    size = data["trainable"]
    assert (data["window"], data["bytes_kept"]) == (8, 2 * 8 * 4 * size)
    assert (narrow["window"], narrow["bytes_kept"]) == (2, 2 * 2 * 4 * size)
    for name in ("adam", "fast_forward"):
        assert narrow[name]["gradients"] == [
            pytest.approx(row[-2:], abs=1e-14) for row in data[name]["gradients"]
        ]


def test_what_was_seen_follows_the_data(data):
    adam = {**data["adam"], "previous": 0.9, "earlier": 0.8}
    ff = {**data["fast_forward"], "previous": 0.5, "earlier": -0.25, "across": -0.125, "within": 0.75}
    seen = what_was_seen({**data, "adam": adam, "fast_forward": ff})
    assert "with the step before's is 0.50 with Fast Forward and 0.90 with Adam alone." in seen[0]
    assert "is -0.25 with Fast Forward" in seen[1]
    assert "is -0.12 where a stage lies between, lower than the 0.75" in seen[2]
    assert f"{data['bytes_kept'] / 1e6:.1f} MB" in seen[-1]
    still = what_was_seen({**data, "fast_forward": {**ff, "across": None}})
    assert "No stage moved the weights" in still[2]
    higher = what_was_seen({**data, "fast_forward": {**ff, "across": 0.8}})
    assert "not lower than the 0.75" in higher[2]


def test_the_picture(data, drawn):
    adam, ff, _, gradients, updates = drawn(draw, data)
    for axes, of in ((gradients, "gradients"), (updates, "updates")):
        drawn = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 7]
        assert drawn == [[row[-1] for row in data[run][of][1:]] for run in ("adam", "fast_forward")]
    for axes, run in ((adam, "adam"), (ff, "fast_forward")):
        matrix = axes.images[0].get_array()
        assert matrix[7, :7].tolist() == data[run]["gradients"][7] and matrix[0].mask.all()
