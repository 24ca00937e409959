"""Other examples at the same addresses: the same loss as a new object's, and nothing is lost on bad input."""

import pytest
import torch

from ffkernels.validation.loss import ValidationLoss


def addresses(validation):
    loss = validation._loss
    tensors = [tensor for batch in loss.micro_batches for tensor in vars(batch).values()]
    return [(t.data_ptr(), t.shape) for t in [*tensors, loss._divisor]]


def shorter(batch, rows=None, cut=12):
    """`batch` with fewer rows, its columns shorter by `cut`, and other tokens."""
    out = {key: value[:rows, : value.shape[1] - cut].clone() for key, value in batch.items()}
    out["input_ids"] = (out["input_ids"] * 7 + 5) % 90 + 3
    out["input_ids"][out["attention_mask"] == 0] = 0
    scored = out["labels"] != -100
    out["labels"][scored] = out["input_ids"][scored]
    return out


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2"])
@pytest.mark.parametrize("rows", [None, 5, 1])
def test_smaller_examples_are_copied_in_place(family, rows, tiny_model, padded_batch):
    model = tiny_model(family)
    first = padded_batch(9, 30, seed=1)
    validation = ValidationLoss(model, [first], micro_batch_tokens=90)
    assert len(validation._loss.micro_batches) > 2
    before, old_loss, flops = addresses(validation), float(validation()), validation.flops
    second = shorter(first, rows)
    assert validation.swap_batch([second]) is True
    assert addresses(validation) == before and validation.version == 0
    fresh = ValidationLoss(model, [second], micro_batch_tokens=90)
    assert (validation.examples, validation.tokens) == (fresh.examples, fresh.tokens)
    assert validation.tokens < sum(batch.positions.numel() for batch in validation._loss.micro_batches)
    assert float(validation()) == pytest.approx(float(fresh()), rel=1e-6)
    assert abs(float(validation()) - old_loss) > 1e-3
    assert validation.flops == flops  # of the places, which stayed
    assert validation.swap_batch([first]) is True
    assert float(validation()) == old_loss


def test_what_is_left_of_the_places_counts_for_nothing(tiny_model, padded_batch):
    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch(9, 30, seed=1)])
    ids = torch.tensor([[5, 6, 7]])
    assert validation.swap_batch({"input_ids": ids, "labels": ids}) is True
    assert (validation.examples, validation.tokens) == (1, 2)
    assert float(validation()) == pytest.approx(
        float(ValidationLoss(model, {"input_ids": ids, "labels": ids})()), rel=1e-6
    )


@pytest.mark.parametrize("why", ["rows", "length", "labels"])
def test_what_does_not_fit_is_made_anew(why, tiny_model, padded_batch):
    model = tiny_model("llama")
    first = padded_batch(6, 20, seed=1, prompt=8)
    validation = ValidationLoss(model, [first])
    old_flops = validation.flops
    if why == "rows":
        second = padded_batch(7, 12, seed=2, prompt=8)
    elif why == "length":
        second = padded_batch(4, 40, seed=2)
    else:
        second = {key: value.clone() for key, value in first.items()}
        second["labels"] = second["input_ids"].masked_fill(second["attention_mask"] == 0, -100)
    assert validation.swap_batch([second]) is False
    assert validation.version == 1
    fresh = ValidationLoss(model, [second])
    assert float(validation()) == float(fresh())
    assert (validation.examples, validation.tokens) == (fresh.examples, fresh.tokens)
    assert validation.flops == fresh.flops
    if why != "labels":
        assert validation.flops != old_flops
    assert validation.swap_batch([padded_batch(9, 50, seed=3)]) is False
    assert validation.version == 2


def test_the_generic_path_is_made_anew(tiny_model, padded_batch, own_loss, generic):
    model = tiny_model("granite")
    validation = generic(model, [padded_batch(4, 12)], "logits_scaling")
    second = [padded_batch(3, 10, seed=5), padded_batch(2, 9, seed=6)]
    assert validation.swap_batch(second) is False
    assert (validation.path, validation.version, validation.examples) == ("generic", 1, 5)
    assert float(validation()) == pytest.approx(own_loss(model, second), rel=1e-6)


@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_the_path_follows_the_data(tiny_model, padded_batch, own_loss):
    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch(4, 12)])
    holes = padded_batch(3, 12, seed=1)
    holes["attention_mask"][:, 1] = 0
    holes["labels"][:, 1] = -100
    assert validation.swap_batch([holes]) is False
    assert validation.path == "generic" and "holes" in validation.reason
    assert float(validation()) == pytest.approx(own_loss(model, [holes]), rel=1e-6)
    assert validation.swap_batch([padded_batch(2, 9)]) is False
    assert validation.path == "fast" and validation.version == 2


@pytest.mark.filterwarnings("ignore::ffkernels.ops.FFKernelsNotice")
def test_padding_on_the_left_for_the_first_time_is_compared_again(tiny_model, padded_batch, own_loss):
    model = tiny_model("gpt2")  # learned positions: padding on the left is another loss there
    validation = ValidationLoss(model, [padded_batch(8, 30)])
    left = padded_batch(4, 20, left=True, seed=1)
    assert validation.swap_batch([left]) is False
    assert validation.path == "generic"
    assert float(validation()) == pytest.approx(own_loss(model, [left]), rel=1e-6)


def test_a_dataset_with_its_collator(tiny_model, padded_batch):
    model, batch = tiny_model("llama"), padded_batch(6, 20)
    validation = ValidationLoss(model, [batch])
    rows = [{key: value[i] for key, value in batch.items()} for i in range(3)]

    def collator(examples):
        torch.rand(2)
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    state = torch.get_rng_state()
    assert validation.swap_batch(rows, collator) is True
    assert torch.equal(torch.get_rng_state(), state)
    assert validation.examples == 3


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ([], ValueError, "empty"),
        (3, TypeError, "int"),
        ([{"input_ids": torch.tensor([[5, 6]])}], ValueError, "no labels"),
        ([{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 600]])}], ValueError, "600"),
        ([{"input_ids": torch.tensor([[5, 6]]), "labels": -torch.full((1, 2), 100)}], ValueError, "labelled"),
        (lambda model: 0.0, TypeError, "callable"),
    ],
)  # fmt: skip
def test_bad_input_leaves_the_old_examples(bad, error, match, tiny_model, padded_batch):
    validation = ValidationLoss(tiny_model("llama"), [padded_batch(4, 12)])
    before = (float(validation()), validation.examples, validation.tokens, addresses(validation))
    with pytest.raises(error, match=match):
        validation.swap_batch(bad)
    assert (float(validation()), validation.examples, validation.tokens, addresses(validation)) == before
    assert validation.version == 0


def test_a_callable_has_no_examples(tiny_model, padded_batch):
    validation = ValidationLoss(tiny_model("llama"), lambda model: 1.0)
    with pytest.raises(TypeError, match="callable"):
        validation.swap_batch([padded_batch(2, 8)])


def test_swapped_examples_follow_the_model_to_another_dtype_of_itself(tiny_model, padded_batch):
    model = tiny_model("llama")
    first = padded_batch(6, 20)
    validation = ValidationLoss(model, [first])
    validation.swap_batch([shorter(first)])
    model.double()
    fresh = ValidationLoss(model, [shorter(first)])
    assert float(validation()) == pytest.approx(float(fresh()), rel=1e-12)
