"""PEFT's methods beside their rates: which have a row, how a sweep goes on, what the table makes of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
VARIANTS = {"rsLoRA", "DoRA"}  # of LoRA


@pytest.fixture()
def bench(benchmarks):
    """The benchmark's modules by name."""
    names = ("methods", "workloads", "plan", "record", "peft_table")
    return SimpleNamespace(**{name: benchmarks(f"learning_rate.{name}") for name in names})


def newest():
    paths = sorted((ROOT / "benchmarks" / "results").glob("peft_methods_*.json"))
    return json.loads(paths[-1].read_text(encoding="utf-8"))


def test_every_method_of_peft_has_a_row_or_a_reason(bench):
    peft = pytest.importorskip("peft")
    data, methods = newest(), bench.methods
    if peft.__version__ != data["versions"]["peft"]:
        pytest.skip(f"the table was measured with PEFT {data['versions']['peft']}")
    known = {kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING}
    assert (methods.PEFT_METHODS.keys() - VARIANTS) | methods.LEFT_OUT.keys() == known
    assert not methods.PEFT_METHODS.keys() & methods.LEFT_OUT.keys()
    block = PAGE.partition("<!-- results: peft-methods -->")[2].partition("<!-- end of results -->")[0]
    rows = [line.split(" | ")[0] for line in block.splitlines()]
    for method in methods.PEFT_METHODS.values():
        assert rows.count(f"| {method.label}") == 1, method.label
    for name, why in methods.LEFT_OUT.items():
        assert f"- `{name}`: {why}" in rows


def test_every_method_is_made_by_the_class_that_its_name_stands_for(bench):
    peft = pytest.importorskip("peft")
    classes = {kind.value: made for kind, made in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    for name, method in bench.methods.PEFT_METHODS.items():
        if name not in classes and name.isupper():
            continue  # a PEFT that does not have it yet
        assert getattr(peft, method.config) is classes.get(name, peft.LoraConfig), name
        assert {option for option, _ in method.options} <= set(
            classes.get(name, peft.LoraConfig).__dataclass_fields__
        )
        assert method.published and method.published[0] == method.rate


def run_out(item, losses, done):
    rates = []
    while (run := item.next(done)) is not None:
        done[run.key] = {"lr": run.lr, "loss": losses(run.lr), "rate": run.lr}
        rates.append(run.lr)
    return rates


@pytest.mark.parametrize(
    ("auto", "best", "expected"),
    [
        (7e-3, 6.4e-3, [1e-4, 6.4e-3, 3.2e-3, 1.28e-2]),
        (7e-3, 1.28e-2, [1e-4, 6.4e-3, 3.2e-3, 1.28e-2, 2.56e-2]),
        (None, 1e-4, [1e-4, 0.5e-4, 2e-4]),
    ],
)
def test_a_sweep_has_the_published_rate_on_its_grid_and_begins_where_auto_ended(bench, auto, best, expected):
    first, adam = list(bench.plan.peft())[:2]
    assert (first.contender, first.workload.method) == ("auto", "LORA") and first.workload == adam.workload
    done = {first.next({}).key: {"lr": None, "loss": 1.0, "rate": auto}}
    assert first.next(done) is None
    found = run_out(adam, lambda lr: abs(math.log2(lr / best)), done)
    assert found == pytest.approx(expected)


def test_a_sweep_that_runs_away_is_given_up(bench):
    first, adam = list(bench.plan.peft())[:2]
    done = {first.next({}).key: {"lr": None, "loss": 1.0, "rate": 1e2}}
    found = run_out(adam, lambda lr: -lr, done)
    assert max(found) <= 1e3 < 2 * max(found)


def a_line(bench, method, contender, lr, loss, **fields):
    workload = bench.workloads.Workload("instruction", 4, 100, method=method)
    given = {"rate": 7.123e-3} if contender == "auto" else {"rate": lr}
    return {
        **{"workload": workload.name, "group": workload.group, **vars(workload), "seed": 0},
        **{"contender": contender, "lr": lr, "loss": loss, "start": 3.0, "own": 0.0, "worst": 1.0},
        **{"worst_at": 3, "seconds": 2.0, "commit": "abc", **given, **fields},
    }


def a_result(bench):
    ia3 = [a_line(bench, "IA3", "adam", lr, loss) for lr, loss in ((1e-4, 2.8), (1e-3, 2.6), (5e-3, None))]
    ia3 += [a_line(bench, "IA3", "adam", 1.6384 * f, 2 + abs(f - 1)) for f in (0.5, 1, 2)]
    ia3 += [a_line(bench, "IA3", "auto", None, 2.05)]
    cpt = [a_line(bench, "CPT", "adam", lr, loss) for lr, loss in ((1e-4, 3.0), (500.0, 2.5), (1e3, 2.0))]
    cpt += [a_line(bench, "CPT", "auto", None, None)]
    hra = [a_line(bench, "HRA", "adam", 1e-4, 2.0), a_line(bench, "HRA", "adam", 2e-4, 2.5)]
    hra += [a_line(bench, "HRA", "adam", 0.5e-4, 2.5)]
    hra += [a_line(bench, "HRA", "auto", None, None, rate=None, failed="no such thing")]
    loha = [a_line(bench, "LOHA", "adam", 1e-4, 2.0), a_line(bench, "LOHA", "auto", None, 2.0)]
    return bench.record.document([*ia3, *cpt, *hra, *loha], "peft")


def test_rows_and_what_they_add_up_to(bench, tmp_path):
    data = a_result(bench)
    assert data["kind"] == bench.peft_table.KIND
    path = record.write(data, tmp_path / "peft_methods_2026-01-01.json")
    text = bench.peft_table.peft_methods({path.name: json.loads(path.read_text(encoding="utf-8"))})
    ia3 = "| IA³ | 1e-3 (also 1e-4, 5e-3) | 7.1e-3 | 1.6e0 | 3.000 | 2.6000 | 2.0500 | 2.0000 |"
    cpt = "| CPT | 1e-4 \\* | 7.1e-3 | 1e3 (no end found) | 3.000 | 3.0000 | not finite | 2.0000 |"
    assert f"{ia3} +60.0 % | +5.0 % |" in text and f"{cpt} +100.0 % | not finite |" in text
    assert "| HRA | 1e-4 | – | 1e-4 | 3.000 | 2.0000 | not finite | 2.0000 | +0.0 % | not finite |" in text
    assert '`learning_rate="auto"`: not finite not recovered in the median' in text
    assert "PEFT's rates: +60.0 % not recovered in the median, +100.0 % at worst (CPT)." in text
    assert "`auto` leaves more than 8 % at CPT, HRA." in text
    assert "`auto` leaves more than 2 % at CPT, HRA, IA³." in text
    assert "Instruction, batch 4, 100 steps, constant schedule, seed 0." in text
    assert "- HRA, auto: no such thing" in text
    assert "- `XLORA`: " in text and "| LoHa |" not in text
    assert "- LoHa: not run to its end" in text and "- HRA: not run to its end" not in text
    assert bench.peft_table.peft_methods({}).startswith("*Not measured yet: ")


def test_the_words_above_the_table_are_those_of_the_result(bench):
    found = {one.method.label: one for one in bench.peft_table.entries(newest())}
    shares = {label: one.share(one.auto) for label, one in found.items()}
    section = PAGE.partition("<!-- results: peft-methods -->")[0].rpartition("\n## ")[2]
    said = " ".join(section.split())
    worst = max(shares, key=shares.get)
    assert f"with no rate given {100 * median(shares.values()):.1f} %" in said
    assert f"at worst {100 * shares[worst]:.1f} % ({worst}" in said
    theirs = median(one.share(one.published) for one in found.values())
    assert f"at PEFT's rates {100 * theirs:.1f} %" in said
    lrs = [bench.peft_table.short(of(one.tuned["lr"] for one in found.values())) for of in (min, max)]
    assert f"Tuned rates lie between {lrs[0]} and {lrs[1]}." in said
    assert {label for label, share in shares.items() if share > 0.2} == {"C3A"}
    c3a = found["C3A"]
    assert f"to {c3a.auto['rate']:.1f}, where {c3a.tuned['lr']:.1f} is best" in said
    far = {label: share for label, share in shares.items() if 0.08 < share <= 0.2}
    assert set(far) == {"P-tuning", "prompt tuning", "Uni-LoRA", "PVeRA"}
    assert f"leaves {100 * min(far.values()):.0f} to {100 * max(far.values()):.0f} % at four others" in said
