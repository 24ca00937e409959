"""What tests of Trainers share."""

import itertools

import pytest
import torch


@pytest.fixture
def arguments(tmp_path):
    """Seven steps on the CPU, quietly: options of ``TrainingArguments``."""
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 7,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


@pytest.fixture
def rising():
    """``rising()``: a validation loss that no step improves."""

    def make():
        calls = itertools.count()
        return lambda model: float(next(calls))

    return make


@pytest.fixture
def weights():
    """``weights(trainer)``: copies of what trains."""
    return lambda trainer: [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.fixture
def equal():
    """``equal(left, right)``: whether two lists of tensors are the same to the bit."""
    return lambda left, right: (
        len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    )


@pytest.fixture
def prompt_and_response():
    """The two texts of an example in bytes, whose labels are −100 on the first and the second's tokens."""
    from ffkernels.training.tokenizer import ByteTokenizer

    def texts(example):
        ids, labels = example["input_ids"], example["labels"]
        start = next(i for i, label in enumerate(labels) if label != -100)
        assert labels == [-100] * start + ids[start:]
        return tuple(map(ByteTokenizer().decode, (ids[:start], ids[start:])))

    return texts
