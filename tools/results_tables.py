"""Tables of the documentation, each made from committed result files alone.

A builder takes the result files by name and returns Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from end_to_end_table import rate

Results = Mapping[str, Mapping[str, Any]]

LABELS = {
    "adam": "Adam",
    "linear": "Fast Forward, `linear` (the paper's)",
    "parabolic": "Fast Forward, `parabolic`",
    "auto": "Adam, no learning rate given",
    "adam-tuned": "Adam, tuned lr",
    "authors": "the authors' loop",
    "authors-32": "the same, validation in one batch",
    "peft-prototype": "PEFT's prototype",
    "salsa": "SaLSa, a line search on the training batch",
    "lora-plus": "LoRA+ at Adam's lr",
}
ORDER = tuple(LABELS)
MODELS = {"tiny": "the embedded model", "smollm2-135m": "SmolLM2-135M"}


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %".replace("-", "−")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    rule = f"|{'---|' * text_columns}{'---:|' * (len(head) - text_columns)}"
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def named(model: str) -> str:
    return MODELS.get(model, f"`{model}`")


def where(data: Mapping[str, Any]) -> str:
    """The machine in a few words: what times depend on."""
    machine, versions = data["machine"], data["versions"]
    place = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return f"{place}; {libraries}"


def heading(model: str) -> str:
    """The model as a line begins with it; behind the first letter `SmolLM2` keeps its own."""
    name = named(model).removeprefix("the ")
    return name[:1].upper() + name[1:]


def signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f} %".replace("-", "−")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def comparison(data: Mapping[str, Any]) -> str:
    """The runs of one `compare`, medians over its seeds."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for run in data["runs"]:
        kinds.setdefault(re.sub(r"-s\d+$", "", run["name"]), []).append(run)
    entries = {entry["name"]: entry for entry in data["savings"]}
    config = data["config"]
    labels = {
        "adam": f"Adam, lr {rate(config['lr'])}",
        "adam-tuned": f"Adam, lr {rate(config['tuned_lr'])} (tuned)"
        if config.get("tuned_lr")
        else LABELS["adam-tuned"],
    }
    head = ["run", "optimizer steps", "validation losses", "TFLOP (measured)", "seconds"]
    head += ["FLOPs saved (measured)", "FLOPs saved (paper)", "time saved"]
    rows = []
    for kind in sorted(kinds, key=lambda kind: (ORDER.index(kind) if kind in ORDER else len(ORDER), kind)):
        runs = kinds[kind]
        row = [
            labels.get(kind, LABELS.get(kind, kind)),
            f"{median(run['optimizer_steps'] for run in runs):.0f}",
            f"{median(run['validation_forwards'] for run in runs):.0f}",
            f"{median(run['flops']['measured'] for run in runs) / 1e12:.3f}",
            f"{median(run['seconds']['total'] for run in runs):.1f}",
        ]
        entry = entries.get(f"{kind}-median") or entries.get(runs[0]["name"])
        row += [
            "" if entry is None else percent(entry[c]) for c in ("flops_measured", "flops_paper", "seconds")
        ]
        rows.append(row)
    return table(head, rows)


def sft(results: Results) -> str:
    """SFTTrainer with the callback against without."""
    rows = []
    for _, data in sorted(results.items()):
        if data.get("kind") != "sft":
            continue
        config = data["config"]
        label = {"tiny": "embedded", "smollm2-135m": "SmolLM2-135M"}.get(config["model"], config["model"])
        label += f", batch {config['batch_size']}" if config["batch_size"] != 32 else ""
        for lr in sorted({entry["lr"] for entry in data["savings"]}):
            entries = [entry for entry in data["savings"] if entry["lr"] == lr]
            if all(entry["reached"] for entry in entries):
                shares = sorted(entry["flops_measured"] for entry in entries)
                text = percent(shares[0])
                if len(shares) > 1:
                    text += f" – {percent(shares[-1])} ({counted(len(shares), 'seed')})"
            else:
                text = "not reached"
            rows.append((label, lr, config["steps"], [label, rate(lr), str(config["steps"]), text]))
    rows.sort(key=lambda row: (row[0] != "embedded", row[0], row[1], row[2]))
    head = ["model", "learning rate", "plain steps", "FLOPs saved (measured)"]
    return table(head, [row[-1] for row in rows])


def sft_command(config: Mapping[str, Any]) -> str:
    """The command line with these options, as far as they are not the defaults."""
    from bench_sft import parse

    words = ["python benchmarks/bench_sft.py"]
    for name, default in vars(parse([])).items():
        value = config.get(name, default)
        if value == default or name == "out":
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += [f"{each:g}" if isinstance(each, float) else str(each) for each in as_list(value)]
    return " ".join(words)


def as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def shares_of_time(results: Results, stem: str, head: list[str], others: list[str]) -> str:
    """Our time divided by that of each other way, warm and cold, from the newest result of this stem."""
    data = results[max(name for name in results if name.startswith(stem))]  # the names end with the date
    rows = [
        [name]
        + [
            f"{result['modes'][mode][other]['ours_over_this']:.2f}"
            for mode in ("warm", "cold")
            for other in others
        ]
        for name, result in data["adapters"].items()
    ]
    return table(head, rows)


def step(results: Results) -> str:
    """One step with checkpoint."""
    head = ["adapter set", "warm: `_foreach_copy_` + `_foreach_add_`", "per-tensor loop"]
    head += ["state-dict with a thread pool", "cold: `_foreach` pair", "loop", "state-dict"]
    return shares_of_time(results, "step_cpu", head, ["foreach", "loop", "state_dict"])


def align(results: Results) -> str:
    """The sums of an alignment with the checkpoint that it makes."""
    head = ["adapter set", "warm: `_foreach_*`", "flattened, `torch.dot`", "per-tensor loop"]
    head += ["cold: `_foreach_*`", "flattened", "loop"]
    return shares_of_time(results, "align_cpu", head, ["foreach", "flat", "loop"])


def peers(results: Results) -> str:
    """Each way to fast-forward on the same work, and what it holds on to; the newest measurement."""
    name = max((name for name, data in results.items() if data.get("kind") == "peers"), default=None)
    if name is None:
        return "*Not measured yet: `python benchmarks/bench_peers.py`.*"
    data = results[name]
    config, memory = data["config"], {one["name"]: one for one in data["memory"]}
    several = len(config["lr"]) > 1
    head = ["way", "optimizer steps", "validation losses", "in a stage", "seconds of a stage"]
    head += ["FLOPs saved (measured)", "time saved", "memory grows per stage, in adapters"]
    rows = []
    for lr in config["lr"]:
        of = {one["name"]: one for one in data["summary"] if one["lr"] == lr}
        for kind in (kind for kind in ORDER if kind in of):
            one, stages = of[kind], of[kind]["forwards_per_stage"] is not None
            saved = one["saved_flops_measured"] if kind != "adam" else None
            time = 1 - one["seconds"] / of["adam"]["seconds"] if saved is not None else None
            row = [LABELS[kind] + (f", lr {rate(lr)}" if several else ""), f"{one['optimizer_steps']:.0f}"]
            row += [f"{one['validation_forwards']:.0f}" if stages else ""]
            row += [f"{one['forwards_per_stage']:.0f}" if stages else ""]
            row += [f"{one['seconds_per_stage']:.2f}" if stages else ""]
            row += ["" if share is None else percent(share) for share in (saved, time)]
            row += [f"{memory[kind]['adapters_per_stage']:.0f}" if stages and kind in memory else ""]
            rows.append(row)
    words = (
        f"{heading(config['model'])}, {config['task']}, learning rate "
        f"{', '.join(map(rate, config['lr']))}, batch {config['batch_size']}, "
        f"{counted(len(config['seeds']), 'seed')}; memory at rank {config['memory_rank']}. {where(data)} "
        f"(`{data['command']}`; `{name}`):"
    )
    return f"{words}\n\n{table(head, rows)}"


def search_noise(results: Results) -> str:
    """How often each search finds the lowest loss of a full sweep, and in how many evaluations."""
    name = max((name for name, data in results.items() if data.get("kind") == "search_noise"), default=None)
    if name is None:
        return "*Not measured yet: `python benchmarks/search_noise.py`.*"
    data = results[name]
    labels = {"linear": "`linear`", "every rise counts": "every rise counts", "parabolic": "`parabolic`"}
    head = ["frozen base", "learning rate", "stages"]
    head += [f"{label}: {what}" for label in labels.values() for what in ("found", "validations")]
    head += [f"second stages: {what}" for what in ("found", "validations")]
    rows = []
    for group in data["groups"]:
        if group["lr"] is None:
            continue
        row = [group["dtype"], rate(group["lr"]), str(group["searches"]["linear"]["stages"])]
        for search in labels:
            one = group["searches"][search]
            row += [percent(one["reached"] / one["stages"]), f"{one['mean_evaluations']:.1f}"]
        later = next(each["warm"] for each in data["warm_start"][group["dtype"]] if each["lr"] == group["lr"])
        row += [percent(later["reached"] / later["stages"]), f"{later['mean_evaluations']:.1f}"]
        rows.append(row)
    config = data["config"]
    words = (
        f"{heading(config['model'])}, {', '.join(config['tasks'])}, {counted(len(config['seeds']), 'seed')}, "
        f"the first {config['stages']} stages, batch {config['batch_size']}, {config['validation_examples']} "
        f"validation examples. {where(data)} (`{data['command']}`; `{name}`):"
    )
    return f"{words}\n\n{table(head, rows)}"


# What the files of a kind are, by how their names begin, and how one is made where it does not say itself.
FAMILIES: dict[str, tuple[str, str]] = {
    "end_to_end": ("the paper's protocol on every task: what is saved on the way to Adam's test loss", ""),
    "compare": ("Adam against Fast Forward to the same test loss", "ffkernels compare"),
    "sft": ("TRL's `SFTTrainer` with and without the callback", ""),
    "step_cpu": ("one `step_` with checkpoint, against foreach, a loop and the state-dict way", ""),
    "align_cpu": ("one `align_`, against foreach, flattened tensors with `torch.dot`, and a loop", ""),
    "align_in_training": ('what `learning_rate="auto"` costs of a training step', ""),
    "ranks": (
        "validation and stages on 1, 2 and 4 processes, for [distributed.md](../../docs/distributed.md)",
        "",
    ),
    "search_on_ranks": (
        "a stage on two processes: shared examples or several τ at once "
        "([distributed.md](../../docs/distributed.md))",
        "",
    ),
    "machine_code": (
        "what the Triton kernels compile to for sm_80, sm_90 and sm_100, and rejected variants",
        "",
    ),
    "resampled_validation": ("the same validation examples in every stage, or others from a pool", ""),
    "peers": ("our Fast Forward beside the authors' loop and PEFT's prototype, on the same work", ""),
    "alignment_rates": ("no learning rate given, beside Adam's sweep: methods, schedules, lengths", ""),
    "search_noise": (
        "each search on the same measured curves of loss over τ, with a bf16 and a fp32 base",
        "",
    ),
    "gpu_check": ("tests and benchmarks on a GPU", "make gpu-check"),
}


def files(results: Results) -> str:
    """Every result file: what it is, on what, and the command that made it."""
    rows = []
    for name, data in sorted(results.items()):
        family = max((f for f in FAMILIES if name.startswith(f)), key=len, default="")
        what, how = FAMILIES.get(family, (data.get("title", "see its `command`"), ""))
        if "analysis" in data:
            what = f"`ffkernels analyze {data['analysis']}`"
        config, provenance = (data.get(key) or {} for key in ("config", "provenance"))
        details = [config.get("model"), config.get("task")]
        details += [f"batch {config['batch_size']}"] if "batch_size" in config else []
        about = ", ".join(named(text) if text in MODELS else str(text) for text in details if text)
        made = data.get("command") or config.get("command") or provenance.get("command") or how
        if data.get("kind") == "sft":
            made = sft_command(config)
        rows.append([f"`{name}`", f"{what}; {about}" if about else what, f"`{made}`" if made else "–"])
    return table(["file", "what", "made by"], rows, text_columns=3)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "files": files,
    "peers": peers,
    "search-noise": search_noise,
    "sft": sft,
    "step": step,
    "align": align,
}
