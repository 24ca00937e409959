import json
import re
import signal
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("typer")
import typer
from typer.testing import CliRunner

from ffkernels.cli import app, run


@pytest.fixture
def invoke():
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def sums(tmp_path):
    lines = [{"prompt": f"{a}+{b}=", "response": f"{a + b}."} for a in range(10) for b in range(10)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture
def quick(sums, tmp_path):
    pytest.importorskip("peft")
    sizes = "--max-length 12 --batch-size 4 --test-examples 8 --validation-examples 4 --device cpu"
    return ["--data", str(sums), *sizes.split(), "--threads", "1", "--out", str(tmp_path / "out")]


def fails(capsys, *arguments):
    """The one line that a user error prints."""
    with pytest.raises(SystemExit) as exit:
        run([str(a) for a in arguments])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_is_quick_to_import():
    code = "import sys, ffkernels.cli; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["compare", "train", "tokens", "report", "analyze", "doctor"])
def test_every_command_has_help(invoke, command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_no_help_hides_words_in_brackets():
    """Rich swallows what stands in square brackets: "[default: no]" would not be read by anybody."""

    def commands(command):
        yield command
        for one in getattr(command, "commands", {}).values():
            yield from commands(one)

    helps = [
        (command.name, text)
        for command in commands(typer.main.get_command(app))
        for text in (command.help, *(getattr(parameter, "help", None) for parameter in command.params))
    ]
    assert len(helps) > 200  # of train, compare, analyze loss, …
    assert [(name, text) for name, text in helps if text and "[" in text] == []


def test_doctor(invoke):
    text = invoke("doctor", "--device", "cpu")
    assert text.exit_code == 0 and "what would run" in text.stdout
    diagnosis = json.loads(invoke("doctor", "--json", "--device", "cpu").stdout)
    assert diagnosis["executor"]["name"] == "eager"


def test_doctor_builds_the_ops(invoke, monkeypatch, tmp_path):
    from ffkernels import ops

    monkeypatch.setattr(ops, "build_native", lambda again: tmp_path / f"built-{again}.so")
    monkeypatch.setattr(ops, "find_nvcc", lambda: None)
    assert f"built {tmp_path / 'built-True.so'}" in invoke("doctor", "--build").stdout
    monkeypatch.setattr(ops, "build_cuda", lambda again: tmp_path / f"cuda-{again}.so")
    monkeypatch.setattr(ops, "find_nvcc", lambda: tmp_path / "nvcc")
    assert f"built {tmp_path / 'cuda-True.so'}" in invoke("doctor", "--build").stdout


def test_train_then_resume_then_report(invoke, quick, tmp_path, capsys):
    out = tmp_path / "out"
    result = invoke("train", *quick, "--steps", 2, "--interval", 2, "--name", "a")
    assert result.exit_code == 0, result.output
    assert f"The adapter is in {out / 'a'}" in result.stdout
    flat = " ".join(result.stdout.split())
    assert re.search(r"a: 88 training examples; \d+ tokens, of which the loss counts \d+; length", flat)
    assert (out / "a" / "adapter_model.safetensors").is_file()

    assert "a.jsonl exists: --resume" in fails(capsys, "train", *quick, "--steps", 2, "--name", "a")
    other = fails(capsys, "train", *quick, "--steps", 4, "--name", "a", "--resume", "--no-fast-forward")
    assert "cannot resume run 'a'" in other and "fast_forward" in other
    plain = fails(capsys, "train", *quick, "--no-fast-forward", "--resample-validation", 64)
    assert "--resample-validation is Fast Forward's" in plain

    result = invoke("train", *quick, "--steps", 4, "--interval", 2, "--name", "a", "--resume")
    assert result.exit_code == 0, result.output
    assert "all steps done after 4 steps" in result.stdout

    result = invoke("report", out / "a.jsonl", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [(r["name"], r["optimizer_steps"]) for r in report["runs"]] == [("a", 4)]


def test_compare_writes_the_report(invoke, quick, tmp_path):
    result = invoke("compare", *quick, "--steps", 6, "--interval", 3, "--lr", 3e-4, "--evaluate-every", 3)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    names = ["adam-s0", "linear-s0", "parabolic-s0", "auto-s0", "adam-untuned-s0"]
    assert [run["name"] for run in report["runs"]] == names
    assert {"runs", "savings", "machine", "versions", "config"} <= report.keys()
    for entry in report["runs"]:
        assert set(entry["flops"]) == {"paper", "measured"}
        assert set(entry["seconds"]) == {"train", "validate", "move", "other", "total"}
        assert entry.keys() >= {"optimizer_steps", "test_loss", "validation_forwards", "stages"}
    assert {s["name"] for s in report["savings"]} <= set(names)
    for saving in report["savings"]:
        assert saving.keys() >= {"name", "flops_paper", "flops_measured", "seconds"}
    assert report["config"]["seeds"] == [0] and report["config"]["tuned_lr"] > 0
    text = (out / "report.md").read_text()
    assert ", data sums.jsonl, " in text and "task " not in text.split("\n## ")[0]
    assert "Adam at another learning rate (0.003), a usual one that nobody tuned" in text
    assert "data" in report["config"] and "task" not in report["config"]
    took = [json.loads((out / f"{n}.jsonl").read_text().splitlines()[-1])["test_seconds"] for n in names]
    assert min(took) > 0 and f"The test losses took {sum(took):.1f} s beside them." in text
    assert " ".join(result.stdout.split()).count("adam-s0: 88 training examples;") == 1
    assert result.stdout.count("at most; 0 cut") == 1 and "s for test losses" in result.stdout
    assert list(out.glob("*.png")) and "linear-s0: 6 steps or test loss" in result.stdout
    assert re.search(r"All 5 runs: about 0:\d\d:\d\d left", result.stdout)
    assert re.search(r"; run 5 of 5, about 0:\d\d:\d\d left", " ".join(result.stdout.split()))
    assert all((out / f"{name}.jsonl").is_file() for name in names)
    last = re.sub(r"\s+", "", result.stdout.strip().splitlines()[-1])
    assert f"reportisin{out}" in last


def test_compare_runs_peers_beside_ours(invoke, quick, tmp_path):
    flags = ["--steps", 4, "--interval", 2, "--lr", 1e-2, "--search", "parabolic", "--patience", 0]
    result = invoke("compare", *quick, *flags, "--peer", "lora-plus", "--peer", "authors", "--seeds", "3,")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    names = ["adam-s3", "parabolic-s3", "authors-s3", "lora-plus-s3", "auto-s3", "adam-untuned-s3"]
    assert [run["name"] for run in report["runs"]] == names
    assert [entry["name"] for entry in report["savings"]] == names[1:]
    assert report["config"]["peers"] == ["lora-plus", "authors"]
    assert "the authors' loop" not in result.stdout and "authors-s3" in result.stdout


def test_train_a_whole_model_and_go_on_from_it(invoke, quick, tmp_path):
    out = tmp_path / "out"
    result = invoke("train", *quick, "--steps", 1, "--method", "full", "--quiet")
    assert result.exit_code == 0, result.output
    assert f"The model is in {out / 'run'} (--model {out / 'run'}, or from_pretrained)" in result.stdout
    assert "training examples" not in result.stdout
    assert "Writing model shards" not in result.output  # transformers' own bar
    flags = ["--name", "next", "--model", out / "run", "--optimizer", "lora-plus", "--attn", "eager"]
    result = invoke("train", *quick, "--steps", 1, *flags, "--eval-tokens", 64)
    assert result.exit_code == 0, result.output
    run = json.loads((out / "next.jsonl").read_text().splitlines()[0])
    chosen = {"optimizer": "lora-plus", "attn": "eager", "eval_tokens": 64, "method": "lora"}
    assert {key: run["config"][key] for key in chosen} == chosen


def test_tokens(invoke, quick):
    wanted = ("--data", "--max-length", "--test-examples", "--validation-examples")
    options = [part for name in wanted for part in (name, quick[quick.index(name) + 1])]
    statistics = json.loads(invoke("tokens", *options, "--json").stdout)
    assert list(statistics) == ["train", "validation", "test"]
    assert statistics["train"]["examples"] == 88 and statistics["test"]["examples"] == 8
    rows = [line.split() for line in invoke("tokens", *options).stdout.strip().splitlines()]
    assert rows[0] == ["sums"] and rows[1][:3] == ["split", "examples", "measured"]
    train = statistics["train"]
    tokens, labelled = f"{train['tokens']:,}", f"{train['labelled_tokens']:,}"
    assert rows[2][:5] == ["train", "88", "88", tokens, labelled]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --method full --rank 4", "--rank: method='full' has no adapter"),
        ("train --method full --target-modules x", "--target-modules: method='full'"),
        ("train --method full-attention --dropout 0.1", "--dropout: method='full-attention'"),
        ("train --data x.jsonl --task chat", "--task: --data is trained on instead of a task"),
        ("tokens --data x.jsonl --source hub", "--source: --data is trained on"),
        ("train --chat-loss assistant", "--chat-loss: task='instruction' is no chat"),
        ("train --lora-plus-ratio 4", "--lora-plus-ratio: there is no optimizer lora-plus"),
        ("compare --steps 4 --epochs 1", "--steps: --epochs says how long to train"),
        ("train --method full --dtype bfloat16", "dtype='bfloat16': must be 'float32'"),
        ("train --optimizer sgd", "optimizer='sgd': must be one of 'adamw', 'lora-plus'"),
        ("train --attn fast", "attn='fast': must be one of"),
        ("train --source web", "source='web': must be one of 'offline', 'hub'"),
        ("train --preset mine", "preset 'mine' does not exist"),
        ("compare --peer golden", "--peer=('golden',): must be of 'lora-plus'"),
        ("compare --peer lora-plus --method full", "optimizer='lora-plus': must be 'adamw'"),
        ("tokens --task poetry", "poetry"),
        ("train --lr 0", "--lr=0.0: must be a number above 0"),
        ("train --eval-tokens 0", "--eval-tokens=0: must be an integer of at least 1 or None"),
        ("train --target-modules ,", "--target-modules=('', ''): must be module names"),
        ("train --stage-warmup -1", "--stage-warmup=-1: must be an integer of at least 0"),
        ("train --test-examples 0 --target-loss 2", "--target-loss=2.0: must be None where test"),
        ("train --test-data x.jsonl", "--test-data='x.jsonl': must be None without data"),
        ("compare --test-examples 0", "--test-examples=0: must be at least 1: the runs are compared"),
        ("analyze loss --test-examples 0", "--test-examples=0: must be at least 1: an analysis"),
        ("train --device gpu", "device='gpu': must be 'auto'"),
        ("train --device cuda:99", "device='cuda:99': this torch sees"),
        ("compare --seeds 0", "seeds='0'"),
        ("train --lr -1", "lr=-1.0: must be a number above 0"),
        ("train --search golden", "search='golden'"),
        ("train --resume --overwrite", "give one of them"),
        ("compare --seeds none", "seeds='none'"),
        ("compare --search golden", "search='golden'"),
        ("report no-such-run.jsonl", "no such run log: no-such-run.jsonl"),
        ("train --data no-such-file.jsonl", "no-such-file.jsonl"),
        ("train --task poetry", "poetry"),
        ("doctor --device gpu", "device='gpu'"),
    ],
)
def test_user_errors_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments.split())


def test_what_a_peer_refuses_is_one_line_and_comes_before_any_run(capsys, quick, tmp_path):
    flags = ["--steps", 4, "--search", "linear", "--interval", 1, "--peer", "authors", "--quiet"]
    assert "interval=1: must be an integer of at least 2" in fails(capsys, "compare", *quick, *flags)
    assert not (tmp_path / "out").exists()


def test_a_bug_keeps_its_traceback(monkeypatch):
    from ffkernels import doctor

    def broken(device):
        return json.loads("not json")  # a ValueError from outside the package

    monkeypatch.setattr(doctor, "diagnose", broken)
    with pytest.raises(ValueError):
        run(["doctor"])


def test_a_notice_is_one_line_without_its_place(capsys, monkeypatch):
    from ffkernels import doctor, ops

    def noticing(device):
        ops.announce_once("test-cli", "slower, because of this; cured by that")
        return {}

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(doctor, "diagnose", noticing)
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter("always")
        run(["doctor", "--json"])
    captured = capsys.readouterr()
    assert captured.err.strip() == "note: slower, because of this; cured by that"
    assert captured.out.strip() == "{}"


def test_a_missing_command_line_package_is_named():
    code = "import sys; sys.modules['typer'] = None\nfrom ffkernels.__main__ import main\nmain()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == "ffkernels: the command line needs typer: pip install 'ffkernels[hf]'"


def test_a_run_without_test_examples_says_no_test_loss(invoke, quick, tmp_path):
    sizes = ["--test-examples", 0, "--steps", 2, "--interval", 2]
    result = invoke("train", *quick, *sizes)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "test loss" not in flat and "all steps done after 2 steps: " in flat
    events = [json.loads(line) for line in (tmp_path / "out" / "run.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["run", "step", "step", "stage", "end"]
    assert (events[-1]["test_loss"], events[0]["tokens"]["test"]["examples"]) == ("nan", 0)
    result = invoke("report", tmp_path / "out" / "run.jsonl", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output


def test_what_is_left_out_is_said_once(invoke, quick, sums, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "1+1=", "completion": "2."}\n{"prompt": "9+9=", "completion": " "}\n')
    flags = ["--test-data", other, "--batch-size", 512, "--max-length", 64, "--steps", 1]
    result = invoke("train", *quick, *flags)
    flat = " ".join(result.stdout.split())
    assert (
        "Left out of sums.jsonl: 1 line equal to one of the file that is tested on. Left out of oth" in flat
    )
    assert "A batch of 512 is larger than the 95 training examples" in flat
    assert result.exit_code == 0 and flat.count("Left out of other.jsonl") == 1
    logged = json.loads((tmp_path / "out" / "run.jsonl").read_text().splitlines()[0])
    assert len(logged["remarks"]) == 3 and logged["tokens"]["test"]["examples"] == 1
    sizes = ["--validation-examples", 4, "--max-length", 64]
    told = invoke("tokens", "--data", sums, "--test-data", other, *sizes, "--json")
    assert json.loads(told.stdout)["test"]["examples"] == 1 and "Left out of other.jsonl" in told.stderr


def test_ctrl_c_in_a_stage_says_what_comes_and_a_second_what_is_kept(invoke, quick, tmp_path, monkeypatch):
    pressed = []

    def run(self, program):
        for _ in range(pressed[0]):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("ffkernels.stage.eager.EagerExecutor.run", run)
    flags = "--steps 4 --interval 2 --patience 0 --checkpoint-every 1 --name c --quiet".split()
    pressed[:] = [2]
    result = invoke("train", *quick, *flags)
    flat = " ".join(result.stdout.split())
    assert result.exit_code == 130
    assert (
        "Ctrl-C: c ends after this Fast Forward stage and is saved; a second Ctrl-C ends it at once" in flat
    )
    folder = re.sub(r"\s", "", str(tmp_path / "out" / "c"))
    assert (
        f"Endedatonce.Thestateafterstep1isin{folder}:goon" in re.sub(r"\s", "", flat) and "--resume" in flat
    )
    pressed[:] = [1]
    result = invoke("train", *quick, *flags, "--resume")
    assert result.exit_code == 130 and "interrupted after 2 steps" in result.stdout
    pressed[:] = [2]
    result = invoke("train", *quick, *flags, "--checkpoint-every", 0, "--name", "d")
    assert "Ended at once. Nothing is saved that this run could go on from." in result.stdout
