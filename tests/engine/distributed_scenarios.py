"""What the ranks of the distributed tests do; each function runs on every rank and returns plain values."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from ffkernels.engine.distributed import LOSS, UPDATE, Ranks, together

CPU = torch.device("cpu")


def exchange_rows(rank, size):
    ranks = Ranks(CPU)
    rows = ranks.exchange(UPDATE, 0.1 * rank, float("nan"), -(2**62) - rank)
    return [[row.kind, row.failed, row.a, repr(row.b), row.c] for row in rows]


def mean_loss(rank, size):
    """Sums whose order of adding shows in float64."""
    ranks = Ranks(CPU)
    totals = [1e16, 1.0, -1e16, 1.0]
    mean = ranks.mean(lambda: (torch.tensor(totals[rank], dtype=torch.float64), rank + 1))
    nothing = ranks.mean(lambda: (float("inf") if rank else float("-inf"), 1))
    return [mean.hex(), repr(nothing)]


def one_raises(rank, size, who, kind):
    """Rank `who` raises in its measurement, then all go on together."""
    ranks = Ranks(CPU)
    kinds = {"RuntimeError": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt}

    def measure():
        if rank in who:
            raise kinds[kind](f"rank {rank} stumbles")
        return 1.0, 1

    try:
        ranks.mean(measure)
    except BaseException as error:
        ranks.fail(error)  # as the stage around it does; must not be sent twice
        return [type(error).__name__, str(error), ranks.mean(lambda: (rank, 1))]


def one_raises_while_made(rank, size):
    ranks = Ranks(CPU)
    with together(ranks):
        if rank == 1:
            raise ValueError("no labels here")
    return "made"


def different_places(rank, size):
    Ranks(CPU).exchange(LOSS if rank else UPDATE)


def different_facts(rank, size):
    ranks = Ranks(CPU)
    ranks.agree({"interval": 6, "weights": ["a", "b"]}, "do so")
    ranks.agree({"search": "linear", "interval": 6 if rank != 1 else 8}, "give all ranks the same config")


def one_dies(rank, size, how):
    ranks = Ranks(CPU)
    ranks.mean(lambda: (1.0, 1))
    if rank == 1:
        if how == "kill":
            os.kill(os.getpid(), 9)
        raise SystemExit(3)  # leaves without a word, as sys.exit() in a user's loop does
    time.sleep(0.05)
    ranks.mean(lambda: (1.0, 1))


def a_group_of_some(rank, size):
    """Ranks 0 and 1 of three train together, rank 2 does something else."""
    group = dist.new_group([0, 1])
    if rank == 2:
        try:
            Ranks(CPU, group)
        except ValueError as error:
            return str(error)
    return Ranks(CPU, group).mean(lambda: (rank, 1))


def tiny_lm(family="gpt_neox", adapters=True, seed=0):
    """A random causal model of two layers, with LoRA on its attention; the same on every rank."""
    import peft
    import transformers

    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(intermediate_size=64, max_position_embeddings=64)
    if family == "gpt_neox":
        config = transformers.GPTNeoXConfig(**sizes)
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if adapters:
        names = ["query_key_value"] if family == "gpt_neox" else ["q_proj", "v_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0))
    return model


def rows_of(n, length=20, seed=0, padded=True):
    """Rows that one could learn: a token is followed by the next; of different lengths where padded."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 40, (n, 1), generator=generator)
    ids = start + torch.arange(length)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(n if padded else 0):
        kept = int(torch.randint(5, length + 1, (), generator=generator))
        mask[row, kept:], labels[row, kept:], ids[row, kept:] = 0, -100, 0
        labels[row, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def wrap(model, how):
    """Spread the model over the ranks; returns the module to train."""
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if how.startswith("fsdp"):
        from torch.distributed.fsdp import fully_shard

        for module in model.modules():
            if type(module).__name__ in ("GPTNeoXLayer", "LlamaDecoderLayer"):
                fully_shard(module)
        fully_shard(model)
    return model


def whole(parameter):
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def train_lm(rank, size, how="ddp", family="gpt_neox", adapters=True, validation=None, steps=6, **config):
    """Six optimizer steps on the same global batches, whatever the number of ranks."""
    from ffkernels import FastForward, FastForwardConfig, ValidationLoss

    model = wrap(tiny_lm(family, adapters), how)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    if validation == "generic":
        batches = [rows_of(1, seed=50 + i) for i in range(7)]
        for batch in batches:  # a key that the fast path does not know
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    elif validation == "callable":
        batch = rows_of(4, seed=50)

        def batches(model):
            return (model.module if how == "ddp" else model)(**batch).loss

    else:
        batches = [rows_of(4, seed=50), rows_of(3, length=30, seed=51)]
    loss = ValidationLoss(model, batches)
    ff = FastForward(model, optimizer, loss, FastForwardConfig(**{"interval": 2, **config}))
    for step in range(steps):
        batch = rows_of(8, seed=step, padded=False)
        share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        model(**{key: value[share] for key, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = float(loss())
    weights = [whole(p) for p in model.parameters() if p.requires_grad]
    return {
        "taus": [stage.tau for stage in ff.stages],
        "losses": [[loss.hex() for _, loss in stage.losses] for stage in ff.stages],
        "steps": [stage.optimizer_step for stage in ff.stages],
        "executor": [ff.stages[0].executor, ff.stages[0].executor_reason],
        "flops": sum(stage.flops for stage in ff.stages),
        "path": loss.path,
        "reason": loss.reason,
        "examples": [loss.examples, loss.tokens],
        "measured": measured,
        "weights": torch.cat([w.flatten() for w in weights]).tolist(),
        "training": model.training,
    }
