"""Several processes on GPUs over NCCL: what one GPU can show in a group of one, more where there are more.

In a group of one the whole path of several processes is made to run, exchanges over NCCL included. Run as a
script under torchrun, this file is what each rank does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ffkernels import FastForward, FastForwardConfig
from ffkernels.engine import fast_forward
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.ranks import ranks as distributed
from ffkernels.ranks.ranks import Ranks
from ffkernels.validation import loss as validation

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::ffkernels.ops.notices.FFKernelsNotice")]

STEPS = 4


class Net(nn.Module):
    """Regression through two blocks; a batch is a dict, its forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 16)) for _ in "ab"
        )
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return ((self.last(x) - y) ** 2).mean()


def batch(rows: int, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator)
    return {"x": x.to(device), "y": x[:, :3].cumsum(1).to(device)}


def train(device: torch.device, how: str = "", rank: int = 0, size: int = 1) -> dict:
    """The same global batches whatever the number of ranks; returns what must then be the same too."""
    model: nn.Module = Net().to(device)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    elif how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    validation = [batch(3, 100 + i, device) for i in range(7)]
    ff = FastForward(model, optimizer, validation, FastForwardConfig(interval=2, max_tau=64))
    for step in range(STEPS):
        rows = batch(8, step, device)
        share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        model(**{key: value[share] for key, value in rows.items()}).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "taus": [stage.tau for stage in ff.stages],
        "losses": [[loss for _, loss in stage.losses] for stage in ff.stages],
        "executor": [ff.stages[0].executor, ff.stages[0].executor_reason],
        "exchanged on": ff.ranks.device.type if ff.ranks else "",
        "weights": torch.cat([p.detach().flatten() for p in whole]).tolist(),
    }


def alike(one: dict, other: dict) -> None:
    assert one["taus"] == other["taus"] and max(one["taus"]) > 3
    for mine, theirs in zip(one["losses"], other["losses"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-3, abs=1e-4)


@pytest.fixture
def group_of_one(device, tmp_path):
    """A process group of this process alone, over NCCL on a GPU and gloo in a dry run."""
    if dist.is_initialized():
        pytest.fail("a process group was left behind by another test")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_available() or not getattr(dist, f"is_{backend}_available")():
        pytest.skip(f"this torch has no {backend}")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    yield backend
    dist.destroy_process_group()


@pytest.fixture
def as_several(monkeypatch):
    """Take the path of several processes although there is one."""
    for module in (distributed, fast_forward, validation):
        monkeypatch.setattr(module, "several_processes", lambda group=None: True)


def test_exchanges_travel_from_the_device(device, group_of_one):
    ranks = Ranks(device)
    assert ranks.device.type == device.type
    (row,) = ranks.exchange(distributed.UPDATE, 0.1, float("nan"), -(2**62) - 1)
    assert (row.a, repr(row.b), row.c) == (0.1, "nan", -(2**62) - 1)
    assert ranks.mean(lambda: (torch.tensor(1.5, dtype=torch.float64, device=device), 3)) == 0.5
    assert ranks.gather_bytes("Δ".encode()) == ["Δ".encode()]
    ranks.agree({"interval": 6}, "")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_path_of_several_processes_does_what_one_process_does(device, group_of_one, as_several, how):
    found = train(device, how)
    assert found["exchanged on"] == device.type
    assert found["executor"][0] == "eager"
    dist.destroy_process_group()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "several_processes", lambda group=None: False)
            alone = train(device)
    finally:
        dist.init_process_group(group_of_one, store=dist.HashStore(), rank=0, world_size=1)
    alike(found, alone)


def test_a_model_sharded_over_one_process_is_gathered_anew_for_every_validation(device, group_of_one):
    sharded, plain = train(device, "fsdp"), train(device)
    assert sharded["exchanged on"] == ""
    alike(sharded, plain)


def test_why_stages_are_eager_is_said_once(gpu, group_of_one, as_several, monkeypatch):
    monkeypatch.setattr("ffkernels.ops.notices._announced", set())
    with pytest.warns(FFKernelsNotice, match=r"Fast Forward stages run eagerly \(eager\): "):
        train(gpu, "ddp")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_gpus_of_the_machine_take_the_same_steps(gpu, how, tmp_path):
    size = min(4, torch.cuda.device_count())
    if size < 2:
        pytest.skip("there is one GPU on this machine")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *launcher, __file__, how, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=80, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    assert all(rank == ranks[0] for rank in ranks), "the same bits on every rank"
    alike(ranks[0], train(gpu))


def main(how: str, folder: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    found = train(device, how, rank, size)
    with open(os.path.join(folder, f"{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
