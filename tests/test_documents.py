"""The documents as a reader meets them: README fits a screen, its code runs, every link leads somewhere."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FOLDERS = (".", "docs", "benchmarks/peers", "benchmarks/results", "contrib/peft", "ffkernels/data/tiny")
PAGES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]+))?\)")


@cache
def anchors(page: Path) -> set[str]:
    """What a heading is called in an address: small letters, no punctuation, hyphens for spaces."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(path), f"{path.name} has no heading {anchor}"


def test_every_page_can_be_reached_from_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        links = LINK.findall(page.read_text(encoding="utf-8"))
        todo += [(page.parent / target).resolve() for target, _ in links if target]
    assert {page for page in PAGES if page.parent == ROOT / "docs"} <= seen


def test_readme_fits_a_screen():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1080


@pytest.fixture
def trained():
    """The embedded model with an adapter, and its task."""
    pytest.importorskip("peft")
    from ffkernels.training.models import add_adapter, load_model
    from ffkernels.training.tasks import load_task

    torch.manual_seed(0)
    model, tokenizer = load_model("tiny")
    task = load_task("instruction", tokenizer, max_length=32, test_examples=32)
    return add_adapter(model, rank=8, seed=0), tokenizer, task


def test_the_loop_in_readme_runs(trained):
    from ffkernels.training.tasks import collate

    model, tokenizer, task = trained
    loader = [collate(task.train[8 * i : 8 * i + 8], tokenizer.pad_token_id) for i in range(24)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    place = {
        **{"model": model, "optimizer": optimizer, "loader": loader},
        **{"batches": [collate(task.validation, tokenizer.pad_token_id)]},
    }
    exec(BLOCKS[0], place)
    ff = place["ff"]
    assert not ff.active and not ff.rising and 1e-3 < ff.learning_rate < 5e-2
    with torch.no_grad():
        assert float(model(**loader[-1]).loss) < 2.6  # before training it is above 3.5


def test_the_trainer_in_readme_runs(trained, tmp_path):
    from functools import partial

    from transformers import Trainer, TrainingArguments

    from ffkernels.training.tasks import collate

    model, tokenizer, task = trained
    arguments = TrainingArguments(
        **{"output_dir": str(tmp_path), "max_steps": 24, "per_device_train_batch_size": 8},
        **{"learning_rate": 1e-4, "lr_scheduler_type": "constant", "save_strategy": "no"},
        **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1},
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
    )
    before = trainer.evaluate()["eval_loss"]
    exec(BLOCKS[1], {"trainer": trainer})
    rates = [entry["ff/learning_rate"] for entry in trainer.state.log_history if "ff/learning_rate" in entry]
    assert rates[0] == pytest.approx(1e-5) and 1e-3 < rates[-1] < 5e-2
    assert trainer.evaluate()["eval_loss"] < before - 1.0


@pytest.mark.parametrize("file", [".ci/run", "Makefile", "CONTRIBUTING.md"])
def test_every_test_that_is_named_is_there(file):
    named = re.findall(r"tests/\w[\w/]*\.py", (ROOT / file).read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []
