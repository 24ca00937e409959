"""TF32 is seen by whichever of PyTorch's interfaces it was switched on, and where it is in force only."""

from __future__ import annotations

import pytest
import torch

from ffkernels.graphs import check as graph_check
from ffkernels.graphs.token import describe_change, token
from ffkernels.validation import check as validation_check
from ffkernels.validation.causal_lm import find_causal_lm
from ffkernels.validation.loss import ValidationLoss
from ffkernels.validation.tf32 import cuda_products_in_tf32

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def as_the_trainer_does():
    pytest.importorskip("transformers.utils.import_utils").enable_tf32(True)


def root(precision):
    torch.backends.fp32_precision = precision


def products(precision):
    torch.backends.cuda.matmul.fp32_precision = precision


def backend(precision):
    torch.backends.cudnn.fp32_precision = precision


def allow():
    torch.backends.cuda.matmul.allow_tf32 = True


WAYS = {
    "nothing": ([], False),
    "TrainingArguments(tf32=True)": ([as_the_trainer_does], True),
    "high": ([lambda: torch.set_float32_matmul_precision("high")], True),
    "medium": ([lambda: torch.set_float32_matmul_precision("medium")], True),
    "highest": ([lambda: torch.set_float32_matmul_precision("highest")], False),
    "allow_tf32": ([allow], True),
    "the root": ([lambda: root("tf32")], True),
    "the products": ([lambda: products("tf32")], True),
    "the backend": ([lambda: backend("tf32")], True),
    "all but the products": ([lambda: root("tf32"), lambda: products("ieee")], False),
    "all but the backend": ([lambda: root("tf32"), lambda: backend("ieee")], False),
    "all again": ([lambda: root("tf32"), lambda: products("ieee"), lambda: products("none")], True),
    "the old one over the root": ([allow, lambda: root("ieee")], True),
    "what CUDA has not": ([lambda: root("bf16")], False),
}


@pytest.mark.parametrize("way", WAYS)
def test_tolerances_and_tokens_follow_tf32(way, tiny_model, padded_batch, default_precision):
    model = tiny_model("llama")
    validation = ValidationLoss(model, [padded_batch()])
    lm, before = find_causal_lm(model), token(validation)
    statements, in_force = WAYS[way]
    for statement in statements:
        statement()
    assert cuda_products_in_tf32() is in_force
    assert validation_check._tolerance(lm, model, GPU) == (2e-3 if in_force else 2e-5)
    assert graph_check.loss_tolerance(validation, GPU) == (1e-4 if in_force else 1e-5)
    assert validation_check._tolerance(lm, model, CPU) == 2e-5
    assert graph_check.loss_tolerance(validation, CPU) == 1e-5
    after = token(validation)
    assert (after != before) is in_force
    if in_force:
        assert "a precision or determinism switch (IEEE float32 → TF32)" in describe_change(before, after)


@pytest.mark.parametrize(
    ("dtype", "own", "captured"), [(torch.float64, 2e-5, 1e-5), (torch.bfloat16, 2e-2, 5e-3)]
)
def test_other_types_have_no_tf32(dtype, own, captured, tiny_model, default_precision):
    model = tiny_model("llama").to(dtype)
    validation = ValidationLoss(model, lambda model: 0.0)
    root("tf32")
    assert validation_check._tolerance(find_causal_lm(model), model, GPU) == own
    assert graph_check.loss_tolerance(validation, GPU) == captured
