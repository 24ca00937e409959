"""What shares a forward, at which places, and losses by example against one example at a time."""

import itertools

import pytest
import torch

from ffkernels import ValidationLoss
from ffkernels.validation.batches import Example
from ffkernels.validation.micro_batches import assign, lay_out, plan_micro_batches, read_together


def one_by_one(model, batch):
    """(S, n) of each row of a batch, by the model's own loss on it alone, sorted."""
    model.eval()
    rows = []
    for row in range(len(batch["input_ids"])):
        kept = batch["attention_mask"][row].bool()
        single = {key: value[row : row + 1, kept] for key, value in batch.items()}
        tokens = int((single["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            rows.append((float(model(**single).loss) * tokens, tokens))
    model.train()
    return sorted(rows)


def pairs(validation):
    loss, sums = validation.measure()
    assert torch.equal(loss, validation()), "the same number, whether or not the sums are taken"
    tokens = validation.example_tokens
    assert tokens.tolist() == validation.example_counts
    assert sums.dtype == tokens.dtype == torch.float64 and sums.shape == tokens.shape
    assert float(sums.sum() / tokens.sum()) == pytest.approx(float(loss), rel=1e-14)
    return sorted(zip(sums.tolist(), tokens.tolist(), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("left", [False, True])
def test_each_example_has_its_own_loss(family, left, tiny_model, padded_batch):
    model, batch = tiny_model(family), padded_batch(7, 24, left=left)
    validation = ValidationLoss(model, [batch], micro_batch_tokens=60)
    assert len(validation.labelled.micro_batches) > 1
    expected = one_by_one(model, batch)
    found = pairs(validation)
    assert [n for _, n in found] == [n for _, n in expected]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], rel=3e-6)
    assert model.training
    loss, sums = validation.measure()
    assert read_together(loss, sums) == (float(loss), sums.tolist())
    with torch.no_grad():
        model.eval()
        assert all(map(torch.equal, validation.evaluate_with_sums(), (loss, sums)))


def test_parts_of_logits_do_not_show(tiny_model, padded_batch):
    validation = ValidationLoss(tiny_model("llama"), [padded_batch(5, 24)])
    whole = pairs(validation)
    validation.labelled.chunk_rows, validation.labelled.part_rows = 11, 3
    assert [s for s, _ in pairs(validation)] == pytest.approx([s for s, _ in whole], rel=1e-6)


def test_examples_that_are_exchanged_in_place_keep_every_address(tiny_model, padded_batch):
    model, new = tiny_model("llama"), padded_batch(4, 20, seed=3)
    validation = ValidationLoss(model, [padded_batch(5, 24)])

    def addresses():
        places = [batch.places for batch in validation.labelled.micro_batches]
        return [tensor.data_ptr() for tensor in (*places, validation.example_tokens)]

    before = addresses()
    assert validation.swap_batch([new])
    found = pairs(validation)
    assert addresses() == before
    assert found[0] == (0.0, 0.0)  # the fifth row holds no example now
    assert [n for _, n in found[1:]] == [n for _, n in one_by_one(model, new)]
    assert [s for s, _ in found[1:]] == pytest.approx([s for s, _ in one_by_one(model, new)], rel=3e-6)


def test_examples_that_do_not_fit_are_laid_out_anew(tiny_model, padded_batch):
    model, new = tiny_model("llama"), padded_batch(9, 40, seed=4)
    validation = ValidationLoss(model, [padded_batch(3, 12)])
    assert not validation.swap_batch([new])
    assert [n for _, n in pairs(validation)] == [n for _, n in one_by_one(model, new)]


def test_others_have_one_number(tiny_model, padded_batch):
    model, batch = tiny_model("llama"), padded_batch(3, 12)
    generic = ValidationLoss(model, [{**batch, "position_ids": torch.arange(12).expand(3, 12)}])
    for validation in (ValidationLoss(model, lambda model: 1.0), generic):
        assert validation.example_tokens is validation.example_counts is None
        assert validation.measure() == (validation(), None)


def test_micro_batches_cover_everything_within_the_limit():
    generator = torch.Generator().manual_seed(0)
    for limit, cost in itertools.product((1, 40, 100, 1000), (0, 16, 512)):
        lengths = torch.randint(1, 60, (50,), generator=generator).tolist()
        groups = plan_micro_batches(lengths, limit, cost)
        assert sorted(itertools.chain(*groups)) == list(range(50))
        for group in groups:
            assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit


def test_micro_batches_are_the_cheapest():
    generator = torch.Generator().manual_seed(1)
    for limit, cost in itertools.product((30, 80, 500), (0, 7, 60)):
        lengths = sorted(torch.randint(1, 30, (9,), generator=generator).tolist())

        def price(groups, cost=cost, lengths=lengths):
            return sum(len(group) * max(lengths[i] for i in group) + cost for group in groups)

        cheapest = float("inf")
        for cuts in itertools.product((False, True), repeat=8):
            edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 9]
            groups = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
            if all(len(g) == 1 or len(g) * lengths[g[-1]] <= limit for g in groups):
                cheapest = min(cheapest, price(groups))
        assert price(plan_micro_batches(lengths, limit, cost)) == cheapest


def test_a_large_set_is_planned_quickly():
    groups = plan_micro_batches([20] * 2000 + [50] * 1000, 1 << 20, 32)
    assert [len(group) for group in groups] == [2000, 1000]
    assert plan_micro_batches([], 100, 10) == []


def example(computed, scored):
    labels = torch.full((computed + 1,), -100)
    labels[computed + 1 - scored :] = 1
    return Example(torch.ones(computed + 1, dtype=torch.int64), labels)


def test_examples_find_their_places():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
        rooms = [(draw(1, 5), draw(3, 12), 0) for _ in range(draw(1, 5))]
        rooms = [(rows, length, rows * length) for rows, length, _ in rooms]
        # As many examples as there are rows, none longer than its row: these always fit.
        examples = [
            example(computed := draw(1, length + 1), draw(1, computed + 1))
            for rows, length, _ in rooms
            for _ in range(rows)
        ]
        placed = assign(examples, rooms)
        assert placed is not None
        assert sorted(map(id, examples)) == sorted(id(one) for group in placed for one in group)
        for group, (rows, length, labels) in zip(placed, rooms, strict=True):
            assert len(group) <= rows and sum(one.scored for one in group) <= labels
            assert all(one.computed <= length for one in group)
    # The first in the room with most labels would leave none that has enough for the second.
    placed = assign([example(3, 1), example(2, 2)], [(1, 3, 3), (1, 4, 1)])
    assert [[one.scored for one in group] for group in placed] == [[2], [1]]
    assert assign([example(3, 1)] * 2, [(1, 3, 9)]) is None
    assert assign([example(4, 1)], [(1, 3, 9)]) is None
    assert assign([example(3, 3)], [(1, 3, 2)]) is None


def test_places_that_stay_empty():
    batch = lay_out([example(2, 1)], 9, rows=2, length=4, scored=3)
    assert batch.input_ids.tolist() == [[1, 1, 9, 9], [9, 9, 9, 9]]
    assert batch.positions.tolist() == [1, 0, 0]
    assert batch.targets.tolist() == [1, -100, -100]
    assert batch.places.tolist() == [[3, 0, 3, 3], [3, 3, 3, 3]]
    assert lay_out([], 9, rows=1, length=2, scored=1).targets.tolist() == [-100]
