"""Tables of what is measured by the command line, and of all result files; for the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks import tables
from benchmarks.end_to_end import sft
from ffkernels.training.compare import UNTUNED


def comparison(data: Mapping[str, Any]) -> str:
    """The runs of one `compare`, medians over its seeds."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for run in data["runs"]:
        kind = re.sub(r"-s\d+$", "", run["name"]).replace("adam-untuned", "adam-tuned")
        kinds.setdefault(kind, []).append(run)
    entries = {entry["name"]: entry for entry in data["savings"]}
    config = data["config"]
    labels = {**tables.LABELS, "adam": f"Adam, lr {tables.rate(config['lr'])}"}
    if config.get("tuned_lr"):
        sources = {"option": "given", "table": "tuned", "sweep": "tuned", UNTUNED: "untuned"}
        how = sources.get(config.get("tuned_lr_source", "table"), "tuned elsewhere")
        labels["adam-tuned"] = f"Adam, lr {tables.rate(config['tuned_lr'])} ({how})"
    head = ["run", "optimizer steps", "validation losses", "TFLOP (measured)", "seconds"]
    head += ["FLOPs saved (measured)", "FLOPs saved (paper)", "time saved"]
    rows = []
    order = {kind: place for place, kind in enumerate(tables.ORDER)}
    for kind in sorted(kinds, key=lambda kind: (order.get(kind, len(order)), kind)):
        runs = kinds[kind]
        row = [
            labels.get(kind, kind),
            f"{median(run['optimizer_steps'] for run in runs):.0f}",
            f"{median(run['validation_forwards'] for run in runs):.0f}",
            f"{median(run['flops']['measured'] for run in runs) / 1e12:.3f}",
            f"{median(run['seconds']['total'] for run in runs):.1f}",
        ]
        entry = entries.get(f"{kind}-median") or entries.get(runs[0]["name"])
        costs = ("flops_measured", "flops_paper", "seconds")
        row += ["" if entry is None else tables.percent(entry[cost]) for cost in costs]
        rows.append(row)
    return tables.markdown(head, rows)


# What the files of a kind are, by how their names begin.
FAMILIES = {
    "end_to_end": "the paper's protocol on every task: what is saved on the way to Adam's test loss",
    "compare": "Adam against Fast Forward to the same test loss",
    "sft": "TRL's `SFTTrainer` with and without the callback",
    "step_cpu": "one `step_` with checkpoint, against foreach, a loop and the state-dict way",
    "align_cpu": "one `align_`, against foreach, flattened tensors with `torch.dot`, and a loop",
    "align_in_training": 'what `learning_rate="auto"` costs of a training step',
    "ranks": "validation and stages on 1, 2 and 4 processes, for [distributed.md](../../docs/distributed.md)",
    "search_on_ranks": (
        "a stage on two processes: shared examples or several τ at once "
        "([distributed.md](../../docs/distributed.md))"
    ),
    "machine_code": "what the Triton kernels compile to for sm_80, sm_90 and sm_100, and rejected variants",
    "resampled_validation": "the same validation examples in every stage, or others from a pool",
    "peers": "our Fast Forward beside the authors' loop and PEFT's prototype, on the same work",
    "alignment_rates": "no learning rate given, beside Adam's sweep: methods, schedules, lengths",
    "rate_workloads": "ways to a learning rate where tuned ones lie decades apart, beside Adam's sweep",
    "peft_methods": "PEFT's methods: the rate of PEFT's own comparison, no rate given, the tuned one",
    "search_noise": "each search on the same measured curves of loss over τ, with a bf16 and a fp32 base",
    "gpu_check": "tests and benchmarks on a GPU",
}


def files(results: tables.Results) -> str:
    """Every result file: what it is, on what, and the command that made it."""
    rows = []
    for name, data in sorted(results.items()):
        family = max((f for f in FAMILIES if name.startswith(f)), key=len, default="")
        what = FAMILIES.get(family, data.get("title", "see its `command`"))
        if "analysis" in data:
            what = f"`ffkernels analyze {data['analysis']}`"
        config, provenance = (data.get(key) or {} for key in ("config", "provenance"))
        details = [config.get("model"), config.get("task")]
        details += [f"batch {config['batch_size']}"] if "batch_size" in config else []
        about = ", ".join(tables.MODELS.get(text, str(text)) for text in details if text)
        made = data.get("command") or config.get("command") or provenance.get("command")
        if made is None and data.get("kind") == "sft":
            made = sft.command_of(config)
        rows.append([f"`{name}`", f"{what}; {about}" if about else what, f"`{made}`" if made else "–"])
    return tables.markdown(["file", "what", "made by"], rows, text_columns=3)
