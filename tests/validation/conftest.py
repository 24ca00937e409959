"""The two ways to a model's loss, each held against the model's own."""

import pytest

from ffkernels.validation.loss import ValidationLoss


@pytest.fixture
def fast(own_loss):
    """`fast(model, batches, rel)`: a ValidationLoss on the fast way, which has the model's loss."""

    def make(model, batches, rel=2e-6):
        validation = ValidationLoss(model, batches)
        assert validation.path == "fast", validation.reason
        assert float(validation()) == pytest.approx(own_loss(model, batches), rel=rel)
        return validation

    return make


@pytest.fixture
def generic(own_loss):
    """`generic(model, batches, told)`: one that says so and runs the model itself."""

    def make(model, batches, told, shifted=True):
        with pytest.warns(UserWarning, match=told):
            validation = ValidationLoss(model, batches)
        assert validation.path == "generic"
        assert float(validation()) == pytest.approx(own_loss(model, batches, shifted), rel=1e-6)
        return validation

    return make
