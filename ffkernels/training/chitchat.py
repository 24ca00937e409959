"""Conversations without a download: the Chit-Chat Challenge's, from PyPI `chitchat-dataset`.

Students of one university talk in pairs about a question they were given. Who writes first is the user, the
other the assistant; what one says in several lines before the other answers is one turn. Conversations that
nobody answered are left out, and so is the question itself: people rarely kept to it.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import re

from ffkernels.training.packages import require_for_task

ROLES = ("user", "assistant")


@functools.lru_cache(maxsize=1)
def conversations() -> tuple[tuple[tuple[str, str], ...], ...]:
    """Each conversation's turns as (role, content), beginning with the user, roles alternating."""
    package = require_for_task("chat", "chitchat_dataset")
    # Read here rather than by the package, which opens the file in the locale's encoding.
    records = json.loads(importlib.resources.files(package).joinpath("dataset.json").read_text("utf-8"))
    talks = (_turns(record["messages"]) for record in records.values())
    return tuple(talk for talk in talks if len(talk) >= 2)


def _turns(messages: list[list[dict[str, str]]]) -> tuple[tuple[str, str], ...]:
    lines = ((line["sender"], re.sub(r"\s+", " ", line["text"]).strip()) for m in messages for line in m)
    turns = itertools.groupby((line for line in lines if line[1]), key=lambda line: line[0])
    contents = [" ".join(text for _, text in said) for _, said in turns]
    return tuple(zip(itertools.cycle(ROLES), contents))
