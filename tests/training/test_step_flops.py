"""FLOPs of batches counted beside their training, which must not notice, and the fit beyond them."""

from collections import Counter, deque
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

from ffkernels.ops import notices
from ffkernels.reporting.flops import FlopMeter, Flops, shapes
from ffkernels.training import step_flops
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.step_flops import StepFlops


@pytest.fixture(scope="module")
def model(small):
    return add_adapter(load_model(small["model"])[0], rank=4, seed=0).train()


def batch(rows, length):
    ids = torch.arange(rows * length).reshape(rows, length) % 97
    return {"input_ids": ids, "labels": ids}


def step(costs, model, inputs):
    with costs.batch(model, inputs) as cost:
        model(**inputs).loss.backward()
    return cost[0]


def exact(model, inputs):
    return FlopMeter(0).training_step(model, inputs)


def test_a_batch_costs_what_the_meter_says(model):
    costs = StepFlops()
    inputs = batch(3, 11)
    assert step(costs, model, inputs) == exact(model, inputs)
    costs.counted[shapes(inputs)] = (3, 11), "known"
    assert step(costs, model, inputs) == "known"  # not counted twice


def test_beyond_the_counted_shapes_a_fit_says_it_to_the_flop(model):
    costs = StepFlops()
    for n in range(step_flops.SHAPES):
        step(costs, model, batch(1 + n % 3, 4 + 5 * n))
    for shape in [(5, 17), (1, 60), (7, 3)]:
        assert step(costs, model, batch(*shape)) == exact(model, batch(*shape))
    assert len(costs.counted) == step_flops.SHAPES


def test_a_step_that_raises_is_not_counted_and_leaves_no_hook(model):
    costs, hooks = StepFlops(), len(model._forward_hooks)
    with pytest.raises(RuntimeError, match="out of memory"), costs.batch(model, batch(2, 9)):
        raise RuntimeError("out of memory")
    assert costs.counted == {} and len(model._forward_hooks) == hooks


@pytest.mark.parametrize(
    "inputs, shape",
    [
        ({"labels": torch.zeros(2), "input_ids": torch.zeros(2, 5)}, (2, 5)),
        ({"labels": torch.zeros(3), "pixels": torch.zeros(3, 4, 5)}, (3, 20)),
        (torch.zeros(4, 6), (4, 6)),
        ({"x": torch.zeros(7)}, (7, 1)),
        (object(), (0, 1)),
    ],
)
def test_the_shape_of_a_batch(inputs, shape):
    assert step_flops._size(inputs) == shape


FAMILIES = ["llama", "qwen3", "gemma", "gpt_neox"]


def gradients(model, steps, around, loss=lambda model, inputs: model(**inputs).loss):
    """Of each micro-batch, with what random numbers come next."""
    torch.manual_seed(1)
    found = []
    for inputs in steps:
        with around.batch(model, inputs) if around is not None else nullcontext():
            loss(model, inputs).backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*found, torch.rand(1)]


def same(left, right):
    return len(left) == len(right) > 1 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_uncounted_steps_bit_for_bit(tiny_model, family, autocast):
    steps = [batch(2, 9), batch(3, 5), batch(2, 9)]  # they accumulate

    def loss(model, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(**inputs).loss + model(**batch(1, 4)).loss  # two forwards out of one cache of casts

    runs = [gradients(tiny_model(family), steps, way, loss) for way in (None, StepFlops())]
    assert same(*runs)


class Stateful(nn.Module):
    """All that a forward may write: buffers, attributes, lists, the random numbers; weights held twice."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.norm = nn.LSTM(4, 4, batch_first=True), nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.long))
        self.calls, self.losses, self.recent = 0, [], {"last": deque(maxlen=2), "count": Counter()}
        self.noise = {"generators": [torch.Generator().manual_seed(5)]}
        self.bounded = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x):
        self.calls += 1
        self.seen += self.calls
        x = x + torch.randn(x.shape, generator=self.noise["generators"][0])
        hidden = checkpoint(lambda x: self.recurrent(x)[0], x.mul_(1.0), use_reentrant=False)
        loss = self.norm(self.drop(self.bounded(hidden)).flatten(0, 1)).square().mean() * self.calls
        self.losses.append(loss)
        self.recent["last"].append(self.calls)
        self.recent["count"]["calls"] += 1
        return {"loss": sum(self.losses)}


def test_what_a_forward_writes_is_written_once():
    seen = []
    runs = []
    for way in (None, StepFlops()):
        torch.manual_seed(0)
        model = Stateful()
        model.norm.weight.register_hook(seen.append)
        inputs = {"x": torch.randn(2, 3, 4)}
        with parametrize.cached():  # what is cached in here is training's
            grads = gradients(model, [inputs], way, lambda model, inputs: model(**inputs)["loss"])
        assert (model.calls, len(model.losses), list(model.recent["last"])) == (1, 1, [1])
        assert model.recent["count"] == {"calls": 1}
        noise = torch.randn(3, generator=model.noise["generators"][0])
        runs.append([*grads, *model.buffers(), inputs["x"], noise])
    assert same(*runs)
    assert len(seen) == 2 and way.counted[shapes(inputs)][1].measured > 0


class Features:
    """As a distillation loss collects them."""

    def __init__(self):
        self.seen, self.calls = [], 0

    def keep(self, module, args, output):
        self.seen.append(output)
        self.calls += 1


def test_what_hooks_collect_is_of_trainings_forward_and_once():
    runs = []
    for way in (None, StepFlops()):
        torch.manual_seed(0)
        model, kept, last = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), Features(), {}
        model[0].register_forward_hook(kept.keep)
        model[1].register_forward_hook(lambda module, args, output, last=last: last.setdefault("it", output))

        def loss(model, inputs, kept=kept, last=last):
            found = model(inputs["input"]).sum() + sum(one.square().mean() for one in kept.seen)
            return found + last["it"].square().mean()

        runs.append(gradients(model, [{"input": torch.randn(2, 4)}], way, loss))
        assert (len(kept.seen), kept.calls, len(last)) == (1, 1, 1)
    assert same(*runs) and [cost.measured for _, cost in way.counted.values()] == [2 * (20 * 4 + 15 * 6)]


class Layer(nn.Linear):
    def forward(self, x):
        return x + nn.functional.dropout(super().forward(x))


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(256, 4), nn.Linear(4, 256)
        self.layers = nn.ModuleList(Layer(4, 4) for _ in range(2))

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))


def compiled(way):
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph.forward(*args)

    model, options = Layered(), {"backend": backend, "dynamic": False}
    if way == "wrapper":
        model = torch.compile(model, **options)
    elif way == "in place":
        model.compile(**options)
    elif way == "forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        for layer in model.layers:
            layer.compile(**options)
    return model, ran


@pytest.mark.parametrize("way", ["wrapper", "in place", "forward", "layers"])
def test_what_is_compiled_stays_compiled(way):
    runs = []
    for costs in (None, StepFlops()):
        torch._dynamo.reset()
        model, ran = compiled(way)
        per_step, found = [], []
        for inputs in [batch(2, 9)] * 3:
            before = len(ran)
            found += gradients(model, [inputs], costs)
            per_step.append(len(ran) - before)
        runs.append((per_step, found))
    assert runs[0][0] == runs[1][0] == [2 if way == "layers" else 1] * 3
    assert same(runs[0][1], runs[1][1])
    # Forward, two gradients of each product.
    assert [cost.measured for _, cost in costs.counted.values()] == [3 * 2 * 18 * (2 * 4 * 4 + 4 * 256)]


def test_calls_of_a_reference_model_count_as_forwards_alone(model, tiny_model):
    reference, costs = tiny_model("llama").requires_grad_(False), StepFlops()
    chosen, rejected = batch(2, 7), batch(2, 6)
    with costs.batch(model, {**chosen, "rejected": rejected["input_ids"]}, [reference]) as cost:
        policy = model(**chosen).logits.sum() - model(input_ids=rejected["input_ids"]).logits.sum()
        with torch.no_grad():
            reference(**chosen)
        policy.backward()
    two = [exact(model, inputs) for inputs in (chosen, rejected)]
    alone = exact(tiny_model("llama"), chosen).paper // 3
    assert cost[0] == Flops(sum(c.paper for c in two) + alone, sum(c.measured for c in two) + alone)


def test_batches_that_differ_in_their_labels_alone_differ_in_cost():
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model, costs = T5ForConditionalGeneration(config).train(), StepFlops()
    ids = torch.ones(2, 9, dtype=torch.long)
    for length in (3, 7):
        inputs = {"input_ids": ids, "labels": ids[:, :length].contiguous()}
        assert step(costs, model, inputs) == exact(model, inputs)
    assert len(costs.counted) == 2


def test_what_cannot_be_counted_is_said_and_costs_what_others_did(model):
    costs = StepFlops()
    with pytest.warns(notices.FFKernelsNotice, match="DynamicCache"):
        with costs.batch(model, batch(2, 9)) as cost:
            cache = DynamicCache()
            model(**batch(2, 9), past_key_values=cache).loss.backward()
    assert cost == [Flops(0, 0)] and cache.get_seq_length() == 9
    known = step(costs, model, batch(4, 9))
    assert step(costs, model, batch(4, 9)) == known != Flops(0, 0)
    assert costs.cost(shapes(batch(2, 9)), (2, 9)).measured == pytest.approx(known.measured / 2, rel=1e-6)


def test_counting_that_raises_leaves_the_step_alone():
    class Shy(nn.Linear):
        fails = iter([True])

        def forward(self, x):
            if next(self.fails, False):
                raise MemoryError("no room for a second pass")
            return {"loss": super().forward(x).sum()}

    model, inputs, costs = Shy(3, 4), {"x": torch.ones(2, 3)}, StepFlops()
    with pytest.warns(notices.FFKernelsNotice, match="MemoryError: no room for a second pass"):
        with costs.batch(model, inputs) as cost:
            model(**inputs)["loss"].backward()
    assert cost == [Flops(0, 0)] and torch.equal(model.weight.grad, torch.full((4, 3), 2.0))
