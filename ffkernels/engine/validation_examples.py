"""The validation loss of each example: tells a real rise of the mean from noise, without another forward.

    S_i = Σ NLL over the labelled tokens of example i, n_i their number        Σ S_i / Σ n_i = ValidationLoss

Two evaluations at different weights see the same examples, so their S_i come in pairs, and the pairs say how
sure the difference of the means is (``significance``).

The sums are taken by gathering: token losses of a micro-batch, one zero appended, are gathered into a matrix
of (rows, length) whose free places point at the zero, and the matrix is summed along its rows in float64.
Unlike adding into rows by index, that is the same order of additions each time. Shapes are fixed, so are the
addresses of what is read, and a call of ``sums`` reads nothing back to the host: it is written so that it can
be captured as the loss itself is.
"""

from __future__ import annotations

import torch

from ffkernels.engine.validation import ValidationLoss
from ffkernels.engine.validation_fast import LabelledLoss, MicroBatch

__all__ = ["ExampleLosses"]


class ExampleLosses:
    """Calling it returns S, the sum of NLL per example: (rows,) float64 on the validation's device.

    Rows are in the order in which the fast path lays them out. A row that holds no example (after
    ``swap_batch`` with fewer) has S = 0 and n = 0. A call leaves no trace, as one of the validation itself.

    Args:
        validation: on its fast path and in one process; others have no losses by example.

    Attributes:
        tokens: n, (rows,) float64 on the same device.

    Raises:
        ValueError: when the validation has no losses by example; ``why_not`` asks before.
    """

    def __init__(self, validation: ValidationLoss) -> None:
        why = self.why_not(validation)
        if why:
            raise ValueError(f"this validation has no losses by example: {why}")
        self.validation = validation
        self._labelled: LabelledLoss | None = None
        self._read_from: object = None
        self._places: list[torch.Tensor] = []
        self.follow()

    @staticmethod
    def why_not(validation: object) -> str | None:
        """Why there are no losses by example; None where there are."""
        if not isinstance(validation, ValidationLoss):
            return f"a {type(validation).__name__} gives one number"
        if validation.ranks is not None:
            return "its examples are shared among several processes"
        if validation.labelled is None:
            return f"it runs on its {validation.path} path ({validation.reason})"
        return None

    def follow(self) -> None:
        """Read the layout anew where the validation has other examples; in place where they fit."""
        self.validation.follow()
        labelled = self.validation.labelled
        if labelled is None:
            raise RuntimeError(f"the validation left its fast path: {self.validation.reason}")
        if labelled is self._labelled and self.validation.rows is self._read_from:
            return
        places = [_places(batch) for batch in labelled.micro_batches]
        pairs = zip(places, labelled.micro_batches, strict=True)
        tokens = torch.cat([(p < batch.positions.numel()).sum(1) for p, batch in pairs])
        tokens = tokens.to(labelled.device, torch.float64)
        if labelled is self._labelled:
            for mine, new in zip(self._places, places, strict=True):
                mine.copy_(new)
            self.tokens.copy_(tokens)
        else:
            self._places = [place.to(labelled.device) for place in places]
            self.tokens = tokens
        self._labelled, self._read_from = labelled, self.validation.rows

    def __call__(self) -> torch.Tensor:
        self.follow()
        return self.validation.run(self.sums)

    def sums(self) -> torch.Tensor:
        """The forward alone, for callers that hold the model in ``evaluation_mode`` themselves."""
        parts: list[list[torch.Tensor]] = [[] for _ in self._places]
        self._labelled.run(lambda index, losses: parts[index].append(losses))
        rows = []
        for losses, places in zip(parts, self._places, strict=True):
            device = places.device
            padded = torch.cat([*(part.to(device) for part in losses), losses[0].new_zeros(1).to(device)])
            rows.append(padded[places].sum(1, dtype=torch.float64))
        return torch.cat(rows)


def _places(batch: MicroBatch) -> torch.Tensor:
    """(rows, length): where in the micro-batch's token losses each position's is; their number where none."""
    rows, length = batch.input_ids.shape
    scored = batch.positions.numel()
    places = torch.full((rows * length,), scored)
    real = batch.targets.cpu().ge(0).nonzero().flatten()
    places[batch.positions.cpu()[real]] = real
    return places.view(rows, length)
