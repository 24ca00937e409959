"""A bare evaluation sees weights that moved in place since the last one: no cast or norm of them is kept."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from ffkernels.validation.evaluator import evaluation_mode
from ffkernels.validation.loss import ValidationLoss

CPU = torch.device("cpu")


def adapted(tiny_model, base, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False, **options
    )
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_model("llama").to(base), config)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16 base", "autocast", "bf16 base and autocast"])
def test_moved_adapters_are_seen(kind, precision, tiny_model, padded_batch):
    base = torch.bfloat16 if "bf16" in precision else torch.float32
    model = adapted(tiny_model, base, use_dora=kind == "dora", use_rslora=kind == "rslora")
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in moving.values()} == {torch.float32}
    if kind == "dora":
        assert any("magnitude" in name for name in moving)
    batch = padded_batch(4, 16)
    validation = ValidationLoss(model, [batch])
    assert validation.path == "fast", validation.reason
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if "autocast" in precision else nullcontext()
    with autocast:
        model(**batch).loss.backward()  # as training does: casts of the weights are cached
        with evaluation_mode(model, CPU):
            losses = [float(validation.evaluate())]
            for name in moving:
                moving[name].mul_(1.5)
                losses.append(float(validation.evaluate()))
                fresh = ValidationLoss(model, [batch], check=False)
                assert losses[-1] == float(fresh.evaluate())
            for name in moving:
                moving[name].div_(1.5)
            assert float(validation.evaluate()) == pytest.approx(losses[0], rel=1e-3)
    with autocast if "autocast" in precision else nullcontext():
        assert float(validation()) == pytest.approx(losses[0], rel=1e-3)
    assert all(one != other for one, other in pairwise(losses))
