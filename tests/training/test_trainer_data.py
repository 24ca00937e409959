"""What a Trainer evaluates on: examples are told from batches by the Trainer's own, and batched as there."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import Trainer, TrainingArguments

from ffkernels.training.trainer_data import evaluation_data


class AnyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, labels=None, **inputs):
        return {"loss": self.weight.sum()}


def numbered(items):
    return Subset(items, range(len(items)))


class Streamed(IterableDataset):
    """Sized, as packed streams are."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


def images(channels, labels):
    return [{"pixel_values": torch.randn(channels, 4, 4), "labels": torch.ones(labels)} for _ in range(10)]


# Examples whose shapes look like those of batches.
EXAMPLES = {
    "as many labels as channels": images(3, 3),
    "a label for the one channel": images(1, 1),
    "choices": [
        {"input_ids": torch.ones(4, 6, dtype=torch.long), "labels": torch.tensor(1)} for _ in range(10)
    ],
    "time series": [{"past": torch.randn(7, 2), "labels": torch.randn(7, 1)} for _ in range(10)],
    "lists of lists": [{"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]} for _ in range(10)],
}


@pytest.fixture
def make(tmp_path):
    def make(train=None, evaluated=None, **options):
        options = {"per_device_eval_batch_size": 4, "remove_unused_columns": False, **options}
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], dataloader_pin_memory=False, **options
        )
        return Trainer(AnyModel(), args, train_dataset=train, eval_dataset=evaluated)

    return make


def stacked(items):
    return {key: torch.stack([torch.as_tensor(item[key]) for item in items]) for key in items[0]}


def same(left, right):
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        for mine, theirs in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", ["eval_dataset", numbered, Streamed, list, iter])
def test_items_are_examples_whatever_their_shapes(make, name, kind):
    items = EXAMPLES[name]
    if kind == "eval_dataset":
        data = evaluation_data(make(evaluated=Streamed(items)), None, 9)
    else:
        data = evaluation_data(make(train=items), kind(items), 9)
    assert data.sizes == [4, 4, 1] and len(data.examples) == 9
    for batch, start in zip(data.batches, (0, 4, 8), strict=True):
        expected = stacked(items[start : min(start + 4, 9)])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_list_of_batches_is_one_whatever_their_shapes(make, name):
    items = EXAMPLES[name]
    batches = [stacked(items[:3]), stacked(items[3:8])]
    for given in (batches, iter(batches), DataLoader(batches, batch_size=None)):
        data = evaluation_data(make(train=numbered(items)), given)
        assert data.examples is None and data.sizes == [3, 5]
        assert same(data.batches, batches)
    one = evaluation_data(make(train=items), batches[1])
    assert one.batches == [batches[1]] and one.sizes == [5]
    assert evaluation_data(make(), batches).batches == batches  # a Trainer that makes its own training data


def test_of_several_eval_datasets_the_first(make):
    first, second = images(3, 3), images(3, 3)
    for given in (None, {"a": numbered(first), "b": second}):
        trainer = make(train=second, evaluated={"a": first, "b": Streamed(second)})
        data = evaluation_data(trainer, given, 2)
        assert torch.equal(data.batches[0]["pixel_values"], stacked(first[:2])["pixel_values"])


def test_the_trainers_own_sampler_says_which_examples_share_a_batch(make):
    items = [{"input_ids": [1] * n, "labels": n} for n in (3, 1, 2, 1, 3, 2)]

    class Shortest(Trainer):
        def _get_eval_sampler(self, dataset):
            return sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))

    trainer = make(per_device_eval_batch_size=2, dataloader_drop_last=True)
    trainer.__class__ = Shortest
    assert [b["labels"].tolist() for b in evaluation_data(trainer, numbered(items)).batches] == [
        [1, 1],
        [2, 2],
        [3, 3],
    ]
    trainer.args.per_device_eval_batch_size = 16  # not one full batch
    assert evaluation_data(trainer, numbered(items[1:2])).sizes == [1]


def test_items_unlike_the_trainers_examples_are_refused(make):
    trainer = make(train=[{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(ValueError, match=r"items with \['completion', 'prompt'\].*\['input_ids', 'labels'\]"):
        evaluation_data(trainer, [{"prompt": "a", "completion": "b"}])
