"""Medical passages without a download: ICD-10-CM's diagnoses and their notes, from PyPI `simple-icd-10-cm`.

A passage is a category or subcategory with what its entry says in the tabular list: what it includes, what
is coded elsewhere, which further code to use, which kinds it has. Codes without a note of their own are left
out, and so are those that a seventh character makes of another ("…, initial encounter"): tens of thousands
of near repetitions. The package parses 10 MB of XML when it is imported; that happens at the first use only.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable
from typing import Any

from ffkernels.training.packages import require_for_task
from ffkernels.training.paused_collector import paused_collector


@functools.lru_cache(maxsize=1)
def passages() -> tuple[str, ...]:
    """One text per diagnosis that has notes, titles all different, in the order of the codes."""
    texts: dict[str, str] = {}
    with paused_collector(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how the package reads its files
        icd = require_for_task("medical", "simple_icd_10_cm")
        for code in icd.get_all_codes():
            if icd.is_category_or_subcategory(code) and not icd.is_extended_subcategory(code):
                title, lines = _plain(icd.get_description(code)), _notes(icd, code)
                if lines:
                    texts.setdefault(title.lower(), "\n".join([f"{title} ({code})", *lines]))
    return tuple(texts.values())


def _notes(icd: Any, code: str) -> list[str]:
    notes = {
        "Includes": _listed([*icd.get_includes(code), *icd.get_inclusion_term(code)]),
        "Coded elsewhere": _listed(icd.get_excludes1(code)),
        "Not part of it": _listed(icd.get_excludes2(code)),
        "Code first": _listed(icd.get_code_first(code).split("\n")),
        "Use additional code": _listed(icd.get_use_additional_code(code).split("\n")),
        "Code also": _listed(icd.get_code_also(code).split("\n")),
        "Note": _listed(icd.get_notes(code).split("\n")),
    }
    if any(notes.values()):
        below = [child for child in icd.get_children(code) if not icd.is_extended_subcategory(child)]
        notes["Kinds"] = _listed(map(icd.get_description, below))
    return [f"{label}: {text}." for label, text in notes.items() if text]


def _listed(items: Iterable[str]) -> str:
    """``"a; b; c"``; what follows a heading such as "code to identify:" follows it without a semicolon."""
    joined = "; ".join(filter(None, map(_plain, items))).replace(":; ", ": ")
    return joined.removeprefix("code ").lstrip(", ").rstrip(".:")


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
