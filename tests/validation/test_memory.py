"""How much memory a validation takes at most: logits of a chunk, and log-probabilities of a part of it."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ffkernels.validation import fast as validation_fast
from ffkernels.validation.loss import ValidationLoss

VOCABULARY = 20_000
CHUNK = 64 * 4 * VOCABULARY


class Memory(TorchDispatchMode):
    """Bytes of all storages that operators made and that are alive, at most; and the largest float tensor."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
                    if tensor.is_floating_point():
                        self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.fixture
def wide(tiny_model, monkeypatch):
    monkeypatch.setitem(validation_fast._CHUNK_BYTES, "cpu", CHUNK)
    model = tiny_model("llama", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16)
    ids = torch.randint(3, VOCABULARY, (8, 61), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_never_exist(dtype, wide):
    model, batch = wide
    model.to(dtype)
    validation = ValidationLoss(model, [batch], check=False)
    assert validation.tokens == 480
    validation()
    with Memory(model) as ours:
        loss = validation()
    with torch.no_grad(), Memory(model.eval()) as theirs:
        own = model(**batch).loss
    assert float(loss) == pytest.approx(float(own), rel=1e-2 if dtype == torch.bfloat16 else 2e-6)
    full = batch["labels"].numel() * VOCABULARY * 4
    assert theirs.peak > full
    assert ours.largest <= CHUNK
    # In bf16: logits in 16 bits, and of a quarter of them a copy in fp32 and its log-probabilities.
    assert ours.peak < 1.35 * CHUNK
    assert ours.peak < 0.35 * theirs.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_losses_of_parts_are_those_of_the_whole(dtype, softcap, tiny_model, padded_batch):
    loss = ValidationLoss(tiny_model("llama"), [padded_batch(3, 12)])._loss
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(45, 97, generator=generator)).to(dtype)
    targets = torch.randint(0, 97, (45,), generator=generator)
    targets[[3, 44]] = -100
    logits[3, 5] = torch.inf  # of an ignored row: its loss is 0 whatever its logits are
    exact = logits.double()
    if softcap is not None:
        exact = (torch.tanh(logits / softcap) * softcap).double()
    kept = targets != -100
    expected = -torch.log_softmax(exact[kept], -1).gather(1, targets[kept, None]).sum()
    sums = []
    for rows in (7, 45, 100):
        loss.part_rows = rows
        parts = []
        loss._take_losses(logits, targets, softcap, parts.append)
        sums.append(float(sum(part.sum(dtype=torch.float64) for part in parts)))
    assert sums[0] == pytest.approx(sums[1], rel=1e-15) and sums[1] == sums[2]
    assert sums[0] == pytest.approx(float(expected), rel=1e-13 if dtype == torch.float64 else 1e-6)
