"""The report's files and words, from runs with known numbers."""

import io
import json
import math
import os
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

from ffkernels.reporting.plots import (
    accepted,
    draw_learning_rates,
    draw_walk,
    flop_unit,
    kind_label,
    style_of,
    walk,
)
from ffkernels.reporting.report import build_report, print_table
from ffkernels.reporting.savings import compare_runs

ALIGNED = [-0.5, -0.6, 0.1, None, -0.2, -0.1, 0.0]
TRIED = [(0, 2.0), (1, 1.8), (2, 1.6), (4, 1.9), (3, 1.5)]
PICTURES = ["test_loss_flops", "test_loss_seconds", "tau", "learning_rate", "training"]


@pytest.fixture
def logs(write_log):
    """Adam and the rows held to it; the parabolic search saves 1 − 550/2000 of the measured FLOPs."""
    return [
        write_log("adam-s0", {0: 3.0, 10: 2.0, 20: 1.0}, seed=0),
        write_log(
            "linear-s0", {0: 3.0, 10: 1.5, 20: 1.2}, seed=0, stages={10: (3, TRIED), 16: (0, [(0, 1.0)])}
        ),
        write_log("parabolic-s0", {0: 3.0, 5: 0.9}, seed=0, stages={5: (3, TRIED)}),
        write_log("auto-s0", {0: 3.0, 8: 0.8}, seed=0, alignments=[None, *ALIGNED]),
        write_log("adam-tuned-s0", {0: 3.0, 4: 0.9}, seed=0, lr=3e-3),
    ]


def shape(value):
    return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else type(value)


def test_report_json_keeps_its_schema(logs, tmp_path):
    report = build_report(logs, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data == report.data
    assert list(data) == ["runs", "savings", "machine", "versions", "config"]
    names = ["adam-s0", "linear-s0", "parabolic-s0", "auto-s0", "adam-tuned-s0"]
    assert [run["name"] for run in data["runs"]] == names
    for run in data["runs"]:
        assert shape(run) == {
            "name": str,
            "optimizer_steps": int,
            "test_loss": float,
            "flops": {"paper": int, "measured": int},
            "seconds": dict.fromkeys(("train", "validate", "move", "other", "total"), float),
            "validation_forwards": int,
            "stages": int,
        }
    linear, parabolic, auto, tuned = data["savings"]
    assert parabolic == {
        "name": "parabolic-s0",
        "flops_paper": 1 - 800 / 3000,
        "flops_measured": 1 - 550 / 2000,
        "seconds": 1 - 11.25 / 40,
    }
    assert (auto["flops_measured"], tuned["flops_measured"]) == (0.6, 0.8)
    assert linear["flops_measured"] is None and linear["reason"].startswith("did not reach")
    assert data["machine"] == {"cpu": "toy", "threads": 1}
    assert data["versions"] == {"torch": "2", "git_commit": "abc"}
    assert data["config"] == {"lr": 1e-4, "batch_size": 8, "seed": 0, "fast_forward": {}}


def test_the_given_config_wins_and_tells_the_tolerance(logs, tmp_path):
    config = {"lr": 1e-4, "tolerance": 0.3, "out": "/home/me/runs", "data": "/home/me/chat.jsonl"}
    report = build_report(logs, tmp_path, config=config)
    told = {"lr": 1e-4, "tolerance": 0.3, "data": "chat.jsonl"}
    assert report.data["config"] == {**told, "fast_forward": {}}
    assert report.data["savings"][0]["flops_measured"] == 1 - 2060 / 2000  # linear reaches 1.3 at step 20
    assert (
        build_report(logs, tmp_path, target_tolerance=0.0, config=config).data["savings"][0]["seconds"]
        is None
    )


def test_fast_forward_s_settings_come_from_the_runs_that_have_them(write_log, tmp_path):
    forward = {"interval": 6, "search": "linear"}
    logs = [
        write_log(*run, fast_forward=f)
        for *run, f in (("adam", {5: 1.0}, None), ("linear", {3: 1.0}, forward))
    ]
    assert build_report(logs, tmp_path).data["config"]["fast_forward"] == {"interval": 6}
    assert "Fast Forward: interval 6." in (tmp_path / "report.md").read_text()


def test_what_is_not_finite_becomes_null_and_a_run_killed_at_once_is_reported(write_log, tmp_path):
    build_report([write_log("adam", {0: 3.0, 5: math.nan})], tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["test_loss"] is None
    assert "| – |" in (tmp_path / "report.md").read_text()
    report = build_report([write_log("adam", {}, steps=0, end=False)], tmp_path)
    assert report.data["runs"][0]["test_loss"] is None
    assert any("adam has no end in its log" in line for line in report.caveats)


def test_pictures_are_drawn_and_not_empty(logs, tmp_path):
    from matplotlib.image import imread

    report = build_report(logs, tmp_path)
    assert [path.name for path in report.files[2:]] == [f"{stem}.png" for stem in PICTURES]
    for path in report.files[2:]:
        pixels = imread(path)[..., :3]
        assert pixels.shape[0] >= 600 and pixels.shape[1] == 1080  # 7.2 inches at 150 dpi
        colours = {tuple(colour) for colour in (pixels[::3, ::3].reshape(-1, 3) * 255).astype(int).tolist()}
        assert len(colours) > 20
    assert [path for path in report.files if not path.is_file()] == []


def test_runs_without_stages_have_no_pictures_of_them(write_log, tmp_path):
    report = build_report([write_log("mine", {0: 3.0, 5: 2.0})], tmp_path)
    assert [path.name for path in report.files[2:]] == ["test_loss_flops.png", "test_loss_seconds.png"]
    assert report.data["savings"] == []


def test_markdown_tells_the_whole_story(logs, tmp_path):
    build_report(logs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    for expected in (
        "lr 0.0001, batch_size 8",
        "| parabolic-s0 | 0.0001 | 5 | 1 | 5 | 0.9000 | 550 | 11.2 | 72.5 % | 73.3 % | 71.9 % |",
        "| auto-s0 | auto | 8 | 0 | 0 | 0.8000 | 800 | 16.0 | 60.0 % | 60.0 % | 60.0 % |",
        "| linear-s0 | 0.0001 | 20 | 2 | 6 | 1.2000 | 2060 | 41.5 | not reached | – | – |",
        "FLOPs saved, measured",
        "FLOPs saved, paper",
        "flatters Fast Forward",
        "at the same learning rate",
        "linear-s0 has no saving: did not reach test loss 1.0001; the best was 1.2000.",
        "Adam at a tuned learning rate (0.003) saves 80.0 % of the FLOPs (measured) and 80.0 % of the time",
        "Fast Forward parabolic 72.5 % of the FLOPs (measured) and 71.9 % of the time; "
        "Adam with no learning rate given 60.0 % of the FLOPs (measured) and 60.0 % of the time.",
        "“auto” was given no learning rate",
        "| parabolic-s0 | 10.00 | 1.25 | 0.00 | 0.00 | 11.25 |",
        *(f"]({stem}.png)" for stem in PICTURES),
    ):
        assert expected in text, expected


def test_caveats_name_what_is_wrong_with_the_runs(write_log, tmp_path):
    logs = [
        write_log("adam", {0: 3.0, 5: 0.9, 10: 1.0}),
        write_log("linear", {2: 1.0, 6: 0.8}, machine={"cpu": "another"}),
        write_log("parabolic", {2: 2.0}, end=False),
    ]
    caveats = "\n".join(build_report(logs, tmp_path).caveats)
    assert "adam itself was at its target, step 10's, already at step 5." in caveats
    assert "linear went on after the target: its saving is taken at step 2 of 6." in caveats
    assert "parabolic has no end in its log" in caveats
    assert "The runs differ in cpu, threads of their machine: their seconds do not compare." in caveats


def test_medians_come_last_and_with_their_range_of_runs_that_differ_in_their_seed_only(write_log, tmp_path):
    adams = [write_log(f"adam-s{seed}", {20: 1.0}, seed=seed) for seed in range(3)]
    logs = adams + [write_log(f"linear-s{seed}", {5 + 10 * seed: 1.0}, seed=seed) for seed in range(3)]
    report = build_report(logs, tmp_path)
    names = [entry["name"] for entry in report.data["savings"]]
    assert names == ["linear-s0", "linear-s1", "linear-s2", "linear-median"]
    assert report.data["savings"][-1]["flops_measured"] == 0.25
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "median of 3 |" in line)
    assert row.count("25.0 % (−25.0 to 75.0)") == 3
    settings = [(rank, steps, seed) for rank, steps in ((4, 5), (8, 15)) for seed in range(2)]
    logs = adams[:2] + [write_log(f"linear-r{r}-s{s}", {n: 1.0}, seed=s, rank=r) for r, n, s in settings]
    found = {spread.kind: spread.median for spread in build_report(logs, tmp_path).spreads}
    medians = {kind: median["flops_measured"] for kind, median in found.items()}
    assert medians == {"linear, rank 4": 0.75, "linear, rank 8": 0.25}


def test_the_terminal_table_fits_eighty_columns(logs, tmp_path):
    out = io.StringIO()
    print_table(build_report(logs, tmp_path), Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.startswith("parabolic-s0"))
    assert row.split() == "parabolic-s0 0.0001 5 1 5 0.9000 550 11.2 72.5% 73.3% 71.9%".split()
    assert any("missed" in line for line in lines if line.startswith("linear-s0"))


def test_a_rate_that_was_not_given_is_drawn_over_the_steps(logs):
    from matplotlib.figure import Figure

    figure, runs = Figure(layout="constrained"), compare_runs(logs, 1e-4)
    draw_learning_rates(figure, [run for run in runs if run.kind == "auto"])
    losses, rates, alignments = figure.axes
    steps = list(range(1, 9))
    drawn = {axes: [line.get_xydata().T.tolist() for line in axes.lines] for axes in figure.axes}
    assert [steps, [pytest.approx(4.0 - 0.01 * step) for step in steps]] in drawn[losses]
    assert [[0, 8], [3.0, 0.8]] in drawn[losses]
    assert drawn[rates] == [[steps, [pytest.approx(1e-4 * step) for step in steps]]]
    assert rates.get_yscale() == "log"
    at, cosines = drawn[alignments][0]
    assert at == steps and [None if math.isnan(c) else c for c in cosines] == [None, *ALIGNED]
    told = [text.get_text() for text in losses.get_legend().get_texts()]
    assert told == ["Adam, no learning rate given: test loss", "its batches: training loss"]


def test_the_path_of_a_run(logs):
    run = next(run for run in compare_runs(logs, 1e-4) if run.name == "linear-s0")
    sgd, stages = walk(run.log.steps, run.log.stages)
    # Training losses stand one step back, before their update; ten of them, then τ* = 3 moves what follows.
    assert [x for x, _ in sgd] == [*range(10), *range(13, 23)]
    assert sgd[10] == (13, pytest.approx(4.0 - 0.11))
    assert stages == [[(10, 2.0), (11, 1.8), (12, 1.6), (13, 1.5)], [(19, 1.0)]]


def test_accepted_losses_end_at_the_best():
    losses = [[0, 3.0], [1, 2.0], [4, 1.5], [8, 1.4], [16, math.nan], [5, 1.2], [6, 1.3]]
    stage = {"tau": 5, "losses": losses}
    assert accepted(stage) == [(0, 3.0), (1, 2.0), (4, 1.5), (5, 1.2)]
    assert accepted({"tau": 0, "losses": [[0, math.nan]]}) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["report.json", "report.md", "tau.png"])
def test_a_full_disk_is_told_with_the_file(logs, tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"{name} cannot be written: No space left on device"):
        build_report(logs, tmp_path)
    assert name == "report.json" or json.loads((tmp_path / "report.json").read_text())["runs"]


def test_rates_of_runs_with_other_settings_are_drawn_apart(write_log):
    from matplotlib.figure import Figure

    runs = compare_runs(
        [write_log(f"auto-{rank}", {8: 0.8}, rank=rank, alignments=[None, *ALIGNED]) for rank in (4, 8)], 0
    )
    figure = Figure()
    draw_learning_rates(figure, runs)
    for axes in figure.axes[1:]:
        assert [line.get_linestyle() for line in axes.lines[:2]] == ["-", "--"]


def test_long_names_have_a_line_each_above_the_stages(write_log, tmp_path):
    setting = {"rank": 4, "max_length": 64, "batch_size": 8, "weight_decay": 0.0}
    logs = [
        write_log(f"linear-{n}", {5: 1.0}, stages={5: (3, TRIED)}, **{k: v + n for k, v in setting.items()})
        for n in range(3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a figure in which the axes have no room
        build_report(logs, tmp_path)


def test_flop_units():
    assert flop_unit(999) == (1.0, "FLOP") and flop_unit(0) == (1.0, "FLOP")
    assert flop_unit(1.2e12) == (1e12, "TFLOP")
    with pytest.raises(ValueError, match="at least one run log"):
        build_report([], None)


def test_importing_draws_in_neither_matplotlib_nor_rich():
    code = "import sys, ffkernels.reporting.report; print({'matplotlib', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_rate_that_nobody_tuned_is_called_that(write_log, tmp_path):
    logs = [write_log("adam-s0", {0: 3.0, 20: 1.0}), write_log("adam-untuned-s0", {4: 0.9}, lr=3e-3)]
    report = build_report(logs, tmp_path)
    assert [kind_label(run) for run in report.runs] == ["Adam", "Adam, lr 0.003 (not tuned)"]
    assert report.data["savings"][0]["flops_measured"] == 0.8
    (line,) = (caveat for caveat in report.caveats if caveat.startswith("Adam at"))
    assert line.startswith(
        "Adam at another learning rate (0.003), a usual one that nobody tuned, saves 80.0 %"
    )
    assert "uned learning rate (" not in line


def test_a_data_file_stands_in_place_of_a_task(write_log, tmp_path):
    task = {"task": "instruction", "source": "offline", "chat_loss": "all"}
    file = {"data": "/home/me/own.jsonl", "test_data": "/home/me/held.jsonl"}
    config = build_report([write_log("adam", {5: 1.0}, **task, **file)], tmp_path).data["config"]
    assert config.pop("fast_forward") is None
    assert config == {"lr": 1e-4, "batch_size": 8, "data": "own.jsonl", "test_data": "held.jsonl"}
    first = (tmp_path / "report.md").read_text().split("## ")[0]
    assert "data own.jsonl, test_data held.jsonl" in first and "task" not in first
    assert (
        build_report([write_log("plain", {5: 1.0}, **task)], tmp_path).data["config"]["task"] == "instruction"
    )


@pytest.mark.parametrize(
    ("one", "other", "variants"),
    [
        ({"lr": 1e-4}, {"lr": 1e-3}, ("lr 0.0001", "lr 0.001")),
        ({"batch_size": 8}, {"batch_size": 16}, ("batch_size 8", "batch_size 16")),
        ({"data": "/a/x.jsonl"}, {"data": "/b/y.jsonl"}, ("data x.jsonl", "data y.jsonl")),
        (
            {"fast_forward": {"search": "linear", "interval": 3}, "rank": 8},
            {"fast_forward": {"search": "linear", "interval": 6}, "rank": 4},
            ("rank 8, interval 3", "rank 4, interval 6"),
        ),
        ({"seed": 0}, {"seed": 1}, ("", "")),
        ({"new": 1}, {}, ("", "")),
    ],
)
def test_runs_of_a_kind_are_told_apart(write_log, one, other, variants):
    runs = compare_runs([write_log("linear-a", {5: 1.0}, **one), write_log("linear-b", {5: 1.0}, **other)], 0)
    assert tuple(run.variant for run in runs) == variants
    title = "Fast Forward, linear"
    assert [kind_label(run) for run in runs] == [f"{title}, {v}" if v else title for v in variants]
    lines = [style_of(run)["linestyle"] for run in runs]
    assert (lines[0] == lines[1]) == (variants[0] == variants[1]) and lines[0] == "-"
    assert len({style_of(run)["color"] for run in runs}) == 1


def test_a_stage_that_stayed_is_not_drawn_as_one_that_fell(logs):
    from matplotlib.figure import Figure

    run = next(run for run in compare_runs(logs, 1e-4) if run.name == "linear-s0")
    axes = Figure().add_subplot()
    draw_walk(axes, style_of(run), run.log.steps, run.log.stages)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    fell = [[10, 2], [11, 1.8], [12, 1.6], [13, 1.5]]
    assert drawn["Fast Forward step: validation loss, where it fell"] == fell
    assert drawn["stage without a step (τ = 0): validation loss"] == [[19, 1.0]]
    only = Figure().add_subplot()
    draw_walk(only, style_of(run), run.log.steps, run.log.stages[1:])
    labels = [line.get_label() for line in only.get_lines()]
    assert len(labels) == 2 and not any("fell" in label for label in labels)
