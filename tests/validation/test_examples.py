"""Losses by example against one example at a time, and that they are the validation loss when summed."""

import pytest
import torch

from ffkernels import ValidationLoss
from ffkernels.validation.examples import read_together


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
        return [
            tensor.data_ptr() for tensor in (*validation.labelled.examples._places, validation.example_tokens)
        ]

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
