"""A pool of validation examples: what is drawn and where it is put, stages that draw, batches taken apart."""

import copy
import itertools

import pytest
import torch
from torch import nn

from ffkernels import FastForward, FastForwardConfig, ValidationLoss, ValidationPool
from ffkernels.validation.pool import draw_for_stage, placeholder_ids, rows_of


def example_of(row):
    return tuple(row["input_ids"][row["attention_mask"] != 0].tolist())


def drawn(pool, number):
    return [example_of(pool._pool[i]) for i in pool._indices(number)]


def addresses(validation):
    batches = validation.labelled.micro_batches
    return [(t.data_ptr(), t.shape) for batch in batches for t in vars(batch).values()]


def test_draws_differ_use_up_the_pool_and_depend_on_the_seed_alone(tiny_model, padded_batch):
    model, batches = tiny_model("llama"), [padded_batch(8, 30, seed=seed) for seed in range(4)]
    pool = ValidationPool(model, batches, size=8, seed=3)
    assert (pool.pool_size, pool.examples, pool.drawn, pool.path) == (32, 8, 0, "fast")
    draws = [drawn(pool, number) for number in range(8)]
    everything = {example_of({k: v[i] for k, v in b.items()}) for b in batches for i in range(8)}
    assert len(everything) == 32
    for turn in (draws[:4], draws[4:]):
        assert {row for draw in turn for row in draw} == everything and sum(map(len, turn)) == 32
    assert draws[:4] != draws[4:]
    for one, other in itertools.pairwise(draws):  # a stratum is a run of lengths
        assert max(map(len, one[:3])) <= min(map(len, other[4:]))
    again = ValidationPool(model, batches, size=8, seed=3)
    other = ValidationPool(model, batches, size=8, seed=4)
    assert [drawn(again, number) for number in range(8)] == draws
    assert [drawn(other, number) for number in range(8)] != draws


@pytest.mark.parametrize("side", ["right", "left"])
def test_each_draw_is_the_loss_of_its_examples_at_the_same_addresses(side, tiny_model, padded_batch):
    model = tiny_model("llama")
    # Prompts of different lengths: neighbours in length have different numbers of labels.
    batches = [padded_batch(9, 40, seed=s, prompt=1 + 7 * s, left=side == "left") for s in range(4)]
    pool = ValidationPool(model, batches, size=7, micro_batch_tokens=120)
    before, flops, losses = addresses(pool), pool.flops, []
    assert len(pool.labelled.micro_batches) > 2
    for number in range(12):
        assert pool.draw(number) is True
        rows = [pool._pool[i] for i in pool._indices(number)]
        losses.append(float(pool()))
        assert losses[-1] == pytest.approx(float(ValidationLoss(model, rows, check=False)()), rel=1e-6)
        assert (pool.examples, pool.drawn) == (7, number)
    assert len(set(losses)) == 12
    assert (addresses(pool), pool.version, pool.flops) == (before, 0, flops)
    model.double()  # places are made anew, for the present draw alone
    assert pool() == pytest.approx(losses[-1], rel=1e-5)
    pool.draw(1)
    settled = addresses(pool)
    assert [pool.draw(number) for number in (0, 2, 3, 1)] == [True] * 4
    assert addresses(pool) == settled
    assert float(pool()) == pytest.approx(losses[1], rel=1e-5)


def test_a_dataset_and_what_has_no_fast_path(tiny_model, padded_batch, own_loss):
    batch = padded_batch(12, 20)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(12)]
    sizes = []

    def collator(examples):
        sizes.append(len(examples))
        torch.rand(2)
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    model = tiny_model("llama")
    state = torch.get_rng_state()
    pool = ValidationPool(model, rows, size=4, collator=collator)
    assert torch.equal(torch.get_rng_state(), state) and set(sizes) == {1}
    assert pool.draw(1) is True and pool.examples == 4
    model = tiny_model("granite")
    with pytest.warns(UserWarning, match="logits_scaling"):
        pool = ValidationPool(model, rows, size=4, collator=collator)
    for number in (0, 1, 2):
        pool.draw(number)
        whole = collator([rows[i] for i in pool._indices(number)])
        assert float(pool()) == pytest.approx(own_loss(model, [whole]), rel=1e-6)
    assert sizes[-2:] == [4, 4], "not one forward per example"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"pool": lambda model: 0.0}, TypeError, "callable"),
        ({"size": 7}, ValueError, "the pool has 6 examples with something to score, and a draw takes size=7"),
        ({"size": 0}, ValueError, "size=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"bad": 500}, ValueError, "hold 500"),
    ],
)
def test_what_cannot_be_drawn_from(change, error, match, tiny_model, padded_batch):
    batch = padded_batch(6, 12)
    batch["labels"][2, 2:4] = change.pop("bad", 5)
    arguments = {"pool": [batch], "size": 3, **change}
    with pytest.raises(error, match=match):
        ValidationPool(tiny_model("llama"), arguments.pop("pool"), **arguments)


def test_without_a_pool_nothing_is_drawn(tiny_model, padded_batch):
    assert draw_for_stage(ValidationLoss(tiny_model("llama"), [padded_batch()]), 3) is None
    assert draw_for_stage(lambda model: 0.0, 3) is None


def run(model, batches, steps, state=None, until=None):
    """Train the head; returns the weights, the stages and, at ``until``, what a checkpoint has."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    optimizer = torch.optim.AdamW([model.lm_head.weight], lr=1e-3)
    pool = ValidationPool(model, batches, size=4, seed=1)
    config = FastForwardConfig(interval=2, max_tau=8, patience=None)
    ff = FastForward(model, optimizer, pool, config)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ff.load_state_dict(state["ff"])
        first = ff.optimizer_steps
        assert float(pool()) == state["loss"]
    kept = None
    model.eval()
    for step in range(first, steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == until:
            kept = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "loss": float(pool())}
            kept |= {"optimizer": optimizer.state_dict(), "ff": ff.state_dict()}
            kept = copy.deepcopy(kept)
    return model.lm_head.weight.detach().clone(), ff.stages, kept


def test_every_stage_has_its_draw_and_a_resumed_run_the_same(tiny_model, padded_batch):
    batches = [padded_batch(6, 20, seed=seed) for seed in range(3)]
    whole, stages, kept = run(tiny_model("llama"), batches, 8, until=5)
    assert [stage.draw for stage in stages] == [0, 1, 2, 3]
    before = [stage.loss_before for stage in stages]
    assert len(set(before)) == 4 and all(stage.evaluations > 1 for stage in stages)
    resumed, theirs, _ = run(tiny_model("llama"), batches, 8, state=kept)
    assert [stage.draw for stage in theirs] == [0, 1, 2, 3]
    assert [stage.losses for stage in theirs] == [stage.losses for stage in stages]
    assert torch.equal(resumed, whole)


IMAGE, VIDEO, PAD = 90, 91, 0
IDS = {"image": IMAGE, "video": VIDEO}


def tokens(*counts, token=IMAGE, length=14):
    """Rows that have so many placeholders each, and other tokens around them."""
    rows = torch.arange(1, length + 1).repeat(len(counts), 1)
    for row, count in zip(rows, counts, strict=True):
        row[2 : 2 + count] = token
    return rows


def numbered(count, *shape):
    """Entries that say which one they are."""
    return torch.arange(count, dtype=torch.float32).view(-1, *[1] * len(shape)).expand(count, *shape)


def entries(rows, key):
    return [row[key].flatten(1)[:, 0].tolist() if row[key].ndim > 1 else row[key].tolist() for row in rows]


@pytest.mark.parametrize(
    "counts, value, grid, expected",
    [
        # one entry for each token, two for each, and three tokens for each entry
        ((3, 0, 2), numbered(5, 4), None, [[0, 1, 2], [], [3, 4]]),
        ((1, 2, 0), numbered(6, 4), None, [[0, 1], [2, 3, 4, 5], []]),
        ((6, 3, 0), numbered(3, 3, 8, 8), None, [[0, 1], [2], []]),
        # as many images as rows, but not one each
        ((4, 0), numbered(2, 3, 8, 8), None, [[0, 1], []]),
        ((2, 2), numbered(2, 3, 8, 8), None, [[0], [1]]),
        # images of different sizes: 4 and 8 patches, then 12; two patches a token
        ((6, 6), numbered(24, 5), [[1, 2, 2], [1, 2, 4], [3, 2, 2]], [[*range(12)], [*range(12, 24)]]),
        ((6, 0, 6), numbered(3, 7), [[1, 2, 2], [1, 2, 4], [3, 2, 2]], [[0, 1], [], [2]]),
    ],
)
@pytest.mark.parametrize(
    "media, token, name", [("image", IMAGE, "pixel_values"), ("video", VIDEO, "x_videos")]
)
def test_images_go_to_the_rows_whose_tokens_stand_for_them(counts, value, grid, expected, media, token, name):
    batch = {"input_ids": tokens(*counts, token=token), name: value, "scale": torch.tensor(2.0)}
    if grid is not None:
        batch[f"{media}_grid_thw"] = torch.tensor(grid)
    rows = rows_of(batch, IDS)
    assert entries(rows, name) == expected
    assert [row["input_ids"].tolist() for row in rows] == [[ids] for ids in batch["input_ids"].tolist()]
    assert all(row["scale"] == 2.0 for row in rows)
    if grid is not None:
        assert torch.cat([row[f"{media}_grid_thw"] for row in rows]).tolist() == grid


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("labels", torch.arange(42).view(3, 14), [[[*range(14 * i, 14 * i + 14)]] for i in range(3)]),
        ("label", torch.tensor([5, 6, 7]), [[5], [6], [7]]),
        ("attention_mask", numbered(3, 1, 2, 2), [[[[[float(i)] * 2] * 2]] for i in range(3)]),
        ("position_ids", torch.arange(28).view(2, 1, 14).expand(2, 3, 14), None),
        ("position_ids", torch.arange(14)[None], [[[*range(14)]]] * 3),
        ("weights", torch.ones(7, 2), [[[1.0, 1.0]] * 7] * 3),
        ("names", ["a", "b", "c"], [["a"], ["b"], ["c"]]),
        ("factor", 3.0, [3.0] * 3),
    ],
)
def test_what_is_one_for_each_row_and_what_rows_share(key, value, expected):
    rows = rows_of({"input_ids": tokens(2, 0, 1), key: value}, IDS)
    if expected is None:
        assert all(torch.equal(row[key], value[:, :1]) and row[key].shape == (2, 1, 14) for row in rows)
    else:
        assert [row[key].tolist() if torch.is_tensor(row[key]) else row[key] for row in rows] == expected


@pytest.mark.parametrize(
    "counts, value, grid",
    [
        ((3, 2), numbered(4, 4), None),
        ((3, 1), numbered(2, 3, 8, 8), None),  # images of different sizes, and no grid that says which
        ((5, 7), numbered(24, 5), [[1, 2, 2], [1, 2, 4], [3, 2, 2]]),  # an image across two rows
    ],
)
def test_what_cannot_be_divided_is_named(counts, value, grid):
    batch = {"input_ids": tokens(*counts), "pixel_values": value}
    if grid is not None:
        batch["image_grid_thw"] = torch.tensor(grid)
    told = (
        rf"^\w+ has \d+ entries for 2 rows, in which \[{counts[0]}, {counts[1]}\] tokens .*with the collator"
    )
    with pytest.raises(ValueError, match=told):
        rows_of(batch, IDS)


def test_images_of_which_no_token_is_known_are_not_shared():
    batch = {"pixel_values": numbered(6, 3), "labels": torch.arange(2)}
    with pytest.raises(ValueError, match=r"^pixel_values has 6 entries for 2 rows, in which no tokens"):
        rows_of(batch, {})
    batch = {**batch, "labels": torch.arange(1)}
    assert rows_of(batch, {}) == [batch], "as many rows as labels: all are of this one"


class Pooled(nn.Module):
    """Mean over a row's tokens of (embedding + what its images say), as a loss of each row."""

    class Config:
        image_token_index = IMAGE

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.embed = nn.Embedding(100, 4)
        self.see = nn.Linear(5, 4)

    def forward(self, input_ids, pixel_values, labels):
        hidden = self.embed(input_ids)
        seen = self.see(pixel_values)
        if len(seen) != int((input_ids == IMAGE).sum()):
            raise ValueError("image features and image tokens do not match")
        hidden = hidden.masked_scatter((input_ids == IMAGE)[..., None], seen)
        return {"loss": ((hidden.mean((1, 2)) - labels) ** 2).mean()}


def test_a_pool_of_batches_is_that_of_its_examples():
    torch.manual_seed(0)
    model = Pooled()
    assert placeholder_ids(nn.Sequential(model)) == {"image": IMAGE}
    counts = [3, 0, 5, 1, 2, 2, 4, 1]
    ids, images = tokens(*counts), torch.randn(sum(counts), 5)
    starts = [0, *itertools.accumulate(counts)]
    labels = torch.randn(8)
    batches = [
        {"input_ids": ids[a:b], "pixel_values": images[starts[a] : starts[b]], "labels": labels[a:b]}
        for a, b in ((0, 3), (3, 8))
    ]
    pool = ValidationPool(model, batches, size=3)
    assert pool.pool_size == 8
    for number in range(4):
        pool.draw(number)
        with torch.no_grad():
            own = [
                model(ids[i : i + 1], images[starts[i] : starts[i + 1]], labels[i : i + 1])["loss"].item()
                for i in pool._indices(number)
            ]
        assert float(pool()) == pytest.approx(sum(own) / 3, rel=1e-5)
