"""Validation data: what is read, what is refused, and what only the generic path can run."""

import pytest
import torch
from torch import nn

from ffkernels.validation.batches import read_batches, read_examples
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.pool import ValidationPool

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LEFT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


def batch(**changes):
    made = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS.clone()} | changes
    return {key: value for key, value in made.items() if value is not None}


def test_examples_lose_their_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, -100, -100, 8], [9, 10, 11, -100]])
    left, right = read_examples([batch(attention_mask=mask, labels=labels)])
    assert (left.input_ids.tolist(), left.labels.tolist(), left.left_padded) == ([7, 8], [-100, 8], True)
    whole = [9, 10, 11]
    assert (right.input_ids.tolist(), right.labels.tolist(), right.left_padded) == (whole, whole, False)
    assert (left.computed, left.scored, right.computed, right.scored) == (1, 1, 2, 2)


def test_rows_with_nothing_to_score_are_left_out():
    labels = torch.tensor([[5, -100, -100, -100], [-100, -100, 11, -100]])
    (example,) = read_examples([batch(labels=labels)])
    assert (example.computed, example.scored) == (2, 1)


def test_accepts_lists_one_dict_generators_and_datasets(tiny_model):
    model = tiny_model("llama")
    lists = {key: value.tolist() for key, value in batch().items()}

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return batch()

    expected = float(ValidationLoss(model, [batch()])())
    for source in ([lists], batch(), (b for b in [batch()]), Dataset(), [batch(attention_mask=None)]):
        assert float(ValidationLoss(model, source)()) == expected


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ([], ValueError, "empty"),
        (None, TypeError, "NoneType"),
        (IDS, TypeError, "Tensor"),
        ("data.jsonl", TypeError, "str"),
        (3, TypeError, "int"),
        ([IDS], TypeError, "batch 0 is a Tensor"),
        ([{}], ValueError, "empty dict"),
        ([batch(), batch(labels=None)], ValueError, "batch 1 has no labels"),
        ([batch(labels=torch.full_like(IDS, -100))], ValueError, "no labelled token"),
        ([batch(labels=torch.tensor([[5, -100, -100, -100]] * 2))], ValueError, "no labelled token"),
        ([batch(labels=IDS[:, :3])], ValueError, r"labels \(2, 3\) and input_ids \(2, 4\)"),
        ([batch(labels=IDS[:1])], ValueError, r"labels \(1, 4\) and input_ids \(2, 4\)"),
        ([batch(attention_mask=torch.ones(2, 3))], ValueError, r"attention_mask \(2, 3\)"),
        ([batch(labels=IDS + 90)], ValueError, "labels hold 102.*vocabulary's 97"),
        ([batch(labels=-IDS)], ValueError, "labels hold -12"),
        ([batch(labels=IDS.float())], ValueError, "labels must be integers"),
        ([batch(input_ids=IDS + 90)], ValueError, "input_ids hold 102"),
        ([batch(input_ids=IDS.float())], ValueError, "integers"),
        ([batch(input_ids=IDS[:0], labels=IDS[:0], attention_mask=None)], ValueError, "no rows"),
        ([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}], ValueError, "an example, not a batch"),
        ([{"input_ids": [[5, 6], [7]], "labels": [[5, 6], [7]]}], ValueError, "pad the rows"),
    ],
)
def test_bad_batches(source, error, match, tiny_model):
    with pytest.raises(error, match=match):
        ValidationLoss(tiny_model("llama"), source)


def test_bad_arguments(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ValidationLoss(lambda: None, [batch()])
    for bad in (0, -5, 2.5, True, "many"):
        with pytest.raises(ValueError, match="micro_batch_tokens"):
            ValidationLoss(model, [batch()], micro_batch_tokens=bad)
    with pytest.raises(TypeError, match="collator is a int"):
        ValidationLoss(model, [batch()], collator=3)
    with pytest.raises(TypeError, match="collator must return dicts"):
        ValidationLoss(model, [batch()], collator=lambda examples: 5)
    with pytest.raises(TypeError, match="not with a callable"):
        ValidationLoss(model, lambda model: 0.0, collator=list)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])), "holes"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])), "padding positions have labels"),
        (dict(attention_mask=LEFT, labels=IDS.where(LEFT > 0, -100)), "score their first"),
        (dict(position_ids=torch.arange(4).expand(2, 4)), "carry position_ids"),
        (dict(attention_mask=torch.full((2, 1, 4, 4), -torch.inf).triu(1)), "4 dimensions"),
        (dict(attention_mask=torch.full((2, 4), 0.5)), "other than 0 and 1"),
    ],
)
def test_what_the_fast_path_does_not_compute_goes_through_the_model(changes, reason, tiny_model, generic):
    validation = generic(tiny_model("llama"), [batch(**changes)], reason)
    assert reason.split()[0] in validation.reason


def test_a_fallback_is_announced_once(tiny_model, recwarn):
    data = [batch(cache_position=torch.arange(4))]
    for _ in range(3):
        assert ValidationLoss(tiny_model("llama"), data).path == "generic"
    assert len([w for w in recwarn if "cache_position" in str(w.message)]) == 1


def test_models_without_a_loss_say_so():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.weight * x

    with pytest.raises(ValueError, match=r"returned no loss but a tensor of shape \(3,\).* loss_fn\(model\)"):
        ValidationLoss(Silent(), [{"x": torch.ones(3)}])


class Scorer(nn.Module):
    """One score for a row of token ids; ``loss`` makes a loss of the scores and the other arguments."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.loss = nn.Embedding(97, 1), loss

    def forward(self, input_ids, **others):
        rows = input_ids if isinstance(input_ids, list) else list(input_ids)
        scores = torch.stack([self.embedding(torch.as_tensor(ids)).mean() for ids in rows])
        return self.loss(scores, **others)


def boxes(scores, labels):
    found = torch.stack([label["box"].sum() for label in labels])
    return {"loss": (scores - found).square().mean()}


# Batches that no causal language model takes, each with the model that does.
OTHER_BATCHES = {
    "a list of dicts for labels": (
        boxes,
        {"input_ids": IDS, "labels": [{"box": IDS[0] / 9}, {"box": IDS[1] / 9}]},
    ),
    "rows of many lengths": (
        lambda scores, labels: {"loss": (scores - labels).square().mean()},
        {"input_ids": [[5, 6, 7], [8]], "labels": torch.tensor([0.5, 2.0])},
    ),
    "a reranker: one label for the candidates of a query": (
        lambda scores, labels: {"loss": nn.functional.cross_entropy(scores.view(len(labels), -1), labels)},
        {"input_ids": torch.arange(24).view(6, 4), "labels": torch.tensor([2, 0])},
    ),
    "a mask of one dimension": (
        lambda scores, attention_mask, labels: {"loss": ((scores - labels) * attention_mask).square().mean()},
        {"input_ids": IDS, "attention_mask": torch.tensor([1.0, 0.5]), "labels": torch.tensor([1.0, 3.0])},
    ),
    "one label for each row": (
        lambda scores, labels: ((scores - labels.view(-1)).square().mean(),),
        {"input_ids": IDS, "labels": torch.tensor([[1], [3]])},
    ),
}


@pytest.mark.parametrize("name", OTHER_BATCHES)
def test_what_a_batch_must_be_is_asked_of_the_model_that_runs_it(name):
    loss, data = OTHER_BATCHES[name]
    model = Scorer(loss)
    output = model(**data)
    expected = float(output["loss"] if isinstance(output, dict) else output[0])
    validation = ValidationLoss(model, [data])
    assert validation.path == "generic" and validation.examples == 2
    assert float(validation()) == pytest.approx(expected, rel=1e-6)


def test_a_causal_language_models_own_forward_may_take_other_labels(tiny_model):
    model = tiny_model("llama")

    class Valued(type(model)):
        def forward(self, input_ids, labels=None, **others):
            logits = super().forward(input_ids, **others).logits[:, -1, 0]
            return {"loss": (logits - labels).square().mean(), "logits": logits}

    model.__class__ = Valued
    model.eval()
    data = [batch(attention_mask=None, labels=torch.tensor([0.5, 2.0]))]
    with torch.no_grad():
        expected = float(model(**data[0])["loss"])
    with pytest.warns(UserWarning, match="labels must be integers"):
        assert float(ValidationLoss(model, data)()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("made", [lambda scores: scores, torch.squeeze, lambda scores: (scores.squeeze(), 1)])
def test_a_prediction_of_one_element_is_no_loss(made):
    with pytest.raises(ValueError, match=r"no loss but a tensor of shape .*loss_fn\(model\)"):
        ValidationLoss(Scorer(made), [{"input_ids": IDS[:1]}])
    named = Scorer(
        lambda scores: {"loss": made(scores) if isinstance(made(scores), torch.Tensor) else scores}
    )
    loss = float(ValidationLoss(named, [{"input_ids": IDS[:1]}])())
    assert loss == pytest.approx(float(named(IDS[:1])["loss"]))


def test_a_model_that_raises_says_so_at_once_with_the_batch():
    data = [{"input_ids": IDS, "labels": IDS}]
    told = r"batch 0, which has \['input_ids', 'labels'\]: KeyError: 'boxes'.*loss_fn"
    with pytest.raises(ValueError, match=told):
        ValidationLoss(Scorer(lambda scores, labels: {}["boxes"]), data)


def test_a_sized_iterable_dataset_is_iterated_over(tiny_model):
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 2

        def __iter__(self):
            return iter([batch(), batch(labels=IDS.flip(0))])

    expected = float(ValidationLoss(tiny_model("llama"), list(Stream()))())
    assert float(ValidationLoss(tiny_model("llama"), Stream())()) == expected
    assert ValidationPool(tiny_model("llama"), Stream(), size=2).pool_size == 4
    rows = [{key: value[i] for key, value in batch().items()} for i in range(2)]
    Stream.__iter__ = lambda self: iter(rows)
    collator = torch.utils.data.default_collate
    assert ValidationPool(tiny_model("llama"), Stream(), size=2, collator=collator).pool_size == 2


def test_examples_are_grouped_by_tokens():
    examples = [{"input_ids": list(range(n))} for n in (4, 6, 6, 20, 3)]
    sizes = []
    read_batches(examples, lambda group: sizes.append(len(group)) or batch(), 18)
    assert sizes == [3, 1, 1]
