"""Examples that one process tokenizes once.

The runs of a comparison train on the same task, each with a tokenizer object of its own. What is compared
is therefore what a tokenizer does, not which object it is; of one that does not say so nothing is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from ffkernels.training.examples import Example
from ffkernels.training.tokenizer import ByteTokenizer

# One for each task, so that a measurement which goes through all of them finds each again.
MOST = 3

_kept: dict[Hashable, tuple[Example, ...]] = {}


def kept(key: tuple[Hashable, ...], tokenizer: Any, make: Callable[[], Iterable[Example]]) -> list[Example]:
    """What ``make()`` gives, made once per ``key`` and tokenizer; copies, which a caller may change."""
    known = fingerprint(tokenizer)
    if known is None:
        return list(make())
    examples = _kept.pop((*key, known), None)
    if examples is None:
        while len(_kept) >= MOST:
            del _kept[next(iter(_kept))]  # the one whose last use is longest ago
        examples = tuple(make())
    _kept[(*key, known)] = examples
    return [Example([*one["input_ids"]], [*one["labels"]], one.cut) for one in examples]


def fingerprint(tokenizer: Any) -> Hashable | None:
    """The same for tokenizers that make the same tokens of everything; None where that cannot be told."""
    if type(tokenizer) is ByteTokenizer:
        return ByteTokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        return None
    told = (backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map)
    return type(tokenizer), hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).digest()
