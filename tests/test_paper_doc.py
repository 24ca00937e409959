"""docs/paper.md names every flag of the authors' script, and only options that exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.main import get_command

from ffkernels.cli import app
from ffkernels.training import options
from ffkernels.training.config import TrainConfig
from ffkernels.training.presets import BLANK, PRESETS, TABLES, preset

DOC = (Path(__file__).resolve().parents[1] / "docs" / "paper.md").read_text(encoding="utf-8")
AUTHORS = {
    "task": "chat",
    "model_name": "meta-llama/Meta-Llama-3-8B",
    "lr": "2e-5",
    "accumulation_steps": "512",
    "batch_size": "1",
    "eval_batch_size": "2",
    "tokenizer_max_length": "1024",
    "lora_rank": "64",
    "lora_alpha": "16",
    "seed": "0",
    "evaluate_every": "512",
    "num_stabilization_steps": "50",
    "flops_profiler": "True",
    "fast_forward": "True",
    "use_dora": "False",
}
FLAGS = DOC.partition("## Their flags")[2].partition("## ")[0]
FIGURES = DOC.partition("## The paper's figures")[2]
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")] for line in FLAGS.splitlines() if "| `--" in line
]


def commands() -> dict:
    return get_command(app).commands


def option_names(command) -> set[str]:
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("--")}


def shell_lines() -> list[list[str]]:
    """Every ffkernels command line in the document, in blocks and in running text."""
    blocks = [
        line
        for block in re.findall(r"```\n(.*?)```", DOC, re.S)
        for line in block.replace("\\\n", "").splitlines()
    ]
    inline = re.findall(r"`(ffkernels [^`]+)`", DOC)
    return [shlex.split(line)[1:] for line in (*blocks, *inline) if line.startswith("ffkernels ")]


def test_every_flag_of_theirs_is_mapped_with_its_default():
    theirs = {row[0].strip("`-"): row[1].strip("`") for row in ROWS}
    assert theirs == AUTHORS


def test_every_option_of_ours_exists():
    ours = option_names(commands()["train"])
    used = {name for row in ROWS for name in re.findall(r"--[a-z][a-z-]*(?![a-z_])", row[2])}
    assert used and used <= ours, used - ours
    running = re.sub(r"```.*?```", "", DOC, flags=re.S)
    everywhere = {name for name in re.findall(r"`(--[a-z-]+)(?: [^`]*)?`", running)}
    figures = set().union(*map(option_names, commands()["analyze"].commands.values()))
    allowed = ours | figures | option_names(commands()["tokens"]) | {f"--{name}" for name in AUTHORS}
    allowed.add("--help")
    assert len(everywhere) > 15 and everywhere <= allowed, everywhere - allowed
    for row in ROWS:
        assert row[2] == "none needed" or re.search(r"`--[a-z]", row[2]), row


def test_every_command_line_is_accepted():
    lines = shell_lines()
    assert len(lines) > 10
    for command, *arguments in lines:
        found = commands()[command]
        if command == "analyze":
            command, *arguments = arguments
            assert command in found.commands, f"no such command: analyze {command}"
            found = found.commands[command]
        found.make_context(command, arguments)


def test_every_analyze_command_is_in_the_table_of_figures():
    named = set(re.findall(r"`ffkernels analyze ([a-z-]+)`", FIGURES))
    assert set(commands()["analyze"].commands) <= named


def test_every_function_in_the_table_of_figures_exists():
    names = re.findall(r"\| `([a-z_]+)\.([a-z_]+)` \|", FIGURES)
    assert len(names) == len(commands()["analyze"].commands)
    for module, function in names:
        found = importlib.import_module(f"ffkernels.analysis.{module}")
        assert callable(getattr(found, function)) and callable(found.draw), module


def test_the_long_command_is_the_preset_and_the_authors_default():
    train = commands()["train"]
    short, long = (line[1:] for line in shell_lines()[:2])
    runs = []
    for arguments in (short, long):
        context = train.make_context("train", arguments)
        runs.append(options.training(context, fast_forward=options.stages(context)))
    assert runs[0] == runs[1] == TrainConfig(**preset("authors-llama3-8b-chat"))
    run = runs[0]
    assert run.batch_size == int(AUTHORS["accumulation_steps"]) * int(AUTHORS["batch_size"])
    assert run.eval_tokens == int(AUTHORS["eval_batch_size"]) * int(AUTHORS["tokenizer_max_length"])
    assert run.evaluate_every == int(AUTHORS["evaluate_every"]) // int(AUTHORS["accumulation_steps"])
    assert (run.model, run.task, run.lr) == (AUTHORS["model_name"], AUTHORS["task"], float(AUTHORS["lr"]))
    assert (run.rank, run.alpha) == (int(AUTHORS["lora_rank"]), int(AUTHORS["lora_alpha"]))


def test_presets_that_are_named_exist():
    named = set(re.findall(r"(?:authors|paper)-(?:pythia|llama)[a-z0-9.-]+", DOC))
    assert len(named) > 2 and named <= set(PRESETS)


def test_the_table_of_presets_is_that_of_the_code():
    for task, (lr, batch_size, rank, micro_batches) in TABLES.items():
        micro = ["blank" if of is BLANK else str(of) for of in micro_batches.values()]
        cells = [task, f"{lr:.0e}".replace("e-0", "e-"), str(batch_size), str(rank), *micro]
        assert f"\n| {' | '.join(cells)} |\n" in DOC
