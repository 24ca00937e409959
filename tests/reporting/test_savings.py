"""Savings of runs with known costs: see conftest for what a step and a validation cost."""

from __future__ import annotations

import math

import pytest

from ffkernels.reporting.plots import kind_label
from ffkernels.reporting.savings import COSTS, compare_runs, kind_of, spreads

ADAM = {0: 3.0, 10: 2.0, 20: 1.0}
TRIED = [(0, 2.0), (1, 1.5), (2, 1.6)]
REACHES = {0: 3.0, 5: 1.0001}


def judge(logs, tolerance=1e-4):
    return {run.name: run for run in compare_runs(logs, tolerance)}


def test_savings_by_hand(write_log):
    runs = judge(
        [
            write_log("parabolic-s0", REACHES, stages={5: (1, TRIED)}),
            write_log("adam-s0", ADAM),
            write_log("adam-tuned-s0", {0: 3.0, 4: 0.9}, lr=3e-3),
        ]
    )
    assert list(runs) == ["adam-s0", "parabolic-s0", "adam-tuned-s0"]
    assert runs["adam-s0"].saved is None and runs["adam-s0"].target == 1.0 + 1e-4
    # Adam: 20 steps are 2000 FLOPs measured, 3000 paper, 40 s. The other: 5 steps, 3 validations.
    assert runs["parabolic-s0"].entry() == {
        "name": "parabolic-s0",
        "flops_paper": 1 - (5 * 150 + 30) / 3000,
        "flops_measured": 1 - (5 * 100 + 30) / 2000,
        "seconds": 1 - (5 * 2 + 0.75) / 40,
    }
    assert runs["adam-tuned-s0"].saved == dict.fromkeys(COSTS, 1 - 4 / 20)


def test_a_row_holds_what_the_end_says(write_log):
    row = judge([write_log("linear", REACHES, stages={3: (2, TRIED), 5: (0, TRIED[:2])})])["linear"].row
    assert row == {
        "name": "linear",
        "optimizer_steps": 5,
        "test_loss": 1.0001,
        "flops": {"paper": 5 * 150 + 50, "measured": 5 * 100 + 50},
        "seconds": {"train": 10.0, "validate": 1.25, "move": 0.0, "other": 0.0, "total": 11.25},
        "validation_forwards": 5,
        "stages": 2,
    }


@pytest.mark.parametrize(("loss", "reached"), [(1.0, True), (1.0001, True), (1.00011, False)])
def test_the_tolerance_is_the_border(write_log, loss, reached):
    run = judge([write_log("adam", ADAM), write_log("linear", {5: loss})])["linear"]
    assert (run.reason is None) == reached


def test_the_first_test_loss_at_the_target_counts(write_log):
    run = judge([write_log("adam", ADAM), write_log("linear", {5: 1.2, 8: 0.9, 12: 1.3, 16: 0.8})])["linear"]
    assert run.reached_at["optimizer_step"] == 8
    assert run.saved["seconds"] == 1 - 8 / 20


def test_a_loss_stays_a_loss(write_log):
    run = judge([write_log("adam", ADAM), write_log("linear", {25: 1.0})])["linear"]
    assert run.saved == dict.fromkeys(COSTS, -0.25)


def test_not_reached_is_null_with_the_reason(write_log):
    run = judge([write_log("adam", ADAM), write_log("linear", {5: math.nan, 10: 1.5, 20: 1.7})])["linear"]
    reason = "did not reach test loss 1.0001; the best was 1.5000"
    assert run.entry() == {"name": "linear", **dict.fromkeys(COSTS), "reason": reason}


def test_an_unfinished_or_diverged_adam_sets_no_target(write_log):
    for adam in (write_log("adam", ADAM, end=False), write_log("adam", {0: 3.0, 20: math.nan})):
        run = judge([adam, write_log("linear", REACHES)])["linear"]
        assert run.saved == dict.fromkeys(COSTS)
        assert run.reason == "adam did not end with a finite test loss"


def test_an_unfinished_run_counts_up_to_its_last_event(write_log):
    run = judge([write_log("adam", ADAM), write_log("linear", {0: 3.0, 4: 2.5}, steps=6, end=False)])[
        "linear"
    ]
    assert (run.row["optimizer_steps"], run.row["test_loss"]) == (6, 2.5)
    assert run.row["flops"]["measured"] == 600 and run.row["seconds"]["total"] == 12.0


def test_each_seed_has_its_own_target(write_log):
    logs = [write_log(f"adam-s{seed}", {20: 1.0 + seed}, seed=seed) for seed in (0, 1)]
    logs += [write_log(f"linear-s{seed}", {5: 1.5, 10: 0.5}, seed=seed) for seed in (0, 1)]
    runs = judge(logs)
    assert runs["linear-s0"].saved["seconds"] == 0.5
    assert runs["linear-s1"].saved["seconds"] == 0.75


def test_runs_under_other_conditions_are_not_compared(write_log):
    adam = write_log("adam-s0", ADAM)
    other = judge([adam, write_log("linear-s0", REACHES, lr=1e-3, batch_size=16)])["linear-s0"]
    assert other.reason == "adam-s0 ran with another lr and batch_size"
    assert other.saved == dict.fromkeys(COSTS)
    lonely = judge([write_log("linear-s0", REACHES)])["linear-s0"]
    assert lonely.reason == "no Adam run under the same conditions"


def test_names_need_not_match_where_only_one_run_fits(write_log):
    adams = [write_log("adam-a", ADAM, seed=0), write_log("adam-b", ADAM, seed=1)]
    runs = judge([*adams, write_log("linear-x", REACHES, seed=1)])
    assert runs["linear-x"].adam is runs["adam-b"]
    unclear = judge([*adams, write_log("linear-y", REACHES)])["linear-y"]
    assert unclear.reason == "cannot tell which Adam run it belongs to: adam-a, adam-b"


def test_kinds(write_log):
    stages = {5: (1, TRIED)}
    assert kind_of(write_log("adam-s0", ADAM)) == "adam"
    assert kind_of(write_log("adam-tuned-s0", ADAM)) == "adam-tuned"
    assert kind_of(write_log("b16-parabolic", ADAM)) == "parabolic"
    assert kind_of(write_log("adam-linear-ff", ADAM, stages=stages)) == "linear"
    assert (
        kind_of(write_log("mine", ADAM, stages=stages, fast_forward={"search": "parabolic"})) == "parabolic"
    )
    assert kind_of(write_log("plain", ADAM, fast_forward=None)) == "adam"
    assert kind_of(write_log("linear-schedule", ADAM, fast_forward=None)) == "adam"
    searched = {"search": "linear"}
    assert kind_of(write_log("not-parabolic", ADAM, stages=stages, fast_forward=searched)) == "linear"
    assert kind_of(write_log("adam-killed-before-a-stage", ADAM, fast_forward=searched)) == "linear"


def test_a_run_with_no_rate_given_is_held_to_adam_at_any_rate(write_log):
    stages = {"interval": 6, "learning_rate": "auto", "search": "linear"}
    logs = [
        write_log("adam-s0", ADAM, lr=3e-4),
        write_log("adam-tuned-s0", {0: 3.0, 4: 0.9}, lr=3e-3),
        write_log("auto-s0", REACHES, alignments=[None] * 5),
        write_log("run", REACHES, alignments=[None] * 5, fast_forward=stages),
    ]
    runs = judge(logs)
    assert [(run.kind, run.lr) for run in runs.values()] == [
        ("adam", 3e-4), ("linear", None), ("auto", None), ("adam-tuned", 3e-3)
    ]  # fmt: skip
    assert [kind_label(runs[name]) for name in ("run", "auto-s0")] == [
        "Fast Forward, linear, no learning rate given", "Adam, no learning rate given"
    ]  # fmt: skip
    assert runs["run"].saved == runs["auto-s0"].saved == dict.fromkeys(COSTS, 1 - 5 / 20)
    other = judge([logs[0], write_log("auto-s0", REACHES, alignments=[None] * 5, batch_size=16)])["auto-s0"]
    assert other.reason == "adam-s0 ran with another batch_size"


def test_runs_of_any_name_find_their_adam_run(write_log):
    forward = {"search": "parabolic"}
    runs = judge(
        [
            write_log("baseline", ADAM, fast_forward=None),
            write_log("other-lr", ADAM, fast_forward=None, lr=1e-2),
            write_log("run", REACHES, stages={5: (1, TRIED)}, fast_forward=forward),
        ]
    )
    assert runs["run"].adam.name == "baseline" and runs["run"].saved["seconds"] > 0.5
    assert runs["baseline"].saved is None and runs["other-lr"].saved is None


@pytest.mark.parametrize(
    ("setting", "values"),
    [("test_examples", (5, 9)), ("warmup_steps", (0, 8)), ("max_grad_norm", (None, 1.0))],
)
def test_other_conditions_do_not_compare(write_log, setting, values):
    adam = write_log("adam-s0", ADAM, **{setting: values[0]})
    run = judge([adam, write_log("linear-s0", REACHES, **{setting: values[1]})])["linear-s0"]
    assert run.saved == dict.fromkeys(COSTS)
    assert run.reason == f"adam-s0 ran with another {setting}"


def test_median_and_range_over_seeds(write_log):
    logs = [write_log(f"adam-s{seed}", {20: 1.0}, seed=seed) for seed in range(3)]
    logs += [write_log(f"linear-s{seed}", {5 + 5 * seed: 1.0}, seed=seed) for seed in range(3)]
    (spread,) = spreads(compare_runs(logs, 0.0))
    assert (spread.kind, spread.count) == ("linear", 3)
    assert (spread.low["seconds"], spread.median["seconds"], spread.high["seconds"]) == (0.25, 0.5, 0.75)
    assert spread.entry() == {"name": "linear-median", **dict.fromkeys(COSTS, 0.5)}


def test_no_median_where_a_seed_has_no_number(write_log):
    logs = [write_log(f"adam-s{seed}", {20: 1.0}, seed=seed) for seed in range(2)]
    logs += [write_log(f"linear-s{seed}", {5: 1.0 + seed}, seed=seed) for seed in range(2)]
    (spread,) = spreads(compare_runs(logs, 0.0))
    assert spread.entry() == {
        "name": "linear-median",
        **dict.fromkeys(COSTS),
        "reason": "no number for linear-s1",
    }


def test_wrong_input_is_named(write_log):
    log = write_log("adam", ADAM)
    with pytest.raises(ValueError, match="named adam"):
        compare_runs([log, log], 0.0)
    for wrong in (-1e-4, math.nan):
        with pytest.raises(ValueError, match="target_tolerance"):
            compare_runs([log], wrong)


def test_peers_and_lora_plus_are_held_to_adam_too(write_log):
    logs = [
        write_log("lora-plus-s0", {0: 3.0, 4: 0.9}, optimizer="lora-plus", fast_forward=None),
        write_log("adam-tuned-s0", {0: 3.0, 4: 0.9}, lr=3e-3, optimizer="adamw", fast_forward=None),
        write_log("some-peer-s0", REACHES, stages={5: (1, TRIED)}, optimizer="adamw", peer="some-peer"),
        write_log("authors-s0", REACHES, stages={5: (1, TRIED)}, optimizer="adamw", peer="authors"),
        write_log("parabolic-s0", REACHES, stages={5: (1, TRIED)}, optimizer="adamw"),
        write_log("adam-s0", ADAM, optimizer="adamw", fast_forward=None),
    ]
    runs = judge(logs)
    kinds = ["adam", "parabolic", "authors", "some-peer", "lora-plus", "adam-tuned"]
    assert [run.kind for run in runs.values()] == kinds
    assert runs["authors-s0"].saved == runs["some-peer-s0"].saved == runs["parabolic-s0"].saved
    assert runs["lora-plus-s0"].saved["seconds"] == 1 - 4 / 20


def test_a_comparison_of_lora_plus_runs_has_its_baseline(write_log):
    options = {"optimizer": "lora-plus", "fast_forward": None}
    assert kind_of(write_log("adam-s0", ADAM, **options)) == "adam"
    assert kind_of(write_log("adam-tuned-s0", ADAM, **options)) == "adam-tuned"
    run = judge([write_log("adam-s0", ADAM, **options), write_log("linear-s0", REACHES, optimizer="adamw")])
    assert run["linear-s0"].reason == "adam-s0 ran with another optimizer"


def test_peers_have_medians_over_seeds(write_log):
    logs = [write_log(f"adam-s{seed}", ADAM) for seed in (0, 1)]
    logs += [
        write_log(f"authors-s{seed}", {at: 1.0}, stages={at: (1, TRIED)}, peer="authors")
        for seed, at in ((0, 5), (1, 10))
    ]
    (spread,) = spreads(compare_runs(logs, 1e-4))
    assert spread.kind == "authors" and spread.count == 2
    assert spread.entry()["name"] == "authors-median"
