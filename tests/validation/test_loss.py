"""The validation loss: the right number, on the right path, whatever the model and the batches."""

import warnings

import pytest
import torch
from torch import nn

from ffkernels.validation.loss import ValidationLoss

FAMILIES = ["gpt_neox", "llama", "gpt2", "qwen3", "gemma"]


def per_token_reference(model, batches):
    """Mean NLL in float64, one example and one prefix at a time: no padding, no mask, no batching."""
    model = model.double().eval()
    losses = []
    with torch.no_grad():
        for batch in batches:
            for ids, mask, labels in zip(*batch.values(), strict=True):
                real = mask.bool()
                ids, labels = ids[real], labels[real]
                for position in range(1, len(ids)):
                    if labels[position] == -100:
                        continue
                    logits = model(input_ids=ids[None, :position]).logits[0, -1]
                    losses.append(-torch.log_softmax(logits, 0)[labels[position]])
    return float(torch.stack(losses).mean()), len(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_loss(family, tiny_model, padded_batch, fast):
    batches = [padded_batch(6, 20, seed=1), padded_batch(3, 40, seed=2), padded_batch(1, 7, seed=3)]
    validation = fast(tiny_model(family), batches)
    loss = validation()
    assert loss.dtype == torch.float64 and loss.shape == () and not loss.requires_grad
    assert validation.examples == 10
    assert validation.tokens == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_float64_computation_token_by_token(family, tiny_model, padded_batch):
    model = tiny_model(family)
    batches = [padded_batch(3, 14, seed=4), padded_batch(2, 9, seed=5)]
    loss = float(ValidationLoss(model, batches)())
    exact = ValidationLoss(tiny_model(family).double(), batches)
    reference, tokens = per_token_reference(model, batches)
    assert exact.tokens == tokens
    assert float(exact()) == pytest.approx(reference, rel=1e-12)
    assert loss == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_does_not_depend_on_the_micro_batches(family, tiny_model, padded_batch):
    model = tiny_model(family)
    batches = [padded_batch(9, 30, seed=6), padded_batch(4, 50, seed=7)]
    losses = [
        float(ValidationLoss(model, batches, micro_batch_tokens=tokens, check=False)())
        for tokens in (1, 64, 200, 1 << 20)
    ]
    one_by_one = [
        {k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(len(batch["labels"]))
    ]
    losses.append(float(ValidationLoss(model, one_by_one)()))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)


def test_is_not_a_mean_of_batch_means(tiny_model, padded_batch, own_loss):
    model = tiny_model("llama")
    long, short = padded_batch(4, 60, seed=1), padded_batch(1, 5, seed=2)
    means = [own_loss(model, [batch]) for batch in (long, short)]
    loss = float(ValidationLoss(model, [long, short])())
    assert abs(loss - sum(means) / 2) > 1e-3
    assert loss == pytest.approx(own_loss(model, [long, short]), rel=2e-6)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen3", "gemma"])
def test_left_padding(family, tiny_model, padded_batch, fast):
    model = tiny_model(family)
    batches = [padded_batch(5, 20, left=True, seed=1), padded_batch(2, 30, left=True, seed=2)]
    validation = fast(model, batches)
    assert float(validation()) == pytest.approx(per_token_reference(model, batches)[0], rel=1e-6)


def test_what_the_fast_way_does_not_compute_runs_the_model_itself(tiny_model, padded_batch, generic):
    generic(tiny_model("granite"), [padded_batch(4, 12)], r"logits_scaling = 4\.0")
    # Learned positions make padding on the left another loss, of one row among many, too.
    model, one = tiny_model("gpt2"), padded_batch(1, 12, left=True, seed=4)
    if int(one["attention_mask"][0, 0]):
        one["attention_mask"][0, :3], one["labels"][0, :4] = 0, -100
    generic(model, [padded_batch(5, 20, left=True, seed=1)], "fast path gives")
    generic(model, [padded_batch(12, 24, seed=3), one, padded_batch(12, 30, seed=5)], "fast path gives")


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"]
)
def test_adapters_with_dropout(family, options, tiny_model, padded_batch, own_loss, fast):
    peft = pytest.importorskip("peft")
    targets = {"gpt_neox": ["query_key_value", "dense", "embed_out"]}.get(
        family, ["q_proj", "o_proj", "lm_head"]
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, target_modules=targets, task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(tiny_model(family), config)
    batches = [padded_batch(6, 20, seed=1)]
    validation = fast(model, batches)
    before = float(validation())
    with torch.no_grad():  # B is no longer zero: every adapter matters, the head's too
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    after = float(validation())
    assert abs(after - before) > 1e-3
    assert after == pytest.approx(own_loss(model, batches), rel=2e-6)
    with model.disable_adapter():
        assert float(validation()) == pytest.approx(before, rel=2e-6)


def test_reads_the_weights_of_the_moment(tiny_model, padded_batch, own_loss):
    model, batches = tiny_model("llama"), [padded_batch(4, 16)]
    validation = ValidationLoss(model, batches)
    first = float(validation())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert float(validation()) == pytest.approx(own_loss(model, batches), rel=2e-6) != first
    with torch.no_grad():
        model.lm_head.weight.div_(2)
    assert float(validation()) == first


def test_softcapped_logits(tiny_model, padded_batch, fast):
    batches = [padded_batch(6, 20)]
    capped, uncapped = (fast(tiny_model("gemma2", final_logit_softcapping=c), batches) for c in (0.5, None))
    assert abs(float(uncapped()) - float(capped())) > 0.01


def test_sliding_window(tiny_model, padded_batch, fast, generic):
    batches = [padded_batch(6, 20)]
    wide = fast(tiny_model("mistral", sliding_window=64), batches)
    narrow = generic(tiny_model("mistral", sliding_window=6), batches, "sliding_window = 6")
    assert abs(float(narrow()) - float(wide())) > 1e-3


def test_self_check_catches_what_structure_does_not_show(tiny_model, padded_batch, generic):
    model, batches = tiny_model("llama"), [padded_batch(4, 12)]

    class Louder(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.loss = output.loss * 1.001
            return output

    model.__class__ = Louder
    assert ValidationLoss(model, batches, check=False).path == "fast"
    generic(model, batches, "own loss is")


def test_encoder_decoder(padded_batch, generic):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    batches = [padded_batch(4, 12, seed=1), padded_batch(2, 30, seed=2)]
    model = transformers.T5ForConditionalGeneration(config)
    validation = generic(model, batches, "encoder-decoder", shifted=False)
    assert validation.tokens == sum(int((b["labels"] != -100).sum()) for b in batches)


def test_classification_weights_by_rows():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.BertConfig(vocab_size=97, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    batches = [
        {"input_ids": torch.randint(3, 97, (n, 8)), "labels": torch.randint(0, 3, (n,))} for n in (1, 5)
    ]
    with pytest.warns(UserWarning, match="ForSequenceClassification"):
        validation = ValidationLoss(model, batches)
    with torch.no_grad():
        expected = (float(model(**batches[0]).loss) + 5 * float(model(**batches[1]).loss)) / 6
    assert (validation.path, validation.tokens, validation.examples) == ("generic", 6, 6)
    assert float(validation()) == pytest.approx(expected, rel=1e-6)


class Regression(nn.Module):
    """No Hugging Face in sight: `model(x=…, y=…)` returns the mean squared error."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x, y):
        return (self.second(torch.relu(self.first(x))) - y).square().mean()


def test_plain_torch_model_and_its_flops():
    torch.manual_seed(0)
    model = Regression()
    batches = [{"x": torch.randn(n, 8), "y": torch.randn(n, 1)} for n in (3, 5)]
    with pytest.warns(UserWarning, match="Regression"):
        validation = ValidationLoss(model, batches)
    with torch.no_grad():
        expected = (3 * float(model(**batches[0])) + 5 * float(model(**batches[1]))) / 8
    assert validation.path == "generic"
    assert float(validation()) == pytest.approx(expected, rel=1e-6)
    assert validation.flops == 8 * 2 * (8 * 16 + 16 * 1)


def test_flops_of_the_fast_path_by_hand(tiny_model):
    model = tiny_model("llama")
    ids = torch.randint(3, 97, (4, 17))
    labels = ids.clone()
    labels[:, :7] = -100
    validation = ValidationLoss(model, [{"input_ids": ids, "labels": labels}])
    tokens = 4 * 16  # the last position predicts nothing and is not computed
    per_layer = 2 * tokens * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 2 * 2 * 4 * 4 * 16 * 16 * 8
    head = 2 * (4 * 10) * 32 * 97
    assert validation.flops == 2 * per_layer + head


@pytest.mark.parametrize("kind", ["float", "tensor", "one element"])
def test_callable(kind):
    model = Regression().train()
    x, y = torch.randn(4, 8), torch.randn(4, 1)
    modes = []

    def loss_fn(given):
        modes.append((given.training, torch.is_grad_enabled()))
        loss = given(x, y)
        return {"float": float, "tensor": lambda t: t, "one element": lambda t: t.reshape(1)}[kind](loss)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validation = ValidationLoss(model, loss_fn)
    loss = validation()
    assert validation.path == "callable" and modes == [(False, False)] and model.training
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert float(loss) == pytest.approx(model(x, y).item(), rel=1e-6)
    assert validation.flops == 4 * 2 * (8 * 16 + 16)


def test_callable_must_return_one_number():
    for bad in (None, "low", torch.zeros(2)):
        with pytest.raises((TypeError, ValueError), match="one number"):
            ValidationLoss(Regression(), lambda model, bad=bad: bad)()


def test_dataset_with_collator(tiny_model, padded_batch, own_loss):
    model, batch = tiny_model("llama"), padded_batch(7, 20)
    dataset = [
        {"input_ids": ids[: int(mask.sum())].tolist(), "labels": labels[: int(mask.sum())].tolist()}
        for ids, mask, labels in zip(*batch.values(), strict=True)
    ]
    calls = []

    def collator(examples):
        calls.append(len(examples))
        torch.rand(3)  # a masking collator would draw
        length = max(len(example["input_ids"]) for example in examples)
        pad = lambda key, value: torch.tensor([e[key] + [value] * (length - len(e[key])) for e in examples])  # noqa: E731
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}

    state = torch.get_rng_state()
    validation = ValidationLoss(model, dataset, collator=collator, micro_batch_tokens=60)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(calls) == 7 and len(calls) > 1
    assert validation.examples == 7
    assert float(validation()) == pytest.approx(own_loss(model, [batch]), rel=2e-6)
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, shuffle=True, collate_fn=collator)
    assert float(ValidationLoss(model, loader)()) == pytest.approx(own_loss(model, [batch]), rel=2e-6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_stay_on_the_fast_path(dtype, tiny_model, padded_batch, fast):
    fast(tiny_model("llama").to(dtype), [padded_batch(6, 20)], rel=1e-2)


def test_follows_the_model_to_another_device(tiny_model, padded_batch):
    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch(2, 8)])
    model.to("meta")
    validation.evaluator.device = torch.device("meta")
    model.to_empty(device="cpu").load_state_dict(tiny_model("llama").state_dict())
    assert float(validation()) > 0 and validation.device.type == "cpu"
