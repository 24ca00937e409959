"""What the ranks of the distributed tests do; each function runs on every rank and returns plain values."""

import dataclasses
import os
import signal
import time

import torch
import torch.distributed as dist

from ffkernels.ranks.ranks import LOSS, UPDATE, Ranks, together

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


def sums_by_example(rank, size):
    """Of shards that fit into a row and of one that does not; then without those of the last rank."""
    ranks, shares = Ranks(CPU), [2, 40, 0]

    def measure(with_sums=True):
        sums = torch.arange(shares[rank], dtype=torch.float64) / 3 + rank
        return sums.sum(), 10, sums.tolist() if with_sums else None

    mean, sums = ranks.mean_with_sums(measure, shares)
    one = rank / 7
    few, some = ranks.mean_with_sums(lambda: (7 * one, 1, [one]), [1, 1, 1])
    without = ranks.mean_with_sums(lambda: measure(with_sums=rank < 2), shares)
    return [mean.hex(), [x.hex() for x in sums], few, some, list(without), ranks.mean(lambda: (rank, 1))]


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
    dist.barrier()  # rank 2 may leave only when the others have met
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

        mesh = None
        if how == "fsdp_hybrid":  # sharded over pairs of ranks, replicated over the pairs
            from torch.distributed.device_mesh import init_device_mesh

            mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copy", "shard"))
        # Mixed: adapters stay whole tensors, whose gradients the loop has to average itself.
        whole = {p for p in model.parameters() if p.requires_grad} if how == "fsdp_mixed" else set()
        for module in model.modules():
            if type(module).__name__ in ("GPTNeoXLayer", "LlamaDecoderLayer"):
                fully_shard(module, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)
    return model


def whole(parameter):
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def train_lm(rank, size, how="ddp", family="gpt_neox", adapters=True, validation=None, steps=4, **config):
    """A few optimizer steps on the same global batches, whatever the number of ranks."""
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
    ff = FastForward(model, optimizer, loss, FastForwardConfig(**{"interval": 2, "max_tau": 16, **config}))
    rates = []
    for step in range(steps):
        batch = rows_of(8, seed=step, padded=False)
        share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        model(**{key: value[share] for key, value in batch.items()}).loss.backward()
        if how == "fsdp_mixed":
            for p in trained:
                dist.all_reduce(p.grad)
                p.grad /= size
        optimizer.step()
        optimizer.zero_grad()
        rates.append(ff.learning_rate)
    measured = float(loss())
    mean, sums = loss.measure()
    assert float(mean) == measured
    if sums is not None:
        sums = sorted(zip(loss.example_tokens.tolist(), sums.tolist(), strict=True))
    weights = [whole(p) for p in model.parameters() if p.requires_grad]
    return {
        "prices": [stage.price for stage in ff.stages],
        "taus": [stage.tau for stage in ff.stages],
        "losses": [[loss.hex() for _, loss in stage.losses] for stage in ff.stages],
        "steps": [stage.optimizer_step for stage in ff.stages],
        "executor": [ff.stages[0].executor, ff.stages[0].executor_reason] if ff.stages else [],
        "rates": rates,
        "flops": sum(stage.flops for stage in ff.stages),
        "path": loss.path,
        "reason": loss.reason,
        "examples": [loss.examples, loss.tokens],
        "measured": measured,
        "by_example": sums,
        "kinds": sorted({type(p).__name__ for p in trained}),
        "weights": torch.cat([w.flatten() for w in weights]).tolist(),
        "training": model.training,
    }


AUTO = {"learning_rate": "auto", "interval": None}


class Slope(torch.nn.Module):
    """(w − target)², with more weights than two ranks can share equally."""

    def __init__(self, n=5):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(n))

    def forward(self, noise=0.0):
        return ((self.w - torch.arange(1.0, 1.0 + len(self.w)) + noise) ** 2).sum()


class Run:
    """A DDP model with a Fast Forward and a loop around it; what fails is kept as text."""

    def __init__(self, validation=lambda model: model(), wrapped=True, lr=1e-3, zero=False, **config):
        from ffkernels import FastForward, FastForwardConfig

        self.model = Slope()
        wrapped = torch.nn.parallel.DistributedDataParallel(self.model) if wrapped else self.model
        self.forward = wrapped
        settings = dict(lr=lr, weight_decay=0.0)
        if zero:  # each rank holds the optimizer's state of some weights, and sends those to the others
            from torch.distributed.optim import ZeroRedundancyOptimizer

            self.optimizer = ZeroRedundancyOptimizer(self.model.parameters(), torch.optim.AdamW, **settings)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **settings)
        settings = FastForwardConfig(**{"interval": 2, "max_tau": 64, **config})
        validation = None if settings.interval is None else validation
        self.ff = FastForward(wrapped, self.optimizer, validation, settings)

    def train(self, steps, rank, first=0):
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(100 * rank + step)
            self.optimizer.zero_grad()
            self.forward(0.1 * torch.randn(5, generator=generator)).backward()
            self.optimizer.step()

    def attempt(self, steps, rank):
        try:
            self.train(steps, rank)
        except BaseException as error:
            return {"error": type(error).__name__, "message": str(error), **self.state()}
        return self.state()

    def state(self):
        return {
            "weights": self.model.w.tolist(),
            "taus": [stage.tau for stage in self.ff.stages],
            "losses": [[tau, loss] for stage in self.ff.stages for tau, loss in stage.losses],
            "stopped": [stage.stopped_because for stage in self.ff.stages],
            "active": self.ff.active,
            "rate": self.ff.learning_rate,
        }


def slope(rank, size, steps=6, **config):
    return Run(**config).attempt(steps, rank)


def slope_resumed(rank, size, cut, steps=6, **config):
    """The same steps, saved after `cut` of them and continued by another FastForward."""
    first = Run(**config)
    first.train(cut, rank)
    second = Run(**config)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.ff.load_state_dict(first.ff.state_dict())
    second.train(steps - cut, rank, first=cut)
    return second.state()


def slope_fails(rank, size, who, at, how):
    """Rank `who` ends in its validation number `at`: by an exception, a real Ctrl-C, or at once."""
    calls = []

    def validation(model):
        calls.append(1)
        if rank == who and len(calls) == at:
            if how == "raise":
                raise torch.OutOfMemoryError("no room on this rank")
            if how == "interrupt":
                signal.raise_signal(signal.SIGINT)
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return model()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Run(validation)
    outcome = run.attempt(2, rank)
    if how != "die":  # the ranks are still in step: training can go on where the user catches the error
        run.train(2, rank, first=2)
        outcome["after"] = run.state()
    return outcome


def slope_beyond(rank, size, who, how):
    """The ranks in `who` have no loss where a weight has come far: NaN there, or an exception."""

    def validation(model):
        if rank in who and float(model.module.w.detach().abs().max()) > 0.02:
            return torch.linalg.cholesky(-torch.eye(2)).sum() if how == "raise" else float("nan")
        return model()

    return Run(validation, patience=None, search="linear").attempt(6, rank)


def slope_interrupted_between_exchanges(rank, size):
    """Ctrl-C on one rank while weights move: it is delivered after the move, and told with the next loss."""
    from ffkernels import ops

    real, calls = ops.step_, []

    def step(*args, **kwargs):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    ops.step_ = step
    return Run().attempt(2, rank)


def slope_differs(rank, size, what):
    """Rank 1 has something else; all must hear of it."""
    from ffkernels import FastForward, ValidationLoss

    if what == "interval":
        Run(interval=2 + rank)
    elif what == "no optimizer":
        model = Slope()
        other = Slope() if rank == 1 else model
        FastForward(model, torch.optim.SGD(other.parameters()), lambda model: model())
    elif what == "names":
        model = torch.nn.ModuleList([Slope(), Slope()])
        FastForward(
            model,
            torch.optim.SGD(model.parameters()),
            lambda model: model[0](),
            include="0" if rank == 0 else "1",
        )
    elif what == "examples":
        ValidationLoss(tiny_lm(), [rows_of(4, seed=rank)])
    elif what == "empty":
        ValidationLoss(tiny_lm(), [rows_of(4)] if rank == 0 else [])
    elif what == "unsynchronised":
        Run(wrapped=False, patience=None).train(2, rank)
    elif what == "unaligned":
        Run(wrapped=False).train(2, rank)
    elif what == "unaligned, no stages":
        Run(wrapped=False, **AUTO).train(2, rank)
    elif what == "rate":  # as if a c had been heard of on one rank only
        run = Run(**AUTO)
        run.train(63, rank)
        assert not run.ff.rising
        run.ff._decision.auto.rate *= 1 + rank
        run.train(1, rank, first=63)
    elif what == "rate of a state":
        run = Run(**AUTO)
        run.train(3, rank)
        begun = Run(**AUTO).ff.state_dict()["auto_rate"]
        if rank == 0:
            run.ff.load_state_dict({**run.ff.state_dict(), "auto_rate": begun})
        run.ff._decision._unconfirmed = True
        run.train(1, rank, first=3)
    elif what == "initial weights":
        run = Run(wrapped=False)
        run.model.w.data[4] += 2.0 * rank  # not small enough to change the others' Δ
        for _ in range(2):
            run.model.w.grad = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
            run.optimizer.step()
    elif what in ("optimizer_steps", "failures"):
        run = Run()
        if rank == 1:  # a checkpoint that only one rank loads
            run.ff.load_state_dict({**run.ff.state_dict(), what: -1})
        run.train(2, rank)
    elif what == "search":  # as if one rank had decided otherwise
        run = Run(max_tau=1024)
        if rank == 1:
            run.ff.config = dataclasses.replace(run.ff.config, search="linear")
        run.train(2, rank)
    elif what == "executor":
        Run(executor="step_graph")


def swapped_examples(rank, size):
    """Other examples, shared anew; then different ones on each rank."""
    from ffkernels import ValidationLoss

    model = tiny_lm()
    loss = ValidationLoss(model, [rows_of(7, seed=1)])
    kept = loss.swap_batch([rows_of(5, seed=2)])
    fresh = ValidationLoss(model, [rows_of(5, seed=2)])
    try:
        loss.swap_batch([rows_of(5, seed=rank)])
    except RuntimeError as error:
        return [kept, float(loss()) == float(fresh()), loss.examples, str(error)]


def pooled_examples(rank, size):
    """Draws from a pool; then draws with another seed on each rank."""
    from ffkernels import ValidationPool

    model, rows = tiny_lm(), [rows_of(12, seed=1)]
    pool = ValidationPool(model, rows, size=4)
    losses = [float(pool())]
    for number in (1, 2):
        pool.draw(number)
        losses.append(float(pool()))
    if size > 1:
        try:
            ValidationPool(model, rows, size=4, seed=rank)
        except RuntimeError as error:
            return [losses, pool.examples, str(error)]
    return [losses, pool.examples, ""]


def late_process_group(rank, size, **config):
    """A FastForward that was made before the job had ranks must not go its own way in it."""
    run = Run(wrapped=False, **config)
    (run.ff if run.ff.validation is None else run.ff.validation).before_ranks, run.ff.ranks = True, None
    run.train(2, rank)


def alone_among_others(rank, size):
    """Each rank trains a model of its own; that the job has others is not Fast Forward's affair."""
    from ffkernels import FastForward, FastForwardConfig, ValidationLoss

    groups = [dist.new_group([0]), dist.new_group([1])]
    model = Slope()
    loss = ValidationLoss(model, lambda model: model(), process_group=groups[rank])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + rank))
    ff = FastForward(model, optimizer, loss, FastForwardConfig(interval=1, max_tau=4096))
    for _ in range(1 + rank):
        model().backward()
        optimizer.step()
    ff.detach()
    alone = FastForward(model, optimizer, loss, FastForwardConfig(**AUTO))
    for _ in range(2 + rank):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return [ff.ranks is None, len(ff.stages), ff.stages[0].tau, alone.learning_rate]


def fsdp_fails(rank, size, how):
    """A rank that ends in the middle of a forward for which the others wait."""
    from ffkernels import FastForward, FastForwardConfig, ValidationLoss

    model = wrap(tiny_lm(), "fsdp")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    loss = ValidationLoss(model, [rows_of(4)])
    FastForward(model, optimizer, loss, FastForwardConfig(interval=1))
    model(**rows_of(2, seed=rank)).loss.backward()

    def fail(*args):
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("no room on this rank")

    if rank == 1:
        model.get_base_model().gpt_neox.layers[1].mlp.register_forward_hook(fail)
    optimizer.step()


def group_of_ddp(rank, size):
    """Two jobs of two ranks each in one world: DDP's group is the search's."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    from ffkernels import ValidationLoss

    model = torch.nn.parallel.DistributedDataParallel(Slope(), process_group=groups[rank // 2])
    loss = ValidationLoss(model, lambda model: float(rank))
    return [loss.ranks.size, loss.ranks.rank, float(loss())]


def tensor_parallel(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    from ffkernels.ranks.parallelism import why_refused

    def linear():
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    split = parallelize_module(linear(), mesh["tensor"], {"0": ColwiseParallel()})
    both = parallelize_module(linear(), mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(both, mesh=mesh["data"])
    hybrid = linear()
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
    plain = fully_shard(linear())
    old = FullyShardedDataParallel(linear(), device_id=torch.device("cpu"))
    return [why_refused(model, None) for model in (split, both, hybrid, plain, old)]


def slope_fsdp(rank, size, case):
    """Δ differs from shard to shard: zero on one rank, not finite on one, or no rows at all."""
    from torch.distributed.fsdp import fully_shard

    from ffkernels import FastForward, FastForwardConfig

    model = fully_shard(Slope(1 if case == "empty" else 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ff = FastForward(model, optimizer, lambda model: model(), FastForwardConfig(interval=1, max_tau=1000))
    model().backward()
    shard = model.w.grad.to_local()
    if rank == 1:
        shard.zero_() if case == "zero" else shard.fill_(float("nan")) if case == "nan" else None
    optimizer.step()
    stage = ff.stages[0]
    local = model.w.to_local()
    return [
        stage.tau,
        stage.stopped_because,
        local.numel(),
        whole(model.w).tolist(),
        model.w.grad is not None,
    ]


def ddp_inside(rank, size, how):
    """DDP of a model with buffers, inside of something else; one batch, so one rank has none to run."""
    from ffkernels import FastForward, FastForwardConfig, ValidationLoss

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x, labels=None):
            if self.training:
                self.seen += 1 + rank  # differs from rank to rank until the next broadcast
            return {"loss": ((x @ self.w - labels) ** 2).mean()}

    class Outer(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **batch):
            return self.inner(**batch)

    ddp = torch.nn.parallel.DistributedDataParallel(Inner())
    model = torch.compile(ddp, backend="eager") if how == "compile" else Outer(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = {"x": torch.eye(4)[:3], "labels": torch.arange(1.0, 4.0)}
    ff = FastForward(model, optimizer, ValidationLoss(model, [batch]), FastForwardConfig(interval=2))
    for _ in range(4):
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        "taus": [stage.tau for stage in ff.stages],
        "weights": ddp.module.w.tolist(),
        "own": float(ddp.module.seen),
        "syncs": ddp.require_forward_param_sync,
    }


def hugging_face_trainer(rank, size):
    """The callback in transformers' Trainer, which makes DDP of the model by itself."""
    import tempfile

    from transformers import Trainer, TrainingArguments

    from ffkernels import FastForwardCallback, FastForwardConfig

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    rows = rows_of(48, seed=3, padded=False)
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(output_dir=folder, per_device_train_batch_size=8 // size, max_steps=6, use_cpu=True)
        settings |= dict(learning_rate=1e-3, lr_scheduler_type="constant", save_strategy="no", report_to=[])
        settings |= dict(disable_tqdm=True, ddp_find_unused_parameters=False, logging_strategy="no")
        config = FastForwardConfig(interval=2, max_tau=16)
        callback = FastForwardCallback(validation=[rows_of(6, seed=9)], config=config)
        trainer = Trainer(
            model=tiny_lm(),
            args=TrainingArguments(**settings),
            train_dataset=[{key: value[i] for key, value in rows.items()} for i in range(48)],
            callbacks=[callback],
        )
        trainer.train()
    weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "stages": [[stage.tau, stage.loss_after] for stage in callback.stages],
        "weights": torch.cat(weights).tolist(),
    }
