"""The benchmark of learning rates: what a sweep does next, what a run may spend, what trains, its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from benchmarks import record

INF = math.inf


@pytest.fixture()
def bench(benchmarks):
    """The benchmark's modules by name."""
    names = ("workloads", "plan", "bench", "contenders", "record", "table", "__main__")
    return SimpleNamespace(**{name.strip("_"): benchmarks(f"learning_rate.{name}") for name in names})


def run_out(item, plan, losses, done):
    """The rates of an item's runs in their order; ``losses(lr)`` is what each ends at."""
    rates = []
    while (run := item.next(done)) is not None:
        loss = losses(run.lr)
        done[run.key] = {"lr": run.lr, "loss": None if loss == INF else loss}
        rates.append(run.lr)
    return rates


@pytest.mark.parametrize(
    "best, breaks, expected",
    [
        (1e-2, INF, [1e-2, 5e-3, 2e-2]),
        (8e-2, INF, [1e-2, 5e-3, 2e-2, 4e-2, 8e-2, 16e-2]),
        (1.25e-3, INF, [1e-2, 5e-3, 2e-2, 2.5e-3, 1.25e-3, 0.625e-3]),
        (8e-2, 2e-2, [1e-2, 5e-3, 2e-2]),  # above 1e-2 nothing is finite
        (1e-3, 1e-2, [1e-2, 5e-3, 2e-2, 2.5e-3, 1.25e-3, 0.625e-3]),
    ],
)
def test_a_sweep_ends_where_its_best_rate_has_a_worse_one_on_both_sides(bench, best, breaks, expected):
    def loss(lr):
        return INF if lr >= breaks else 1 + abs(math.log2(lr / best))

    item = bench.plan.sweep(bench.workloads.Workload("chat", 4), 0, 1e-2)
    assert run_out(item, bench.plan, loss, {}) == pytest.approx(expected)


@pytest.mark.parametrize("neighbours, expected", [(True, [2e-2, 1e-2, 4e-2]), (False, [2e-2])])
def test_other_seeds_run_what_was_best_on_the_first(bench, neighbours, expected):
    done, workload = {}, bench.workloads.Workload("chat", 4)
    adam = bench.plan.Item(workload, 1, "adam", (), bench.plan.as_before(neighbours))
    assert adam.next(done) is None  # not known yet
    other = bench.workloads.Workload("chat", 4, 1200)
    run_out(bench.plan.sweep(other, 0, 1e-4), bench.plan, lambda lr: lr, done)
    run_out(bench.plan.sweep(workload, 0, 1e-2), bench.plan, lambda lr: abs(lr - 2.1e-2), done)
    assert run_out(adam, bench.plan, lambda lr: lr, done) == expected


def test_the_plan_has_each_run_once_and_no_seed_of_calibration(bench):
    items = list(bench.plan.alignment())
    of = [(item.workload.name, item.seed, item.contender) for item in items if item.contender != "adam"]
    assert len(set(of)) == len(of)
    assert {item.seed for item in items} == {0, 1, 2}
    groups = {item.workload.group for item in items if item.contender == "auto"}
    assert groups >= bench.table.BOUNDS.keys()


class Steps:
    """A bench whose steps cost 10 FLOPs each, and a validation 4."""

    validation = SimpleNamespace(flops=4)

    def flops(self, step):
        return 10


def test_what_is_charged_shortens_the_run_and_its_decay(bench):
    work = bench.contenders.Work(Steps(), 20, "linear", 1e-3, warmup=4)
    assert work.budget == 200 and work.total == 20
    # Warm-up and decay multiply.
    assert [work.shape(s) for s in (0, 2, 3, 10, 20)] == pytest.approx([0.25, 0.75 * 0.9, 0.85, 0.5, 0.0])
    work.charge(forwards=11)  # 44 FLOPs are more than four steps
    assert (work.total, work.charged) == (15, 44)
    assert work.shape(15) == 0.0 and work.shape(6) == pytest.approx(0.6)
    work.charge(flops=30)
    assert (work.total, work.charged) == (12, 74)
    work.charge(batches=20)
    assert work.total == 0
    assert bench.contenders.Work(Steps(), 20, warmup=0).shape(0) == 1.0


def test_a_run_that_was_killed_goes_on_and_loses_its_last_line_at_most(bench, tmp_path, monkeypatch):
    measured = []

    def measure(run, benches, device):
        measured.append(run.key)
        return {"key": run.key, "lr": run.lr, "loss": 1.0, "rate": run.lr, "seconds": 0.0}

    monkeypatch.setattr(bench.main, "measure", measure)
    path = tmp_path / "folder" / "runs.jsonl"
    command = ["--plan", "fast", "--runs", str(path)]
    assert bench.main.main(command) == 0
    first, measured[:] = list(measured), []
    assert len(first) == len(set(first)) == 4
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.rindex('"loss"')], encoding="utf-8")
    assert bench.main.main(command) == 0
    assert measured == first[-1:]
    assert list(record.lines_of(path, "key")) == first
    assert bench.main.main(command) == 0 and measured == first[-1:]


# What of a model's names belongs to each method's weights, and how many tensors of 4 layers there are.
TRAINED = {
    "lora": ("lora_", 16),
    "lora-1": ("lora_", 16),
    "lora-256": ("lora_", 16),
    "lora-all": ("lora_", 32),
    "dora": ("lora_", 24),
    "lora-r64": ("lora_", 16),
    "rslora": ("lora_", 16),
    "oft": ("oft_R", 8),
    "loha": ("hada_", 32),
    "lokr": ("lokr_w", 20),
    "vera": ("vera_lambda_", 16),
    "ia3": ("ia3_l", 8),
    "layernorm": ("ln_tuning_layers", 18),
    "prompt": ("prompt_encoder", 1),
    "tokens": ("trainable_tokens_delta", 1),
    "all": ("", 52),
}


def test_every_method_trains_what_it_should(bench):
    pytest.importorskip("peft")
    assert TRAINED.keys() == bench.workloads.METHODS.keys()
    for name, (part, tensors) in TRAINED.items():
        workload = bench.workloads.Workload("instruction", 4, 4, method=name)
        one = bench.bench.Bench(workload, 0, test_examples=4)
        assert len(one.names) == tensors and all(part in each for each in one.names), name
        before = [p.detach().clone() for p in one.trainable]
        work = bench.contenders.Work(one, 4, lr=bench.workloads.METHODS[name].rate, warmup=2)
        line = bench.main.train(bench.contenders.CONTENDERS["adam"], work)
        assert not any(map(torch.equal, before, one.trainable)), name
        assert line["loss"] < line["start"] and line["worst"] < 1.5, name
        one.reset()
        assert all(map(torch.equal, before, one.trainable)), name


def test_what_a_forward_and_a_gradient_cost(bench):
    pytest.importorskip("peft")
    from ffkernels.reporting.flops import ADAM_FLOPS, count_flops

    one = bench.bench.Bench(bench.workloads.Workload("instruction", 4, 4), 0, test_examples=4)
    batch = one.batch(2)
    with torch.no_grad():
        assert one.forward_flops(2) == count_flops(lambda: one.model(**batch)) > 0
    assert one.gradient_flops(2) == count_flops(lambda: one.model(**batch).loss.backward())
    assert one.flops(2) - one.gradient_flops(2) == ADAM_FLOPS * sum(p.numel() for p in one.trainable)


def test_auto_is_given_no_rate_and_logs_its_rise(bench):
    pytest.importorskip("peft")
    one = bench.bench.Bench(bench.workloads.Workload("instruction", 4, 12), 0, test_examples=4)
    lines = [
        bench.main.train(bench.contenders.CONTENDERS["auto"], bench.contenders.Work(one, 12, "linear", lr=lr))
        for lr in (None, 1e-6, 1e-1)
    ]
    for line in lines:
        line.pop("seconds")
        line["curve"] = [(part, loss) for part, _, loss in line["curve"]]
    assert lines[0] == lines[1] == lines[2]
    line = lines[0]
    assert line["own"] == 0 and line["taken"] == 12 and line["loss"] < line["start"]
    rises = [after / before for before, after in zip(line["rates"], line["rates"][1:], strict=False)]
    assert rises[:5] == pytest.approx([4.0] * 5, rel=1e-3)
    assert line["undos"] == sum(rise < 0.99 for rise in rises[: line["rise"]])
    assert line["rise"] >= 5 and line["cosines"][0] is None
    assert line["peak"] == pytest.approx(max(line["rates"]), rel=1e-3)


def test_a_permuted_text_is_the_same_text_and_far_from_the_model(bench):
    from ffkernels.training.examples import Example

    example = Example([*range(256), 256, 257], [-100, *range(1, 256), 256, -100])
    other = bench.bench.permuted(example)
    assert sorted(other["input_ids"]) == [*range(258)] and other["input_ids"][256:] == [256, 257]
    assert other["labels"][1:257] == other["input_ids"][1:257] and other["labels"][::257] == [-100, -100]
    assert sum(a == b for a, b in zip(other["input_ids"], example["input_ids"], strict=True)) < 8


def a_line(bench, contender, lr, loss, seed=0, task="chat", steps=120, **fields):
    workload = bench.workloads.Workload(task, 4, steps)
    auto = {"rise": 8, "peak": 2e-2, "undos": 1, "rate": 1e-2} if contender == "auto" else {"rate": lr}
    return {
        **{"workload": workload.name, "group": workload.group, **vars(workload), "seed": seed},
        **{"contender": contender, "lr": lr, "loss": loss, "start": 3.0, "own": 0.0, "worst": 1.0},
        **{"worst_at": 3, "seconds": 2.0, "commit": "abc", **auto, **fields},
    }


def a_result(bench):
    lines = [a_line(bench, "adam", lr, loss) for lr, loss in ((5e-3, 2.1), (1e-2, 2.0), (2e-2, None))]
    lines += [a_line(bench, "adam", 1e-4, 2.8), a_line(bench, "adam", 1e-2, 2.5, task="medical")]
    lines += [a_line(bench, "adam", 1e-4, 2.6, task="medical"), a_line(bench, "adam", 2e-4, 2.5)]
    lines += [a_line(bench, "auto", None, 2.02), a_line(bench, "auto", None, 2.6, task="medical")]
    lines += [a_line(bench, "auto", None, 1.0, task="instruction")]  # Adam was not run there
    return bench.record.document(lines, "alignment")


def test_loss_above_tuned_and_what_is_not_recovered(bench):
    results = bench.table.Results(a_result(bench))
    one, other = results.of("auto")
    assert results.above(one) == pytest.approx(0.01) and results.share(one) == pytest.approx(0.02)
    assert results.above(other) == pytest.approx(0.04) and results.share(other) == pytest.approx(0.2)
    broken = next(line for line in results.of("adam") if line["loss"] is None)
    assert results.above(broken) == results.share(broken) == INF
    assert results.inside(one["workload"]) and not results.inside(other["workload"])


def test_what_the_documentation_says_of_it(bench, tool, tmp_path):
    rates, doc = bench.table, tool("results_doc")
    nothing = "*Not measured yet: `python -m benchmarks.learning_rate`.*"
    assert rates.learning_rates({}) == rates.learning_rates_by_workload({}) == nothing
    data = a_result(bench)
    path = tmp_path / "benchmarks" / "results" / "alignment_rates_tiny_2026-01-01.json"
    record.write(data, path)
    assert json.loads(path.read_text(encoding="utf-8")) == data
    build = doc.builders(doc.read_results(tmp_path))
    text = build["learning-rates"]()
    verdict = (
        "| constant, 120 steps | 2 | +2.5 % | +4.0 % | +11.0 % | +20.0 % | 0 | +1.5 %, +4.0 % | median |"
    )
    assert verdict in text
    assert "| Adam at 1e-4 | +22.0 % (+40.0 %) |" in text
    assert "| Adam at 2e-4 |" not in text, "it was run on one of two workloads"
    row = "LoRA, α = 16, medical, batch 4, 120 steps, constant | 1e-2 (at the grid's end) | 3.000"
    assert row in build["learning-rates-by-workload"]() and row not in text


def test_what_the_page_opens_with_is_what_was_measured(bench):
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "learning-rate.md").read_text(encoding="utf-8")
    said = " ".join(page.partition("## ")[0].split())
    newest = max((root / "benchmarks" / "results").glob("alignment_rates_tiny_*.json"))
    results = bench.table.Results(json.loads(newest.read_text(encoding="utf-8")))

    def steps(line):
        return results.workloads[line["workload"]]["steps"]

    above = {"": [results.above(line) for line in results.of("auto") if steps(line) == 120]}
    for schedule in ("constant", "linear"):
        group = f"{schedule}, 120 steps"
        above[schedule] = [
            results.above(line) for line in results.of("auto") if group in results.labels(line)
        ]
    constant, linear, worst = median(above["constant"]), median(above["linear"]), max(above[""])
    assert f"ends {-100 * constant:.1f} % below that of Adam at the best of swept rates at a constant" in said
    assert f"and {100 * linear:.1f} % above it under a linear decay" in said
    assert f"at worst {100 * worst:.1f} % above" in said
    misses = bench.table.misses(json.loads(newest.read_text(encoding="utf-8"))).splitlines()
    assert len(misses) == 2 and all(", linear, seed" in miss for miss in misses)
    assert "permuted" in misses[1] and "1,200 steps" in misses[0]
    assert "one linear run of a model far from its data, and one over 1,200 steps" in " ".join(page.split())


def test_a_miss_is_named_with_where_it_ended(bench):
    lines = [a_line(bench, "adam", 1e-2, 2.0), a_line(bench, "auto", None, 2.2, rate=0.0321)]
    lines += [a_line(bench, "adam", 1e-2, 2.0, 1), a_line(bench, "auto", None, 1.9, 1, worst=1.51)]
    lines += [a_line(bench, "adam", 1e-2, 2.0, 2), a_line(bench, "auto", None, 2.07, 2)]
    where = "- LoRA, α = 16, chat, batch 4, 120 steps, constant, seed"
    assert bench.table.misses(bench.record.document(lines, "alignment")).splitlines() == [
        f"{where} 0: +10.0 %, rate 0.032 at its end",
        f"{where} 1: −5.0 %, rate 0.01 at its end, a training loss 1.51 L₀",
    ]
