"""What the fast path computes: few padded tokens, logits of labelled positions, nothing read back."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ffkernels.validation import fast as validation_fast
from ffkernels.validation.loss import ValidationLoss


class Watch(TorchDispatchMode):
    """Names of the operators that ran and the largest tensor with a vocabulary-sized last dimension."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows, self.operators = vocabulary, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func.overloadpacket.__name__)
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.t:
            return out  # a view of the head's weight
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.shape[:-1].numel())
        return out


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen3", "gemma"])
def test_logits_exist_for_one_chunk_of_labelled_positions(family, tiny_model, padded_batch, monkeypatch):
    monkeypatch.setitem(validation_fast._CHUNK_BYTES, "cpu", 20 * 4 * 97)
    model, batches = tiny_model(family), [padded_batch(6, 30, prompt=8)]
    whole = ValidationLoss(model, batches)
    monkeypatch.undo()
    assert float(whole()) == pytest.approx(float(ValidationLoss(model, batches)()), rel=1e-6)
    seen = []
    head = model.get_output_embeddings()
    with torch.no_grad():
        handle = head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[:-1].numel()))
        with Watch(97) as watch:
            whole()
        handle.remove()
    assert max(seen) == 20 == watch.rows
    assert sum(seen) == whole.tokens
    assert whole.tokens > 40


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "qwen3", "gemma"])
def test_nothing_is_read_back_and_no_mask_is_made(family, tiny_model, padded_batch):
    validation = ValidationLoss(tiny_model(family), [padded_batch(6, 30)])
    with Watch(97) as watch:
        validation()
    forbidden = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "where", "masked_fill"}
    assert not watch.operators & forbidden
    assert "_scaled_dot_product_flash_attention_for_cpu" in watch.operators


def test_buffers_stay_where_they_are(tiny_model, padded_batch):
    validation = ValidationLoss(tiny_model("llama"), [padded_batch(6, 30)])
    addresses = lambda: [t.data_ptr() for b in validation._loss.micro_batches for t in vars(b).values()]  # noqa: E731
    before = addresses()
    validation()
    assert addresses() == before


def test_rows_end_at_their_last_prediction(tiny_model):
    ids = torch.randint(3, 97, (2, 40))
    labels = torch.full_like(ids, -100)
    labels[0, 5], labels[1, 9] = ids[0, 5], ids[1, 9]
    validation = ValidationLoss(tiny_model("llama"), [{"input_ids": ids, "labels": labels}])
    shapes = [tuple(batch.input_ids.shape) for batch in validation._loss.micro_batches]
    assert shapes == [(2, 9)]
    assert validation.tokens == 2
