"""What `benchmarks/learning_rate` has measured, for the documentation: the newest result of each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learning_rate import table
from results_tables import Results, heading, where

KIND = "alignment_rates"
NOTHING = "*Not measured yet: `python -m benchmarks.learning_rate`.*"


def newest(results: Results) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """By model, the embedded one first."""
    found = {
        data["config"]["model"]: (name, data)
        for name, data in sorted(results.items())
        if data.get("kind") == KIND and not data["fast"]
    }
    return dict(sorted(found.items(), key=lambda one: one[0] != "tiny"))


def learning_rates(results: Results) -> str:
    """ "auto" beside its bounds and beside the other contenders, what misses first."""
    found = newest(results).values()
    return "\n\n".join(f"{said(*one)}\n\n{table.summary(one[1])}" for one in found) or NOTHING


def learning_rates_by_workload(results: Results) -> str:
    """A row per workload."""
    found = newest(results).items()
    return (
        "\n\n".join(
            f"{heading(model)} (`{name}`):\n\n{table.workloads(data)}" for model, (name, data) in found
        )
        or NOTHING
    )


def said(name: str, data: Mapping[str, Any]) -> str:
    """The conditions of the measurement."""
    config, versions = data["config"], data["versions"]
    return (
        f"{heading(config['model'])}; rank {config['rank']} on attention but where said, "
        f"{config['max_length']} tokens per example, {config['optimizer']}, warm-up steps "
        f"{config['warmup_steps']}. {where(data)}; commit {versions['git_commit']} "
        f"(`{data['command']}`; `{name}`)."
    )
