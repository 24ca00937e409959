"""What would be sent to PEFT does what ffkernels does, to the bit; its installer leaves no trace behind."""

import ast
import importlib
import importlib.util
import json
import math
import os
import py_compile
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffkernels import FastForward, FastForwardConfig
from ffkernels.engine import fast_forward
from ffkernels.search import search as own_search
from ffkernels.search.search import make_search
from ffkernels.training.models import add_adapter, load_model

ROOT = Path(__file__).resolve().parents[2]
CONTRIB = ROOT / "contrib" / "peft"
MODULE = CONTRIB / "src/peft/optimizers/fast_forward.py"


def load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def contribution():
    """The module as it would be inside PEFT; the installed PEFT is not touched."""
    if not hasattr(importlib.import_module("peft.helpers"), "DoraCaching"):
        pytest.skip("the contribution is for peft 0.19 and newer")
    name = "peft.optimizers.fast_forward"
    yield load(MODULE, name)
    del sys.modules[name]


@pytest.fixture(scope="module")
def installer():
    return load(CONTRIB / "install.py", "peft_contribution_installer")


# The search.


@pytest.fixture
def cold(contribution, monkeypatch):
    """Our search as the proposal has it: from 1 in every stage, and to its tolerance."""
    monkeypatch.setattr(own_search, "REFINE_TOLERANCE", contribution._REFINE_TOLERANCE)
    monkeypatch.setattr(
        fast_forward, "make_search", lambda name, max_tau, start=1: make_search(name, max_tau)
    )


def measured_by_peft(contribution, search: str, loss_of, max_tau: int) -> list[tuple[int, float]]:
    measured = []

    def measure(tau: int) -> float:
        measured.append((tau, loss_of(tau)))
        return measured[-1][1] if math.isfinite(measured[-1][1]) else math.inf

    if math.isfinite(baseline := measure(0)):
        contribution._SEARCHES[search](measure, baseline, max_tau)
    return measured


def measured_by_ffkernels(search: str, loss_of, max_tau: int) -> list[tuple[int, float]]:
    machine = make_search(search, max_tau)
    while (tau := machine.propose()) is not None:
        machine.observe(tau, loss_of(tau))
    return machine.losses


class Curve:
    """A loss over tau: smooth, noisy, coarse or broken at one point; the same in every run."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.minimum, self.width = self.random.uniform(-3, 300), self.random.uniform(1, 200)
        self.noise = self.random.choice([0.0, 0.0, 1e-4, 1e-2])
        self.digits = self.random.choice([15, 15, 3])
        self.broken = self.random.choice([None, None, math.nan, math.inf, -math.inf])
        self.broken_at = self.random.randrange(64)
        self.max_tau = self.random.choice([1, 2, 3, 7, 64, 100, 1024])
        self.values: dict[int, float] = {}

    def __call__(self, tau: int) -> float:
        if tau not in self.values:
            x = (tau - self.minimum) / self.width
            value = 2 + x * x / (1 + 0.3 * abs(x)) + self.noise * self.random.random()
            broken = self.broken is not None and tau == self.broken_at
            self.values[tau] = self.broken if broken else round(value, self.digits)
        return self.values[tau]


@pytest.mark.parametrize("search", ["parabolic", "linear"])
def test_both_searches_ask_for_the_same_losses(contribution, cold, search):
    lengths = set()
    for curve in map(Curve, range(400)):
        ours = measured_by_ffkernels(search, curve, curve.max_tau)
        theirs = measured_by_peft(contribution, search, curve, curve.max_tau)
        assert [tau for tau, _ in theirs] == [tau for tau, _ in ours]
        lengths.add(len(ours))
    assert len(lengths) > 8  # the curves are not all alike


# Training.

STEPS, INTERVAL = 12, 4


def batches(count: int, seed: int, rows: int = 4, length: int = 24) -> list[dict[str, torch.Tensor]]:
    text = MODULE.read_bytes()
    starts = random.Random(seed)
    made = []
    for _ in range(count):
        rows_of = [starts.randrange(len(text) - length) for _ in range(rows)]
        ids = torch.tensor([list(text[start : start + length]) for start in rows_of])
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return made


def tiny():
    model, _ = load_model("tiny")
    model = add_adapter(model, rank=4, dropout=0.1, seed=0)
    return model.train()


def weights_of(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def train(model, optimizer) -> None:
    torch.manual_seed(1)  # dropout
    for batch in batches(STEPS, seed=2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def mean_loss(model) -> torch.Tensor:
    return torch.stack([model(**batch).loss for batch in batches(2, seed=3)]).double().mean()


@pytest.mark.parametrize("search", ["parabolic", "linear"])
def test_same_seed_same_taus_and_the_same_bits(contribution, cold, search):
    theirs = tiny()
    optimizer = contribution.create_fast_forward_optimizer(
        theirs, torch.optim.AdamW, lr=1e-4, validation=mean_loss, interval=INTERVAL, search=search, max_tau=24
    )
    train(theirs, optimizer)

    ours = tiny()
    adam = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-4)
    config = FastForwardConfig(interval=INTERVAL, search=search, max_tau=24, patience=3)
    with FastForward(ours, adam, mean_loss, config) as ff:
        train(ours, adam)

    stages = optimizer.fast_forward.stages
    assert [stage.step for stage in stages] == [4, 8, 12]
    assert [(s.step, s.tau, s.losses) for s in stages] == [
        (s.optimizer_step, s.tau, s.losses) for s in ff.stages
    ]
    assert stages[0].tau > 2
    for theirs_, ours_ in zip(weights_of(theirs), weights_of(ours), strict=True):
        assert torch.equal(theirs_, ours_)


def test_it_needs_torch_and_peft_only():
    source = MODULE.read_text(encoding="utf-8")
    assert "ffkernels" not in source
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch", "..helpers", "..peft_model"}


RANKS = """
import sys
import torch
import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
from test_peft_contribution import MODULE, batches, load, tiny, weights_of

rank = int(sys.argv[2])
dist.init_process_group("gloo", rank=rank, world_size=2, init_method="file://" + sys.argv[3])
model = tiny()
shard = batches(2, seed=3)[rank : rank + 1]  # each rank validates its own examples
optimizer = load(MODULE, "peft.optimizers.fast_forward").create_fast_forward_optimizer(
    model, torch.optim.AdamW, lr=1e-4, validation=shard, interval=2, max_tau=8
)
parallel = torch.nn.parallel.DistributedDataParallel(model)
torch.manual_seed(1)
for batch in batches(8, seed=2)[rank::2]:
    parallel(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save((weights_of(model), [(s.tau, s.losses) for s in optimizer.fast_forward.stages]), sys.argv[4])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_of_ddp_decide_alike(contribution, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    outputs = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    here = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, here, str(rank), str(tmp_path / "store"), str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=240)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:  # one that waits for a failed one
            rank.kill()
            rank.wait()
    (first, first_stages), (second, second_stages) = (torch.load(output) for output in outputs)
    assert len(first_stages) == 2 and first_stages[0][0] > 1
    assert first_stages == second_stages
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# The installer.

INIT = '''"""A head."""

from .lorafa import create_lorafa_optimizer
from .loraplus import create_loraplus_optimizer


__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]
'''


def fake_checkout(root: Path) -> Path:
    """The files that the installer looks at, with what the patch expects around its changes."""
    package = root / "src/peft"
    (package / "optimizers").mkdir(parents=True)
    (package / "peft_model.py").touch()
    (package / "helpers.py").write_text("import os\n\n\nclass DoraCaching:\n    pass\n")
    (package / "optimizers/__init__.py").write_text(INIT)
    (root / ".git").mkdir()
    files: dict[str, str] = {}
    for line in (CONTRIB / "peft.patch").read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("--- a/"):
            files[path := line[6:].strip()] = "start\n"
        elif line.startswith("@@"):
            files[path] += "\nbetween\n"
        elif line[0] in " -":
            files[path] += line[1:]
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "after\n", encoding="utf-8")
    return root


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_checkout_gets_everything_and_is_left_as_it_was(installer, tmp_path, capsys):
    root = fake_checkout(tmp_path / "peft")
    before = snapshot(root)
    assert installer.main([str(root), "--check"]) == 1
    assert installer.main([str(root)]) == 0
    after = snapshot(root)
    for path in (
        "src/peft/optimizers/fast_forward.py",
        "tests/test_fast_forward.py",
        "examples/fast_forward_finetuning/fast_forward_finetuning.py",
        "method_comparison/MetaMathQA/experiments/lora/llama-3.2-3B-rank32-fast-forward/training_params.json",
    ):
        assert after[path] == (CONTRIB / path).read_bytes()
    assert b"### Fast Forward" in after["docs/source/package_reference/lora.md"]
    assert b'"fast-forward"' in after["method_comparison/MetaMathQA/utils.py"]
    names = {"create_fast_forward_optimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"}
    registered = after["src/peft/optimizers/__init__.py"].decode()
    assert all(registered.count(name) == 2 for name in names)

    assert installer.main([str(root)]) == 0  # again: nothing to do
    assert snapshot(root) == after
    assert installer.main([str(root), "--check"]) == 0
    assert installer.main([str(root), "--uninstall"]) == 0
    assert snapshot(root) == before
    assert installer.main([str(root), "--uninstall"]) == 0
    assert snapshot(root) == before
    capsys.readouterr()


def test_an_installed_package_gets_the_module_only(installer, tmp_path, capsys):
    package = tmp_path / "site-packages/peft"
    shutil.copytree(fake_checkout(tmp_path / "source") / "src/peft", package)
    before = snapshot(tmp_path / "site-packages")
    assert installer.main([str(tmp_path / "site-packages")]) == 0
    after = snapshot(tmp_path / "site-packages")
    assert after.keys() - before.keys() == {"peft/optimizers/fast_forward.py"}
    (package / "optimizers/fast_forward.py").write_text("old")
    py_compile.compile(str(package / "optimizers/fast_forward.py"))  # as its import does
    assert list((package / "optimizers/__pycache__").iterdir())
    assert installer.main([str(package), "--check"]) == 1
    assert "another version" in capsys.readouterr().out
    assert installer.main([str(package), "--uninstall"]) == 0
    assert snapshot(tmp_path / "site-packages") == before
    assert not (package / "optimizers/__pycache__").exists()


def test_a_peft_that_is_too_old_is_refused_before_anything_is_written(installer, tmp_path, capsys):
    """The module could not be imported there, nor could peft, which imports it."""
    root = fake_checkout(tmp_path / "peft")
    (root / "src/peft/helpers.py").write_text("# DoraCaching is not in here\n")
    before = snapshot(root)
    for action in ([], ["--check"]):
        assert installer.main([str(root), *action]) == 1
        assert "install peft 0.19 or newer" in capsys.readouterr().err
    assert snapshot(root) == before
    assert installer.main([str(root), "--uninstall"]) == 0  # after a downgrade
    assert snapshot(root) == before


def test_a_checkout_that_has_changed_is_not_half_written(installer, tmp_path, capsys):
    root = fake_checkout(tmp_path / "peft")
    run = root / "method_comparison/MetaMathQA/run.py"
    run.write_text(run.read_text().replace("get_optimizer_and_scheduler", "make_optimizer"))
    before = snapshot(root)
    assert installer.main([str(root)]) == 1
    assert "has changed upstream" in capsys.readouterr().err
    assert snapshot(root) == before
    assert installer.main([str(tmp_path / "nothing")]) == 1
    assert "neither a PEFT checkout" in capsys.readouterr().err


def test_the_installed_peft_can_be_extended(contribution, installer):
    target = installer.find_target(None)
    path, text = target.registration()
    assert path == target.package / "optimizers/__init__.py"
    assert "from .fast_forward import create_fast_forward_optimizer\n" in text
    ast.parse(text)


# The proposal.


def test_the_numbers_of_the_proposal_are_those_of_its_result_files():
    measure = load(CONTRIB / "measure.py", "peft_contribution_measure")
    proposal = (CONTRIB / "PROPOSAL.md").read_text(encoding="utf-8")
    results = sorted((CONTRIB / "results").glob("*.json"))
    assert results
    for path in results:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert f"results/{path.name}" in proposal
        assert report["machine"] and report["versions"]["torch"] and report["command"]
        for line in measure.table(report):
            assert line in proposal


@pytest.mark.parametrize("model", ["tiny", "smollm2-135m"])
def test_two_adapter_copies_and_no_copy_of_the_frozen_weights(model):
    (path,) = (CONTRIB / "results").glob(f"memory_{model}_*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    adapter, weights = report["adapter_bytes"], report["model_bytes"]
    rows = {row["name"]: row for row in report["memory"]}
    for search in ("linear", "parabolic"):
        row = rows[f"fast-forward-{search}"]
        # 64 bytes of rounding for each tensor, and the scalars
        assert row["stage_buffers_bytes"] <= 2 * adapter + 4096 + 64 * 2 * report["adapter_tensors"]
        assert row["held_after_step_bytes"] <= rows["adamw"]["held_after_step_bytes"] + 4096
    assert rows["prototype"]["held_after_step_bytes"] >= 2 * weights
