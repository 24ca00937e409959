"""What was left out of one's data, and what of the settings does not go with them, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ffkernels.training.jsonl import EMPTY, SEVERAL

__all__ = ["BEYOND", "HELD_OUT", "REPEATED", "SAME_START", "of_run", "on_data"]

REPEATED, SAME_START, HELD_OUT, BEYOND = "repeated", "same start", "held out", "beyond"


def on_data(name: str, counts: Counter[str], max_length: int, unit: str = "line") -> list[str]:
    """What was not taken of the file or task ``name``, and what was read in one of several ways."""
    reasons = {
        EMPTY: "with nothing to learn from, empty or white space",
        REPEATED: "repeated word for word",
        SAME_START: f"equal to another in all of their first {max_length} tokens",
        HELD_OUT: "equal to one of the file that is tested on",
        BEYOND: "beyond the test examples that were asked for",
    }
    left_out = [f"{_number(counts[key], unit)} {reason}" for key, reason in reasons.items() if counts[key]]
    remarks = [f"Left out of {name}: {'; '.join(left_out)}."] if left_out else []
    if counts[SEVERAL]:
        verb = "has" if counts[SEVERAL] == 1 else "have"
        remarks.append(
            f"{_number(counts[SEVERAL], unit)} of {name} {verb} several forms; read is the first of "
            "messages, conversations, prompt, instruction, text."
        )
    return remarks


def of_run(examples: int, lengths: Sequence[int], batch_size: int, positions: int | None) -> list[str]:
    """Where a batch is larger than the data, and where examples are longer than the model's positions.

    Args:
        examples: to train on.
        lengths: tokens of each example that was looked at, of all splits.
        positions: those that the model was made for; None where it does not say.
    """
    remarks = []
    if batch_size > examples:
        remarks.append(
            f"A batch of {batch_size} is larger than the {examples} training examples, which it repeats; "
            "lower batch_size (--batch-size)."
        )
    beyond = [length for length in lengths if positions is not None and length > positions]
    if beyond:
        remarks.append(
            f"Of {_number(len(lengths), 'example')} {len(beyond):,}, of up to {max(beyond)} tokens, are "
            f"longer than the {positions} positions that the model was made for; lower max_length "
            "(--max-length)."
        )
    return remarks


def _number(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'s' * (count != 1)}"
