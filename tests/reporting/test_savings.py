"""Savings of runs with known costs: see conftest for what a step and a validation cost."""

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


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ({5: 1.0}, 5),
        ({5: 1.0001}, 5),
        ({5: 1.00011}, None),  # the tolerance is the border
        ({5: 1.2, 8: 0.9, 12: 1.3, 16: 0.8}, 8),  # the first test loss at the target counts
        ({25: 1.0}, 25),  # a loss stays a loss
    ],
)
def test_the_first_test_loss_at_the_target_counts(write_log, losses, at):
    run = judge([write_log("adam", ADAM), write_log("linear", losses)])["linear"]
    assert (run.reason is None) == (at is not None)
    if at is not None:
        assert run.reached_at["optimizer_step"] == at
        assert run.saved == dict.fromkeys(COSTS, 1 - at / 20)


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
    logs = [write_log("adam", ADAM), write_log("linear", {0: 3.0, 4: 2.5}, steps=6, end=False)]
    row = judge(logs)["linear"].row
    assert (row["optimizer_steps"], row["test_loss"]) == (6, 2.5)
    assert row["flops"]["measured"] == 600 and row["seconds"]["total"] == 12.0


def test_each_seed_has_its_own_target(write_log):
    logs = [write_log(f"adam-s{seed}", {20: 1.0 + seed}, seed=seed) for seed in (0, 1)]
    logs += [write_log(f"linear-s{seed}", {5: 1.5, 10: 0.5}, seed=seed) for seed in (0, 1)]
    runs = judge(logs)
    assert runs["linear-s0"].saved["seconds"] == 0.5
    assert runs["linear-s1"].saved["seconds"] == 0.75


@pytest.mark.parametrize(
    ("adam", "linear", "another"),
    [
        ({}, {"lr": 1e-3, "batch_size": 16}, "lr and batch_size"),
        ({"test_examples": 5}, {"test_examples": 9}, "test_examples"),
        ({"warmup_steps": 0}, {"warmup_steps": 8}, "warmup_steps"),
        ({"max_grad_norm": None}, {"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"optimizer": "lora-plus", "fast_forward": None}, {"optimizer": "adamw"}, "optimizer"),
    ],
)
def test_runs_under_other_conditions_are_not_compared(write_log, adam, linear, another):
    other = judge([write_log("adam-s0", ADAM, **adam), write_log("linear-s0", REACHES, **linear)])[
        "linear-s0"
    ]
    assert other.reason == f"adam-s0 ran with another {another}"
    assert other.saved == dict.fromkeys(COSTS)
    lonely = judge([write_log("linear-s0", REACHES)])["linear-s0"]
    assert lonely.reason == "no Adam run under the same conditions"


def test_names_need_not_match_where_only_one_run_fits(write_log):
    adams = [write_log("adam-a", ADAM, seed=0), write_log("adam-b", ADAM, seed=1)]
    runs = judge([*adams, write_log("linear-x", REACHES, seed=1)])
    assert runs["linear-x"].adam is runs["adam-b"]
    unclear = judge([*adams, write_log("linear-y", REACHES)])["linear-y"]
    assert unclear.reason == "cannot tell which Adam run it belongs to: adam-a, adam-b"


@pytest.mark.parametrize(
    ("name", "stages", "config", "kind"),
    [
        ("adam-s0", False, {}, "adam"),
        ("adam-tuned-s0", False, {}, "adam-tuned"),
        ("b16-parabolic", False, {}, "parabolic"),
        ("adam-linear-ff", True, {}, "linear"),
        ("mine", True, {"fast_forward": {"search": "parabolic"}}, "parabolic"),
        ("plain", False, {"fast_forward": None}, "adam"),
        ("linear-schedule", False, {"fast_forward": None}, "adam"),
        ("not-parabolic", True, {"fast_forward": {"search": "linear"}}, "linear"),
        ("adam-killed-before-a-stage", False, {"fast_forward": {"search": "linear"}}, "linear"),
        ("adam-s0", False, {"optimizer": "lora-plus", "fast_forward": None}, "adam"),
        ("adam-tuned-s0", False, {"optimizer": "lora-plus", "fast_forward": None}, "adam-tuned"),
    ],
)
def test_kinds(write_log, name, stages, config, kind):
    assert kind_of(write_log(name, ADAM, stages={5: (1, TRIED)} if stages else None, **config)) == kind


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


def test_median_and_range_over_seeds(write_log):
    logs = [write_log(f"adam-s{seed}", {20: 1.0}, seed=seed) for seed in range(3)]
    linear = [write_log(f"linear-s{seed}", {5 + 5 * seed: 1.0}, seed=seed) for seed in range(3)]
    (spread,) = spreads(compare_runs(logs + linear, 0.0))
    assert (spread.kind, spread.count) == ("linear", 3)
    assert (spread.low["seconds"], spread.median["seconds"], spread.high["seconds"]) == (0.25, 0.5, 0.75)
    assert spread.entry() == {"name": "linear-median", **dict.fromkeys(COSTS, 0.5)}
    (none,) = spreads(compare_runs([*logs[:2], linear[0], write_log("linear-s1", {5: 2.0}, seed=1)], 0.0))
    reason = "no number for linear-s1"
    assert none.entry() == {"name": "linear-median", **dict.fromkeys(COSTS), "reason": reason}


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


def test_peers_have_medians_over_seeds(write_log):
    logs = [write_log(f"adam-s{seed}", ADAM) for seed in (0, 1)]
    peer = {"peer": "authors"}
    logs += [
        write_log(f"authors-s{n}", {at: 1.0}, stages={at: (1, TRIED)}, **peer) for n, at in enumerate((5, 10))
    ]
    (spread,) = spreads(compare_runs(logs, 1e-4))
    assert spread.kind == "authors" and spread.count == 2
    assert spread.entry()["name"] == "authors-median"
