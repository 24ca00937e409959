"""What a model's own loss is the mean of: the number of any batching is that of the rows one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.mean import Mean

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NONE = -100


class Tokens(nn.Module):
    """A head over embeddings; what is made of its logits, (rows, length, 5), and labels is ``loss``."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.loss = nn.Embedding(40, 8), nn.Linear(8, 5), loss

    def forward(self, tokens, labels):
        logits = self.head(self.embedding(tokens))
        return {"loss": self.loss(logits, labels), "logits": logits}


def token_losses(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def ctc(logits, labels, reduction):
    probabilities = logits.log_softmax(-1).transpose(0, 1)
    lengths = torch.full((len(labels),), logits.shape[1])
    return F.ctc_loss(
        probabilities, labels.clamp(min=0), lengths, labels.ge(0).sum(1), reduction=reduction, blank=4
    )


def next_token(logits, labels):
    """A causal language model's, in its own words and without a mean of nothing."""
    losses = token_losses(logits[:, :-1], labels[:, 1:])
    return losses.sum() / labels[:, 1:].ge(0).sum().clamp(min=1)


# Each with what it is the mean of, and the sum of a row's losses and how many they are.
LOSSES = {
    "tokens": (lambda z, y: F.cross_entropy(z.transpose(1, 2), y), Mean(), None),
    "next tokens": (next_token, Mean(shifted=True), lambda z, y: (next_token(z, y), y[:, 1:].ge(0).sum())),
    "sums of a sequence's tokens": (lambda z, y: token_losses(z, y).sum(1).mean(), Mean("rows"), None),
    "CTC, mean": (lambda z, y: ctc(z, y, "mean"), Mean("rows"), None),
    "CTC, sum": (lambda z, y: ctc(z, y, "sum"), Mean("sum"), None),
    "with a penalty that no label is needed for": (
        lambda z, y: next_token(z, y) + 3.0,
        Mean(shifted=True),
        lambda z, y: (next_token(z, y) + 3.0, y[:, 1:].ge(0).sum()),
    ),
}


def labelled(rows, length, seed, least=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (rows, length), generator=generator)
    labels = torch.randint(0, 4, (rows, length), generator=generator)
    for row in range(rows):
        labels[row, least + (5 * row + seed) % (length - least) :] = NONE
    return {"tokens": tokens, "labels": labels}


@pytest.mark.parametrize("name", LOSSES)
def test_any_batching_is_the_rows_one_by_one(name):
    loss, mean, of_row = LOSSES[name]
    model, batches = Tokens(loss), [labelled(5, 9, seed=1), labelled(1, 12, seed=2)]
    validation = ValidationLoss(model, batches)
    weighed = []
    for batch in batches:
        for i in range(len(batch["labels"])):
            y = batch["labels"][i : i + 1]
            with torch.no_grad():
                z = model(batch["tokens"][i : i + 1], y)["logits"]
                value, count = of_row(z, y) if of_row else (loss(z, y), y.ge(0).sum())
            weighed.append((float(value), int(count) if mean.over == "targets" else 1))
    expected = sum(value * count for value, count in weighed) / sum(count for _, count in weighed)
    assert validation._mean == mean
    assert float(validation()) == pytest.approx(expected, rel=1e-6)
    assert validation.tokens == sum(count for _, count in weighed) and validation.examples == 6
    apart = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    assert float(ValidationLoss(model, apart)()) == pytest.approx(expected, rel=1e-6)


def test_labels_that_are_all_targets_are_counted_one_by_one():
    """No label is left out, −100 would be one like others: batches of other lengths weigh by their labels."""
    model = Tokens(lambda z, y: F.mse_loss(z[..., 0], y.float()))
    batches = [
        {k: v.abs() for k, v in labelled(n, length, seed=n).items()} for n, length in ((1, 3), (2, 17))
    ]
    with torch.no_grad():
        a, b = (float(model(**batch)["loss"]) for batch in batches)
    assert float(ValidationLoss(model, batches)()) == pytest.approx((3 * a + 34 * b) / 37, rel=1e-6)


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "dropout": 0.0}
    if name == "XLNet":  # a "LM head model" whose labels are not shifted
        return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**small))
    if name == "GPT-2":
        sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            depths=[1],
            sr_ratios=[1],
            num_attention_heads=[1],
            **dict(num_encoder_blocks=1, hidden_sizes=[8], patch_sizes=[3], strides=[2], mlp_ratios=[2]),
            **dict(decoder_hidden_size=8, num_labels=3, drop_path_rate=0.0, classifier_dropout_prob=0.0),
        )
    )


@pytest.mark.parametrize("name, shifted", [("XLNet", False), ("GPT-2", True)])
def test_the_model_says_whether_it_shifts_and_not_its_name(name, shifted):
    model = transformers_model(name).eval()
    batches = []
    for rows, length, seed in ((1, 4, 1), (4, 11, 2)):
        batch = labelled(rows, length, seed)
        position_ids = torch.arange(length).expand(rows, length)
        extra = {"position_ids": position_ids} if name == "GPT-2" else {}
        batches.append({"input_ids": batch["tokens"], "labels": batch["labels"], **extra})
    total = count = 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"]
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            if shifted:
                logits, labels = logits[:, :-1], labels[:, 1:]
            total += float(F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum"))
            count += int(labels.ge(0).sum())
    validation = ValidationLoss(model, batches)
    assert (validation.path, validation.tokens) == ("generic", count)
    assert float(validation()) == pytest.approx(total / count, rel=1e-6)


def test_pixels_that_a_segmentation_leaves_out_do_not_count():
    model = transformers_model("Segformer").eval()
    model.config.semantic_loss_ignore_index = 255
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rows, left in ((2, 60), (1, 3)):
        labels = torch.randint(0, 3, (rows, 8, 8), generator=generator)
        labels.flatten(1)[:, left:] = 255
        batches.append({"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "labels": labels})
    with torch.no_grad():
        a, b = (float(model(**batch).loss) for batch in batches)
    assert float(ValidationLoss(model, batches)()) == pytest.approx((120 * a + 3 * b) / 123, rel=1e-5)


def test_finding_out_leaves_no_trace_and_is_not_done_again():
    model = Tokens(LOSSES["tokens"][0]).train()
    rows = []
    model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(out["logits"])), with_kwargs=True
    )
    state = torch.get_rng_state()
    validation = ValidationLoss(model, [labelled(6, 9, seed=1)])
    assert sorted(rows) == [1, 1, 1, 1, 2, 6] and model.training
    assert torch.equal(torch.get_rng_state(), state) and model.head.weight.grad is None
    rows.clear()
    assert validation.swap_batch([labelled(4, 9, seed=2)]) is False
    validation()
    assert rows == [4]
