"""What was left out of one's data, and what of the settings does not go with them, in sentences."""

from __future__ import annotations

from collections import Counter

from ffkernels.training.jsonl import EMPTY, SEVERAL

__all__ = ["BEYOND", "HELD_OUT", "REPEATED", "SAME_START", "of_run", "on_file"]

REPEATED, SAME_START, HELD_OUT, BEYOND = "repeated", "same start", "held out", "beyond"


def on_file(name: str, counts: Counter[str], max_length: int) -> list[str]:
    """What was not read of the file ``name``, and what was read in one of several ways."""
    reasons = {
        EMPTY: "with nothing to learn from, empty or white space",
        REPEATED: "repeated word for word",
        SAME_START: f"equal to another in all of their first {max_length} tokens",
        HELD_OUT: "of which a test example is equal",
        BEYOND: "beyond the test examples that were asked for",
    }
    left_out = [f"{_lines(counts[key])} {reason}" for key, reason in reasons.items() if counts[key]]
    remarks = [f"Left out of {name}: {'; '.join(left_out)}."] if left_out else []
    if counts[SEVERAL]:
        verb = "has" if counts[SEVERAL] == 1 else "have"
        remarks.append(
            f"{_lines(counts[SEVERAL])} of {name} {verb} several forms; read is the first of messages, "
            "conversations, prompt, instruction, text."
        )
    return remarks


def of_run(examples: int, longest: int, batch_size: int, positions: int | None) -> list[str]:
    """Where a batch is larger than the data, and where examples are longer than the model's positions.

    Args:
        examples: to train on.
        longest: tokens of the longest example that was looked at.
        positions: those that the model was made for; None where it does not say.
    """
    remarks = []
    if batch_size > examples:
        remarks.append(
            f"A batch of {batch_size} is larger than the {examples} training examples, which it repeats; "
            "lower batch_size (--batch-size)."
        )
    if positions is not None and longest > positions:
        remarks.append(
            f"Examples of up to {longest} tokens are longer than the {positions} positions that the model "
            "was made for; lower max_length (--max-length)."
        )
    return remarks


def _lines(count: int) -> str:
    return f"{count:,} {'line' if count == 1 else 'lines'}"
