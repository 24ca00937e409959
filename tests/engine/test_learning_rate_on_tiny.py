"""The finder on the embedded model, bf16 base: rates far too small and far too large lead to the same one."""

from functools import partial

import pytest
import torch

from ffkernels import ValidationLoss, find_learning_rate


@pytest.mark.slow
def test_a_far_too_small_and_a_far_too_large_rate_lead_to_the_same():
    pytest.importorskip("peft")
    from ffkernels.training.models import add_adapter, load_model
    from ffkernels.training.tasks import collate, load_task

    found = {}
    for lr in (1e-5, 1.0):
        model, tokenizer = load_model("tiny", dtype=torch.bfloat16)
        torch.manual_seed(0)
        model = add_adapter(model, method="lora", rank=8, alpha=16, dropout=0.0, targets=None)
        task = load_task(
            "instruction", tokenizer, max_length=64, seed=0, test_examples=8, validation_examples=32
        )
        collator = partial(collate, pad_token_id=tokenizer.pad_token_id)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        batches = [collator(task.train[64 * i : 64 * i + 64]) for i in range(2)]
        validation = ValidationLoss(model, task.validation, collator=collator)
        found[lr] = find_learning_rate(model, optimizer, batches, validation)
        assert found[lr].judged_by == "examples" and found[lr].evaluations <= 20
    assert found[1e-5].restarts == 0 and found[1.0].restarts > 0
    assert 5e-3 < found[1e-5].lr < 3e-2
    assert found[1.0].lr == pytest.approx(found[1e-5].lr, rel=0.4)
