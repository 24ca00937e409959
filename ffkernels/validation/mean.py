"""What the loss that a model returns for a batch is the mean of, asked of the model.

    targets    each label that counts, −100 left out; causal language models leave a row's first out as well
    rows       each row, whatever number of labels it has (CTC with reduction "mean")
    sum        it is no mean (CTC with reduction "sum"): divided by the number of rows here

Names do not say it. One row of the data does, run with other labels:

    the first label counts     ⇔   it alone gives another loss than none at all
    mean over targets          ⇔   L(a, b) = (t_a L(a) + t_b L(b)) / (t_a + t_b)        t: labels that count
    mean over rows             ⇔   L(a, b) = (L(a) + L(b)) / 2
    sum                        ⇔   L(a, b) = L(a) + L(b)

where a is the row and b the same one with the second half of its labels hidden, that is −100. Where means
cannot be told apart it is over targets: a model that takes −100 for a label like others has as many in b, and
rows may be one tensor (the patches of all images).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ffkernels.validation.batches import IGNORE, chosen_rows, count_rows

# Nearer than this, in parts of the loss, two kinds of mean cannot be told apart, and need not.
_ROUNDING = 1e-5

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Mean:
    """Over what it runs, whether a row's first label is left out, and which label is in any case."""

    over: str = "targets"  # or "rows" or "sum"
    shifted: bool = False
    ignored: int = IGNORE

    def weigh(self, batch: Batch) -> tuple[int, int]:
        """What a batch's loss is multiplied by, and how many things are then added up in it."""
        count = count_rows(batch) if self.over != "targets" else self.targets(batch)
        return (1, count) if self.over == "sum" else (count, count)

    def targets(self, batch: Batch) -> int:
        """How many labels count: of those that are no integers, one in a row."""
        return int(self.counted(batch["labels"]).sum()) if _has_integers(batch) else count_rows(batch)

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """Which labels count, bool of their shape."""
        counted = labels.ne(self.ignored)
        if self.shifted and labels.ndim == 2:
            counted[:, 0] = False
        return counted


def ask_mean(
    loss_of: Callable[[Batch], torch.Tensor],
    batches: Sequence[Batch],
    *,
    shifted: bool = False,
    ignored: int = IGNORE,
) -> Mean:
    """Find out what ``loss_of(batch)`` is the mean of, in a few forwards of a row or two.

    Args:
        loss_of: the model's own loss of a batch; the caller holds the model in evaluation mode.
        batches: as they are validated on. Only labels that are integers in two dimensions or more leave a
            question.
        shifted: what to take the model for where it does not say.
        ignored: the label that does not count.
    """
    batches = [batch for batch in batches if _has_integers(batch) and batch["labels"].ndim > 1]
    mean = Mean(shifted=shifted and bool(batches), ignored=ignored)
    for batch in batches:
        labels = batch["labels"]
        first = labels[:, 0].ne(ignored).nonzero() if labels.ndim == 2 and labels.shape[1] else ()
        if len(first):
            batch = chosen_rows(batch, [int(first[0])]) or batch
            mean = Mean("targets", _first_is_left_out(loss_of, batch, mean), ignored)
            break
    for batch in batches:
        for row, counted in enumerate(mean.counted(batch["labels"]).flatten(1).sum(1).tolist()):
            one = chosen_rows(batch, [row]) if counted > 1 else None
            if one is not None:
                over = _over(loss_of, one, mean)
                known = any(bool(batch["labels"].eq(ignored).any()) for batch in batches)
                if over == "rows" and not (known or _leaves_out(loss_of, one, mean)):
                    over = "targets"
                return Mean(over, mean.shifted, ignored)
    return mean


def _first_is_left_out(loss_of: Callable[[Batch], torch.Tensor], batch: Batch, mean: Mean) -> bool:
    none = torch.full_like(batch["labels"], mean.ignored)
    first = none.clone()
    first[:, 0] = batch["labels"][:, 0]
    without, alone = (_tried(loss_of, {**batch, "labels": labels}) for labels in (none, first))
    if alone is None:
        return mean.shifted
    return without is not None and (alone == without or (math.isnan(alone) and math.isnan(without)))


def _over(loss_of: Callable[[Batch], torch.Tensor], row: Batch, mean: Mean) -> str:
    labels = row["labels"]
    places = mean.counted(labels).flatten().nonzero().flatten()
    fewer = labels.flatten().clone()
    fewer[places[(len(places) + 1) // 2 :]] = mean.ignored
    fewer = fewer.view_as(labels)
    twice = chosen_rows(row, [0, 0])
    cases = [row, {**row, "labels": fewer}, {**twice, "labels": torch.cat([labels, fewer])}]
    losses = [_tried(loss_of, case) for case in cases]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        return mean.over
    a, b, both = losses
    of_a, of_b = (mean.targets(case) for case in cases[:2])
    expected = {"targets": (of_a * a + of_b * b) / (of_a + of_b), "rows": (a + b) / 2, "sum": a + b}
    off = {over: abs(loss - both) for over, loss in expected.items()}
    nearest = min(off, key=off.__getitem__)
    return "targets" if off["targets"] <= off[nearest] + _ROUNDING * abs(both) else nearest


def _leaves_out(loss_of: Callable[[Batch], torch.Tensor], row: Batch, mean: Mean) -> bool:
    """Whether ignored labels are left out: without others nothing is left, or more of them change nothing."""
    hidden = torch.full_like(row["labels"], mean.ignored)
    nothing = _tried(loss_of, {**row, "labels": hidden})
    if nothing is not None and (nothing == 0 or math.isnan(nothing)):
        return True
    longer = torch.cat([row["labels"], hidden[:, :1]], dim=1)
    return _tried(loss_of, {**row, "labels": longer}) == _tried(loss_of, row)


def _has_integers(batch: Batch) -> bool:
    labels = batch.get("labels")
    return isinstance(labels, torch.Tensor) and labels.ndim > 0 and not labels.is_floating_point()


def _tried(loss_of: Callable[[Batch], torch.Tensor], batch: Batch) -> float | None:
    try:
        return float(loss_of(batch))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that knows of no label to leave out
        return None
