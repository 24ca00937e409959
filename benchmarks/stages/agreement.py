"""Whether a captured stage finds what an eager one finds: the same loss, the same τ from equal weights."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.stages.cases import STAGE, STEP, Case
from benchmarks.stages.models import make_model
from benchmarks.stages.providers import BareForward, Bench, graph_executor
from ffkernels import ops
from ffkernels.search.search import make_search
from ffkernels.stage.eager import EagerExecutor
from ffkernels.stage.program import StageProgram
from ffkernels.validation.loss import ValidationLoss

INTERVAL, BATCH, LEARNING_RATE = 6, 16, 5e-4


def loss_agreement(name: str, length: int, device: torch.device) -> dict[str, Any]:
    """In float32, without TF32, PyTorch's default: the model's own loss, ours eagerly, ours captured."""
    model, weights = make_model(name, device, torch.float32)
    bench = Bench(Case(name, length), model, device)
    found: dict[str, Any] = {
        "model": name,
        "weights": weights,
        "model's own": bench.model_loss(),
        "ours eager": float(bench.loss.real_loss()),
    }
    if device.type == "cuda":
        bare = BareForward(bench)
        bare.stage(1)
        found["captured"] = float(bare.result)
        bare.close()
    found["largest_difference"] = max(
        abs(found["model's own"] - value) for key, value in found.items() if key in ("ours eager", "captured")
    )
    return found


def tau_agreement(
    device: torch.device, stages: int, seconds: float, max_tau: int, graphs: bool
) -> dict[str, Any]:
    """Fast Forward stages of a real training run on a bf16 base, each run by every executor.

    The embedded model learns docstring → function pairs. Every sixth step has its stage run from identical
    weights by all executors in turn, with the parabolic and the linear search alternately; training goes on
    from what the eager one left.
    """
    from ffkernels.training.models import add_adapter, load_model
    from ffkernels.training.tasks import collate, load_task

    begin = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base, tokenizer = load_model("tiny", dtype=dtype, device=device)
    task = load_task("instruction", tokenizer, test_examples=1)
    model = add_adapter(base, seed=0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=LEARNING_RATE)
    table = ops.TensorTable(named)
    weights = [p.detach() for p in named.values()]
    validation = ValidationLoss(model, [collate(task.validation, tokenizer.pad_token_id)])
    executors: dict[str, Any] = {"eager": EagerExecutor()}
    refused: dict[str, str] = {}
    if graphs:
        for search in ("parabolic", "linear"):  # one search per capture
            for name in (STEP, STAGE):
                try:
                    executors[f"{name} {search}"] = graph_executor(device, name)
                except RuntimeError as error:  # the other one is still worth knowing about
                    refused[name] = str(error)
    model.train()
    draw = torch.Generator().manual_seed(0)
    compared: list[dict[str, Any]] = []
    for stage in range(stages):
        if time.perf_counter() - begin > seconds:
            break
        for step in range(INTERVAL):
            chosen = torch.randint(len(task.train), (BATCH,), generator=draw).tolist()
            batch = collate([task.train[i] for i in chosen], tokenizer.pad_token_id)
            model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
            if step == INTERVAL - 1:
                ops.checkpoint_(table)
            optimizer.step()
            optimizer.zero_grad()
        start = [tensor.clone() for tensor in (*weights, *table.best_flats)]
        search = ("parabolic", "linear")[stage % 2]
        ends: dict[str, dict[str, Any]] = {}
        for name, executor in list(executors.items()):
            if name != "eager" and not name.endswith(search):
                continue
            with torch.no_grad():
                torch._foreach_copy_([*weights, *table.best_flats], start)
            program = StageProgram(table, validation, make_search(search, max_tau))
            try:
                executor.run(program)
            except RuntimeError as error:
                if name == "eager":
                    raise
                refused[name.removesuffix(f" {search}")] = f"in stage {stage}: {str(error)[:500]}"
                executors.pop(name).close()
                continue
            ends[name.removesuffix(f" {search}")] = {
                "tau": program.search.best_tau,
                "losses": list(program.search.losses),
                "weights": [weight.clone() for weight in weights],
                "fault": getattr(executor, "fault", None),
            }
        with torch.no_grad():
            torch._foreach_copy_(weights, ends["eager"]["weights"])
        compared.append(_compare(search, ends))
    for executor in executors.values():
        executor.close()
    return {"dtype": str(dtype), "refused": refused, **_totals(compared), "each": compared}


def _compare(search: str, ends: dict[str, dict[str, Any]]) -> dict[str, Any]:
    eager = ends.pop("eager")
    found: dict[str, Any] = {"search": search, "tau": eager["tau"], "evaluations": len(eager["losses"])}
    for name, end in ends.items():
        found[name] = {
            "tau": end["tau"],
            "same_tau": end["tau"] == eager["tau"],
            "same_losses": end["losses"] == eager["losses"],
            "same_weights": all(map(torch.equal, end["weights"], eager["weights"])),
            "fault": end["fault"],
        }
    return found


def _totals(compared: list[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {"stages": len(compared)}
    for name in (STAGE, STEP):
        if ran := [one[name] for one in compared if name in one]:
            sums = {key: sum(end[key] for end in ran) for key in ("same_tau", "same_losses", "same_weights")}
            totals[name] = {"stages": len(ran), **sums}
    return totals
